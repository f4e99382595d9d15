"""The frame of every run: one directory, one loop, one record, whatever is trained.

    directory    this run's alone while it lasts; refuses to overwrite a finished run, or to resume with other settings
    devices      the ranks that torchrun started, the precision, what memory the run will need and took
    record       metrics.jsonl, trackers, samples along the way, report.html
    the end      the weights in fp32, gathered from all ranks, for the task to write

What is particular (pretraining, fine-tuning, classifying pictures, ...) is a function that makes a `Task`: the model,
the objective, the batches, how to evaluate, and how to save. It is called once ranks and device are known.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from zero2hero import machine
from zero2hero.config import MAY_CHANGE, RunConfig, differences, fingerprint, to_dict, to_yaml
from zero2hero.device import pick_device
from zero2hero.errors import UserError
from zero2hero.io import atomic_write, locked
from zero2hero.models.decoder import Decoder
from zero2hero.progress import TrainingProgress
from zero2hero.train.activation_checkpointing import checkpoint_blocks
from zero2hero.train.diagnosis import Diagnosis, diagnose, verdict
from zero2hero.train.ema import WeightAverage
from zero2hero.train.loop import Trainer
from zero2hero.train.memory import PeakMemory, memory_explained, warning
from zero2hero.train.memory_advice import free_memory
from zero2hero.train.memory_plan import Run as PlannedRun
from zero2hero.train.memory_plan import predict
from zero2hero.train.noise_scale import NoiseScale
from zero2hero.train.objectives import Objective
from zero2hero.train.parallel import Ranks, join
from zero2hero.train.report import write_report
from zero2hero.train.sharding import parallelize, whole_model
from zero2hero.train.tracking import Tracker, Units, describe_machine, read_metrics
from zero2hero.train.vitals import Vitals
from zero2hero.train.watch import Watcher

C = TypeVar("C", bound=RunConfig)
Sample = dict[str, str]  # {"prompt": ..., "text": ...}


@dataclass(frozen=True)
class Place:
    """Where a run computes: `peak_flops` is the measured matmul peak in `dtype`, 0 when not measured."""

    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    peak_flops: float

    @property
    def part(self) -> tuple[int, int]:
        """(which, of how many) parts of each step's micro-batches are this rank's."""
        return self.ranks.data_rank, self.ranks.data_size


@dataclass
class Task:
    """What one kind of training brings to the frame.

    Attributes:
        model: initialized in fp32, on the CPU; what has no `requires_grad` stays as it is.
        objective: what to minimize (train/objectives.py).
        total_steps: optimizer steps.
        data: step -> this rank's micro-batches on the device, or an object that knows where it stands.
        save: writes the finished model (fp32, whole) into the run's directory.
        announce: one line that says what is learned from what.
        evaluate: () -> {"eval_loss": ..., more}.
        sample: model -> what it writes now, for the record.
        baseline: numbers that stand in the record from the first step on, such as another model's loss.
        made_with: hashes of what the run is made with; its checkpoints resume no other.
        describe: batch -> which records it holds.
        facts: what the diagnosis should know (`vocab_size`).
        flops_per_token: step -> FLOPs of training on one token.
        planned: what memory the run will take, where that is known.
        watchers: beside those that every run has.
        units: what is counted, and what the loss is in.
    """

    model: nn.Module
    objective: Objective
    total_steps: int
    data: Callable[[int], list[Any]]
    save: Callable[[nn.Module], None]
    announce: str = ""
    evaluate: Callable[[], dict[str, float]] | None = None
    sample: Callable[[nn.Module], list[Sample]] | None = None
    baseline: Callable[[], dict[str, float]] = dict
    made_with: dict[str, str] = field(default_factory=dict)
    describe: Callable[[Any], Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    flops_per_token: Callable[[int], float] | None = None
    planned: PlannedRun | None = None
    watchers: list[Watcher] = field(default_factory=list)
    units: Units = field(default_factory=Units)


def run(config: RunConfig, begin: Callable[[Place], Task]) -> nn.Module:
    """Train what `begin` makes, in `config.output_dir`; returns the finished model (fp32, whole).

    Raises:
        UserError: anything in data or settings that a person can mend.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    train = config.train
    with (
        join(pick_device(config.device), train.tp_size, train.ddp_timeout) as (ranks, device),
        locked(config.output_dir) if ranks.is_main else nullcontext(),
    ):
        if ranks.is_main:
            check_directory(config)
        if train.activation_offload and device.type == "cpu":
            raise UserError("train.activation_offload moves activations to the CPU's memory, and this run is there")
        place, free = Place(ranks, device, *choose_precision(config.precision, device)), free_memory(str(device))
        task = begin(place)
        if train.warmup_steps >= max(2, task.total_steps):
            raise UserError(
                f"train.warmup_steps {train.warmup_steps:g} is the whole run of {task.total_steps} steps: set "
                "it lower, such as 0.05 of the run, or train longer"
            )
        if ranks.is_main:
            atomic_write(Path(config.output_dir) / "run.yaml", to_yaml(dataclasses.replace(config, resume=False)))
        return _train(config, task, place, free)


def training(begin: Callable[[C, Place], Task]) -> Callable[[C], None]:
    """What a verb calls: settings -> `run` with what `begin` makes of them; the model is left in their output_dir.

    With `method` "lora" among the settings, an adapter learns.
    """

    def train(config: C) -> None:
        run(config, functools.partial(_adapted if getattr(config, "method", "full") == "lora" else begin, config))

    def _adapted(config: Any, place: Place) -> Task:
        from zero2hero.train.adapted import with_adapter

        return with_adapter(begin(config, place), config.lora, config.train.seed)

    return train


def _train(config: RunConfig, task: Task, place: Place, free: float) -> nn.Module:
    output_dir, ranks = Path(config.output_dir), place.ranks
    model = _placed(task.model, config, place)
    average = WeightAverage(config.train.ema_decay)
    with TrainingProgress(task.total_steps) as progress:
        peak_memory = PeakMemory(place.device)
        watchers = [Vitals(), Diagnosis(output_dir, task.facts, progress.print), peak_memory, NoiseScale(),
                    *([average] if config.train.ema_decay else []), *task.watchers]  # fmt: skip
        rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * ranks.data_size
        trainer = Trainer(
            model, task.objective, task.data, config.train, task.total_steps, output_dir, dtype=place.dtype,
            progress=progress, peak_flops=place.peak_flops * ranks.size, ranks=ranks, watchers=watchers,
            flops_per_token=task.flops_per_token, describe=task.describe, units=task.units,
            made_with={"settings": fingerprint(config), "rows per step": str(rows)} | task.made_with,
        )  # fmt: skip
        resumed = trainer.resume() if config.resume else 0
        count = f"resuming at step {resumed} of {task.total_steps}" if resumed else f"{task.total_steps} steps"
        together = f"; {ranks.size} ranks" if ranks.size > 1 else ""
        progress.print(f"{task.announce}; {str(place.dtype).removeprefix('torch.')}; {count}{together}")
        with _record(config, trainer, resumed) as tracker:
            trainer.tracker = tracker
            if task.sample:
                trainer.sample = average.around(trainer, functools.partial(_sample, task, trainer, progress))
            trainer.evaluate = task.evaluate and average.around(trainer, task.evaluate)
            if tracker is not None and not resumed:
                tracker.record(0, machine=describe_machine(), units=task.units.record())
                tracker.log(0, trainer.outside_training(task.baseline))
            planned = None if trainer.masters.divided else task.planned  # the plan is for one device
            if planned and (words := warning(planned, free)):
                progress.print(words)
            peak_memory.begin(trainer.masters, trainer.model)
            with memory_explained(planned, free) if planned else nullcontext():
                trainer.train()
    if planned:
        progress.print(peak_memory.verdict(predict(planned).peak))
    if ranks.is_main:
        progress.print(verdict(diagnose(read_metrics(output_dir), task.facts)))
    average.keep(trainer)
    finished = _finished(trainer)
    if ranks.is_main:
        task.save(finished)
        write_report(output_dir)
    return finished


def _placed(model: nn.Module, config: RunConfig, place: Place) -> nn.Module:
    """The model as the settings have it (checkpointed, divided, compiled), equal on all ranks, on its device."""
    place.ranks.copy_from_main(model.parameters())
    if config.train.gradient_checkpointing:
        checkpoint_blocks(model, config.train.activation_offload)
        machine.keep_memory(False)
    return parallelize(model, place.ranks, config.train, place.dtype).to(place.device)


def _sample(task: Task, trainer: Trainer, progress: TrainingProgress, step: int) -> None:
    """Let the model write, for the record and for the person who watches."""
    model = _finished(trainer) if trainer.masters.divided else trainer.model  # gathered by all ranks
    if trainer.tracker is None:
        return
    assert task.sample is not None
    samples = task.sample(model)
    trainer.tracker.samples(step, samples)
    progress.print(f"\nstep {step} writes:  {samples[0]['prompt']}{samples[0]['text']}\n")


@torch.no_grad()
def _finished(trainer: Trainer) -> nn.Module:
    """The model with its fp32 weights, gathered from all ranks, which must all call this."""
    weights = trainer.masters.gathered()
    if trainer.masters.divided:
        assert isinstance(trainer.model, Decoder)
        return whole_model(trainer.model.config, weights)
    for name, parameter in trainer.model.named_parameters():
        if name in weights:
            parameter.data = weights[name]
    return trainer.model.eval()


def _record(config: RunConfig, trainer: Trainer, resumed: int) -> AbstractContextManager[Tracker | None]:
    """The run's tracker, on the main rank."""
    if not trainer.ranks.is_main:
        return nullcontext()
    others = [name for name in config.report_to if name != "tensorboard"]
    return Tracker(
        config.output_dir, "tensorboard" in config.report_to, resumed or None, others, trainer.tracker_state
    )  # fmt: skip


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, float]:
    """The dtype to compute in, and this machine's measured matmul peak in it (FLOP/s; 0 when not measured)."""
    if device.type != "cpu":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        chosen = name if name != "auto" else "bf16" if bf16 else "fp32"
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen], 0.0
    found = machine.prepare()
    if name == "fp16":
        return torch.float16, 0.0
    bf16 = name == "bf16" or (name == "auto" and found.bf16_pays)
    return (torch.bfloat16, found.bf16_flops) if bf16 else (torch.float32, found.fp32_flops)


def check_directory(config: RunConfig) -> None:
    """Refuse to overwrite a finished run in silence, and to resume with other settings.

    Raises:
        UserError: either of them.
    """
    output_dir = Path(config.output_dir)
    saved = output_dir / "run.yaml"
    if not config.resume:
        checkpoints = output_dir / "checkpoints"
        if checkpoints.is_dir() and any(checkpoints.iterdir()):
            raise UserError(
                f"{output_dir} already holds a run. Add --resume to continue it, choose another --output_dir, "
                f"or delete the folder."
            )
        return
    if not saved.exists():
        raise UserError(f"nothing to resume: {saved} does not exist. Start the run without --resume.")
    import yaml

    try:
        before, after = yaml.safe_load(saved.read_text()), to_dict(config)
        changed = [d for d in differences(before, after) if d.split(":")[0].split(".")[-1] not in MAY_CHANGE]
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{saved} is damaged ({why}): put a copy back, or start a new run elsewhere") from None
    if changed:
        raise UserError(
            "--resume continues a run with the settings it began with, but these have changed: "
            + "; ".join(changed)
            + f". Set them back, or start a new run in another --output_dir. ({saved})"  # fmt: skip
        )


def steps_of(config: RunConfig, rows_per_epoch: float, data_size: int = 1) -> int:
    """Optimizer steps of the whole run."""
    train = config.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * data_size
    return train.max_steps or math.ceil(train.num_train_epochs * rows_per_epoch / rows)


def micro_batches(config: RunConfig, place: Place, batch: Callable[[int], Any]) -> Callable[[int], list[Any]]:
    """step -> this rank's micro-batches of it, where `batch(i)` is micro-batch i of the run, counted over all ranks."""
    rank, size = place.part
    together = config.train.gradient_accumulation_steps * size

    def of_step(step: int) -> list[Any]:
        numbers = range(step * together + rank, (step + 1) * together, size)
        return [batch(number).to(place.device) for number in numbers]

    return of_step
