"""Find a learning rate by trying them all in one short run (Smith 2015, arXiv 1506.01186).

The rate rises from far too small to far too large by one factor each step. The loss first stands still, then falls, and
at last the steps overshoot and it explodes. A good peak rate for a whole run lies below the rate at which the loss was
lowest, by a factor of a few, for a run must bear it for long, not for one step.

Everything else is the run's own: the data, the model, the optimizer, the batch. Nothing is written but the plot.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zero2hero.config import PretrainConfig, differences, to_dict
from zero2hero.data.cache import split_documents, tokenize_to_cache
from zero2hero.data.sources import open_source
from zero2hero.data.streaming import Stream
from zero2hero.device import pick_device
from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.options import PlanLearningRateConfig
from zero2hero.progress import track
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import Loss, causal_lm
from zero2hero.train.plots import smoothed
from zero2hero.train.pretrain import causal_data, fit_shape, get_tokenizer, streamed_data
from zero2hero.train.run import choose_precision
from zero2hero.train.watch import Watcher

BELOW_BEST = 5.0  # the suggestion is the rate of the lowest loss divided by this
EXPLODED = 2.0  # times the first loss: no larger rate is tried


def run(config: PlanLearningRateConfig) -> float:
    """What `zero2hero plan lr` does: find, draw, print; returns the suggested learning rate.

    Raises:
        UserError: anything in data or settings that a person can mend, or a loss that no rate lowers.
    """
    rates, losses = range_test(*_short_run(config), config)
    suggestion = suggest(rates, losses)
    atomic_write(Path(config.plot), draw(rates, losses, suggestion))
    lowest = rates[int(np.argmin(_smooth(losses)))]
    print(f"the loss was lowest at {lowest:.2g}; a run bears about {suggestion:.2g}   (the curve: {config.plot})")
    print(f"\nnext:  {command(config, suggestion)}")
    return suggestion


def _short_run(config: PlanLearningRateConfig) -> tuple[Decoder, Any, Any]:
    """(model, data, dtype) of the run that is planned."""
    device = pick_device(config.device)
    dtype, _ = choose_precision(config.precision, device)
    source = open_source(config.data, text_column=config.text_column, on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
                         seed=config.train.seed)  # fmt: skip
    tokenizer = get_tokenizer(config, source)
    model = Decoder(fit_shape(config.model, tokenizer))
    init_weights(model, config.train.seed)
    train, held_out = dataclasses.replace(config.train, max_steps=config.steps), config.validation_fraction
    data: Any
    if config.streaming:
        skip = config.on_bad_record == "skip"
        _, data = streamed_data(Stream(source, tokenizer, held_out, train.seed, skip=skip), train, device)
    else:
        training, _ = split_documents(tokenize_to_cache(source, tokenizer), held_out, train.seed)
        _, data = causal_data(training, train, device)
    return model.to(device), data, dtype


class _Rising(Watcher):
    """Sets each step's learning rate in place of the schedule's."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.rates = rates

    def before_update(self, trainer: Trainer) -> None:
        share = self.rates[trainer.state.step] / trainer.config.learning_rate
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share


def range_test(model: Any, data: Any, dtype: Any, config: PlanLearningRateConfig) -> tuple[list[float], list[float]]:
    """(learning rates, the loss before each one's step), until the loss explodes."""
    growth = (config.max_learning_rate / config.min_learning_rate) ** (1 / (config.steps - 1))
    rates = [config.min_learning_rate * growth**i for i in range(config.steps)]
    seen: list[tuple[float, float]] = []  # sum and weight of each micro-batch

    def objective(model: Any, batch: Any) -> Loss:
        loss = causal_lm(model, batch, config.train.label_smoothing_factor)
        seen.append((float(loss.sum.detach()), float(loss.weight)))
        return loss

    trainer = Trainer(model, objective, data, config.train, config.steps, dtype=dtype, watchers=[_Rising(rates)])
    losses: list[float] = []
    for _ in track(rates, "raising the learning rate"):
        seen.clear()
        try:
            trainer.step()
        except UserError:
            if all(math.isfinite(total) for total, _ in seen):
                raise
        losses.append(sum(total for total, _ in seen) / sum(weight for _, weight in seen))
        if not losses[-1] < EXPLODED * losses[0]:
            losses.pop()
            break
    return rates[: len(losses)], losses


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A fifth of the rate at which the smoothed loss was lowest.

    Raises:
        UserError: the loss never fell: all rates were too large, or all too small.
    """
    smooth = _smooth(losses)
    best = int(np.argmin(smooth)) if len(losses) else 0
    if best < 2:
        raise UserError(
            f"the loss rose from the start: {rates[0] if rates else 'the first rate'} is too large. "
            "Lower --min_learning_rate"
        )
    if smooth[best] > 0.99 * smooth[0]:
        raise UserError(
            f"no learning rate up to {rates[-1]:.2g} lowered the loss: raise --max_learning_rate or --steps"
        )
    return float(f"{rates[best] / BELOW_BEST:.1e}")


def _smooth(losses: Sequence[float]) -> np.ndarray:
    return smoothed(np.asarray(losses, dtype=np.float64))


def draw(rates: Sequence[float], losses: Sequence[float], suggestion: float) -> bytes:
    """The curve as PNG: each step's loss, the smoothed one, and the suggestion.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'zero2hero[train]'") from None
    import io

    from zero2hero.train.plots import LIGHT

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color=LIGHT.train, alpha=0.3, linewidth=0.8)
    axes.plot(rates, _smooth(losses), color=LIGHT.train, linewidth=2)
    axes.axvline(suggestion, color=LIGHT.evaluation, linestyle=(0, (5, 4)), label=f"suggested: {suggestion:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate, one step each")
    axes.set_title("Loss while the learning rate rises", loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def command(config: PlanLearningRateConfig, learning_rate: float) -> str:
    """The `zero2hero pretrain` that has this configuration's options and the learning rate."""
    train = dataclasses.replace(config.train, learning_rate=learning_rate)
    chosen = {f.name: getattr(config, f.name) for f in dataclasses.fields(PretrainConfig)} | {"train": train}
    values = to_dict(PretrainConfig(**chosen))
    words = []
    for line in differences(to_dict(PretrainConfig()), values):
        name, value = line.partition(":")[0], values
        for part in name.split("."):
            value = value[part]
        words.append(f"--{name} {shlex.quote(str(value))}")
    return " ".join(["zero2hero pretrain", *words])
