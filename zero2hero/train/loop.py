"""The one loop that trains everything on the road.

    for each step:   gather its micro-batches            data(step)
                     add up gradients of their sums      objective(model, batch).sum.backward()
                     add those of the other ranks        train/parallel.py; alone there are none
                     divide once, by the step's weight   so 8 x 1, 4 x 2 and 1 x 8 are the same step
                     clip, update                        fp32 master weights
    now and then:    log, evaluate, sample, save

What is trained, and on what, comes from outside as functions: `objective` (what to minimize), `data` (a pure function
of the step, so resuming needs one integer; or an object with a `state_dict`), `evaluate`, `sample`. Ctrl-C or SIGTERM
finishes the step, saves, and stops; `--resume` goes on from there as if nothing had been. A loss that is not finite
changes no weight.
"""

from __future__ import annotations

import copy
import math
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zero2hero.config import TrainConfig, fingerprint
from zero2hero.data.streaming import merge_states
from zero2hero.errors import Stopped, UserError
from zero2hero.progress import TrainingProgress
from zero2hero.train import bad_steps, checkpoint
from zero2hero.train.checkpoint import folder_of, random_state, set_random_state
from zero2hero.train.objectives import Objective
from zero2hero.train.optim import make_optimizers
from zero2hero.train.parallel import ALONE, Ranks
from zero2hero.train.schedule import learning_rate_factor
from zero2hero.train.sharding import master_weights
from zero2hero.train.tracking import Tracker, Units
from zero2hero.train.watch import Watcher

_WEIGHT = " weight"  # behind the name of a metric: what its sum is divided by


@dataclass
class State:
    """What changes as a run goes on, beside weights and moments; all of it is in a checkpoint."""

    step: int = 0
    num_tokens: int = 0  # with a target; or what else the loss's weight counts (`Units`)
    best_eval_loss: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0
    bad_steps: int = 0  # skipped or rolled back because their loss was not finite
    data_offset: int = 0  # the data are that many steps ahead, after a roll-back


@dataclass
class _Window:
    """Sums since the last log line."""

    loss: float = 0.0
    weight: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    waiting: float = 0.0  # of these seconds, for data
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run.

    Args:
        model: hidden states and logits; already on its device.
        objective: what to minimize.
        data: step -> this rank's micro-batches of that step, on the model's device, each knows its `num_tokens`.
        config: the loop's settings.
        total_steps: optimizer steps in all.
        output_dir: checkpoints go below it.
        dtype: of the model's computation; master weights are fp32.
        evaluate: () -> metrics, `eval_loss` among them.
        sample: step -> None, writes samples somewhere.
        tracker, progress: where numbers go; None: nowhere.
        flops_per_token, peak_flops: for the share of the machine's peak that is shown.
        watchers: what looks on at every step (see train/watch.py).
        made_with: hashes of what the run is made with, by name (tokenizer, data); its checkpoints resume no other.
        describe: batch -> JSON values that say which records it holds, for the report of a loss that is not finite.
        ranks: the processes that train together; alone by default.
        units: what the loss's weight counts.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Callable[[int], list[Any]],
        config: TrainConfig,
        total_steps: int,
        output_dir: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        evaluate: Callable[[], dict[str, float]] | None = None,
        sample: Callable[[int], None] | None = None,
        tracker: Tracker | None = None,
        progress: TrainingProgress | None = None,
        flops_per_token: Callable[[int], float] | None = None,
        peak_flops: float = 0.0,
        watchers: Sequence[Watcher] = (),
        made_with: Mapping[str, str] | None = None,
        describe: Callable[[Any], Any] | None = None,
        ranks: Ranks = ALONE,
        units: Units = Units(),  # noqa: B008 (frozen)
    ) -> None:
        self.model, self.objective, self.data, self.config = model, objective, data, config
        self.total_steps, self.output_dir = total_steps, Path(output_dir) if output_dir else None
        self.masters = master_weights(model, dtype, ranks)
        # fp16 has no room for gradients that are not scaled: the optimizer's own products are in fp32 then
        self.optimizers = make_optimizers(
            self.masters.parameters, config, torch.float32 if dtype == torch.float16 else dtype
        )
        self.evaluate, self.sample, self.tracker, self.progress = evaluate, sample, tracker, progress
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.watchers = [*([self.masters.loss_scale] if self.masters.loss_scale else []), *watchers]
        self.ranks, self.units = ranks, units
        self.tracker_state: dict[str, Any] = {}  # of the checkpoint that was taken up, for a tracker made after that
        self.made_with, self.describe = {"settings": fingerprint(config), **(made_with or {})}, describe
        self.state = State()
        self.step_weight = 0.0  # of the last step: its tokens with a target, or what else is counted
        self.metrics: dict[str, float] = {}
        self.step_loss = math.nan  # of the last step, for each of those
        self._window = _Window()
        self._asked_to_stop: int | None = None
        tenth = max(1, math.ceil(total_steps / 10))
        self.eval_steps = config.eval_steps or tenth
        self.save_steps = config.save_steps or self.eval_steps
        self.sample_steps = config.sample_steps or self.eval_steps
        self.keep_best = max(config.keep_best, 1 if config.early_stopping_patience else 0)

    # --- the loop -------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the end (or to early stopping) and return the last metrics.

        Raises:
            Stopped: asked to stop by a signal; a checkpoint was saved.
            UserError: the loss is not finite, or a checkpoint cannot be written; the last one is intact.
        """
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)} if _main_thread() else {}
        try:
            if self.state.step == 0:
                _seed_everything(self.config.seed)
            if self.state.step == 0 and self.sample:
                self.outside_training(lambda: self.sample(0))  # type: ignore[misc]
            while self.state.step < self.total_steps and not self._out_of_patience():
                started, before = time.perf_counter(), self.state.step
                self.step()
                self._window.seconds += time.perf_counter() - started
                stop = self.ranks.max(self._asked_to_stop or 0)  # a signal to one rank stops all at one step
                step, last = self.state.step, self.state.step == self.total_steps
                if step <= before:  # rolled back: what is due at this step was done when it was first reached
                    continue
                if self.logs_at(step):
                    self._log()
                evaluated = self.evaluate is not None and (step % self.eval_steps == 0 or last)
                if evaluated:
                    self._evaluate()
                if self.sample and (step % self.sample_steps == 0 or last):
                    self.outside_training(lambda: self.sample(self.state.step))  # type: ignore[misc]
                due = step % self.save_steps == 0 or last or stop or (evaluated and self.keep_best > 0)
                if self.output_dir and due:
                    self.save(self.metrics["eval_loss"] if evaluated else None)
                if stop:
                    raise Stopped(stop)
            if self.state.step < self.total_steps and self.progress:
                self.progress.print(f"stopped early: no held-out loss since step {self.state.best_step} was better")
            if self.config.early_stopping_patience and self.evaluate:
                self._restore_best()
            return self.metrics
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def logs_at(self, step: int) -> bool:
        """Whether a line is logged once `step` steps are done."""
        return step % self.config.logging_steps == 0 or step in (1, self.total_steps)

    def step(self) -> None:
        """One optimizer step; without an update where the loss is not finite (train/bad_steps.py) or fp16 overflows."""
        self.model.train()
        window, started = copy.deepcopy(self._window), time.perf_counter()
        batches = self._next_batches()
        self._window.waiting += time.perf_counter() - started
        torch.manual_seed(self._seed())
        total, weight = self._backward(batches)
        self.step_weight = weight
        norm = self._finish_gradients(weight)
        self.step_loss = total / weight
        overflow = math.isfinite(total) and self.masters.overflowed(norm)
        if not overflow:
            self.metrics["grad_norm"] = norm
            if not (math.isfinite(total) and math.isfinite(norm)):
                self._window = window
                return bad_steps.handle(self, batches, self.step_loss, norm)
        self._set_learning_rate()
        if not overflow:
            for watcher in self.watchers:
                watcher.before_update(self)
            for optimizer in self.optimizers:
                optimizer.step()
            self.masters.publish()
        self.state.step += 1
        self.state.num_tokens += int(weight)
        self._window.loss += total
        self._window.weight += weight
        for watcher in self.watchers:
            watcher.after_update(self)

    def _next_batches(self) -> list[Any]:
        """This step's. Where they cannot be had, what was learned is saved, if the data stand where they stood."""
        try:
            return self.data(self.state.step + self.state.data_offset)
        except UserError as error:
            step = self.state.step
            if not self.output_dir or not step or not getattr(self.data, "unharmed_by_errors", False):
                raise
            if not folder_of(self.output_dir, step).exists():
                self.save()
            raise UserError(f"{error}\nThe run is saved as it was after step {step}: --resume continues it.") from error

    def _backward(self, batches: list[Any]) -> tuple[float, float]:
        """Add up the gradients of every micro-batch's sum; returns the summed loss and the weight of all ranks."""
        self.masters.zero_grad()
        self.micro_batch_losses: list[float] = []
        sums = {"loss": 0.0, "weight": 0.0, "tokens": 0.0}
        for index, batch in enumerate(batches):
            loss = self.objective(self.model, batch)
            self.masters.backward(loss.sum)
            parts = {"loss": loss.sum.detach(), "weight": loss.weight, "tokens": batch.num_tokens} | loss.metrics
            parts |= {name + _WEIGHT: value for name, value in loss.weights.items()}
            numbers = {name: float(value) for name, value in parts.items()}
            sums = {name: sums.get(name, 0.0) + number for name, number in numbers.items()}
            self.micro_batch_losses.append(numbers["loss"] / max(1.0, numbers["weight"]))
            for watcher in self.watchers:
                watcher.after_micro_batch(self, index, sums["weight"])
        self.masters.sum_over(self.ranks)
        sums = self.ranks.sum(sums)
        total, weight = sums.pop("loss"), sums.pop("weight")
        self._window.tokens += int(sums.pop("tokens"))
        for name, value in sums.items():
            self._window.metrics[name] = self._window.metrics.get(name, 0.0) + value
        if weight == 0:
            raise UserError(
                f"step {self.state.step + 1}: no token of the batch has a target, so nothing can be learned"
            )
        return total, weight

    def _finish_gradients(self, weight: float) -> float:
        """Divide once by the step's weight and clip; returns the norm before clipping."""
        gradients = self.masters.gradients
        torch._foreach_mul_(gradients, 1.0 / weight)
        norm = self.masters.norm()
        if self.config.max_grad_norm and norm > self.config.max_grad_norm:
            torch._foreach_mul_(gradients, self.config.max_grad_norm / norm)
        return norm

    def _seed(self) -> int:
        """Of what dropout drops: a function of the step, as the data are, and another one on each rank."""
        words = np.random.SeedSequence([self.config.seed % 2**64, self.state.step, self.ranks.data_rank])
        return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _set_learning_rate(self) -> None:
        c = self.config
        factor = learning_rate_factor(
            self.state.step, self.total_steps, c.lr_scheduler_type, c.warmup_steps, c.decay_steps, c.power
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.metrics["learning_rate"] = c.learning_rate * factor

    def _log(self) -> None:
        w, self._window = self._window, _Window()
        speed = w.tokens / max(w.seconds, 1e-9)
        self.metrics["loss"] = w.loss / w.weight if w.weight else math.nan  # every step of it was skipped
        for name, value in w.metrics.items():
            if not name.endswith(_WEIGHT):
                self.metrics[name] = value / (w.metrics.get(name + _WEIGHT) or w.weight)
        for watcher in self.watchers:
            self.metrics |= watcher.metrics()
        shown = speed if self.units.item == "token" else w.weight / max(w.seconds, 1e-9)  # padding is a token as well
        self.metrics |= {self.units.rate: shown, self.units.seen: self.state.num_tokens}
        self.metrics["data_share"] = min(1.0, w.waiting / max(w.seconds, 1e-9))
        if self.flops_per_token and self.peak_flops:
            self.metrics["peak_share"] = speed * self.flops_per_token(self.state.step - 1) / self.peak_flops
        if self.tracker:
            self.tracker.log(self.state.step, {k: v for k, v in self.metrics.items() if not k.startswith("eval_")})
        if self.progress:
            self.progress.update(
                self.state.step,
                loss=self.metrics["loss"],
                per_second=shown,
                peak_share=self.metrics.get("peak_share"),
                items="tok" if self.units.item == "token" else f"{self.units.item}s",
            )

    # --- now and then ---------------------------------------------------------------------------------------

    def outside_training(self, work: Callable[[], Any]) -> Any:
        """Run in evaluation mode without gradients; the random state of training is not touched."""
        self.model.eval()
        before = random_state()
        try:
            with torch.no_grad():
                return work()
        finally:
            set_random_state(before)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        found = self.outside_training(self.evaluate)
        self.metrics |= found
        loss, state = found["eval_loss"], self.state
        if loss < state.best_eval_loss:
            state.best_eval_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
        else:
            state.evaluations_without_gain += 1
        if self.tracker:
            self.tracker.log(state.step, found)
        if self.progress:
            others = {name.removeprefix("eval_"): value for name, value in found.items() if name != "eval_loss"}
            words = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in others.items())
            self.progress.print(f"step {state.step}: held-out loss {loss:.4f}{words}")

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.state.evaluations_without_gain >= patience

    def _restore_best(self) -> None:
        if not self.output_dir or self.state.best_step in (0, self.state.step):
            return
        best = self.from_main(checkpoint.best_checkpoint)
        if best is not None:
            weights = self.masters.parameters
            saved = checkpoint.read_weights(best, weights)
            checkpoint.check_weights(best, saved, weights)
            checkpoint.copy_weights(saved, weights)
            self.masters.publish()
            watchers = checkpoint.read_tree(best, "state", weights)["state"]["watchers"]
            for watcher in self.watchers:  # an average of the weights is then that of their step
                watcher.load_state_dict(watchers[watcher.name])
            self.metrics["eval_loss"] = checkpoint.eval_loss(best)
            if self.progress:
                self.progress.print(f"the weights of {best.name}, the best held-out loss, are kept")

    # --- stop and go on -------------------------------------------------------------------------------------

    def save(self, eval_loss: float | None = None) -> None:
        """Write a checkpoint of this step, with its held-out loss if that is known, and delete the oldest."""
        assert self.output_dir is not None
        step, window = self.state.step, self._window
        state = {
            "loop": vars(self.state),
            "window": {"loss": window.loss, "weight": window.weight, "metrics": window.metrics},
            "watchers": {watcher.name: watcher.state_dict() for watcher in self.watchers},
            "data": self._data_state(),
            "tracker": self.tracker.state_dict() if self.tracker else {},
        }
        checkpoint.save_checkpoint(
            folder_of(self.output_dir, step), self.masters.parameters, self.optimizers, state, self.ranks,
            step=step, eval_loss=eval_loss, made_with=self.made_with,
        )  # fmt: skip
        if self.ranks.is_main:
            checkpoint.remove_old(self.output_dir, step, self.config.keep_last, self.keep_best)

    def _data_state(self) -> dict[str, Any]:
        """Where the data of all ranks stand."""
        if not hasattr(self.data, "state_dict"):
            return {}
        states = self.ranks.gather(self.data.state_dict())
        return states[0] if len(states) == 1 else merge_states(states)

    def resume(self) -> int:
        """Take up the newest whole checkpoint; returns its step, 0 when there is none.

        Raises:
            UserError: all are damaged, or the newest is of a run that is made otherwise; nothing was changed then.
        """
        folder = self.from_main(checkpoint.newest_checkpoint)
        if folder is None:
            return self.state.step
        saved = checkpoint.read_checkpoint(folder, self.made_with, self.masters.parameters, self.optimizers)
        try:
            state, window = State(**saved.state["loop"]), _Window(**saved.state["window"])
            data, watchers, tracker = (saved.state[name] for name in ("data", "watchers", "tracker"))
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder}: state.json is not the loop's: {error}") from error
        if watchers.keys() != {watcher.name for watcher in self.watchers}:
            raise UserError(f"{folder} was watched by {sorted(watchers)}, this run is by others: give it the same")
        saved.check(self.masters.parameters, self.optimizers)
        if hasattr(self.data, "load_state_dict"):  # first, for these may have changed
            self.data.load_state_dict(data)
        saved.restore(self.masters.parameters, self.optimizers)
        self.masters.publish()
        self.state, self._window, self.tracker_state = state, window, tracker
        for watcher in self.watchers:
            watcher.load_state_dict(watchers[watcher.name])
        return self.state.step

    def from_main(self, find: Callable[[Path], Path | None]) -> Path | None:
        """A checkpoint of this run, as the main rank finds it."""
        found = find(self.output_dir) if self.output_dir and self.ranks.is_main else None
        path = self.ranks.gather(str(found) if found else None)[0]
        return Path(path) if path else None

    def _stop(self, number: int, frame: Any) -> None:
        if self._asked_to_stop is not None and self.ranks.size == 1:  # asked twice: now
            raise KeyboardInterrupt  # (not one of several ranks, which scheduler and torchrun may both have asked)
        self._asked_to_stop = number
        if self.progress:
            self.progress.print("stopping after this step; the run is saved and --resume continues it")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
