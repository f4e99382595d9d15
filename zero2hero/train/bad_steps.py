"""A step whose loss or gradient is not finite: no weight is changed, and its batch is kept on record.

bad_step-000123.json, in the run's folder, says which micro-batches did it and which records they hold. What comes
next is `on_bad_loss`: stop, so that a person may look; skip the step's update, its place in the schedule counts; or
roll back, as Chowdhery et al. (2022, arXiv 2204.02311, section 5.1) did by hand: begin again at the last checkpoint,
with the data that follow the batch. One bad record can be passed by like this; a run that diverges cannot, so either
is done a few times only.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.train.checkpoint import good_checkpoints

if TYPE_CHECKING:
    from zero2hero.train.loop import Trainer

MAX_BAD_STEPS = 5  # skipped or rolled back in one run


def handle(trainer: Trainer, batches: list[Any], loss: float, norm: float) -> None:
    """Do what the run's `on_bad_loss` says. Gradients are there, weights and moments as before the step.

    Raises:
        UserError: the run stops here, because it was asked to or because this is one time too many.
    """
    state, choice = trainer.state, trainer.config.on_bad_loss
    words = f"step {state.step + 1}: the loss is {loss} and its gradient norm {norm}; nothing was updated."
    words += _record(trainer, batches, loss, norm)
    last = trainer.from_main(lambda folder: next(good_checkpoints(folder), None))
    too_often = choice != "stop" and state.bad_steps == MAX_BAD_STEPS
    if choice == "stop" or too_often or (choice == "rollback" and last is None):
        often = f" That is {MAX_BAD_STEPS + 1} times in this run." if too_often else ""
        intact = f" The checkpoint {last.name} is intact." if last else ""
        skip = " --resume --train.on_bad_loss skip goes on without this batch." if last and not too_often else ""
        finer = "" if trainer.masters.shared else ", or --precision fp32"
        raise UserError(
            f"{words}{often}{intact}{skip} If it comes again, begin anew with a smaller --train.learning_rate or "
            f"a longer --train.warmup_steps{finer}."
        )
    if choice == "skip":
        state.step, state.bad_steps = state.step + 1, state.bad_steps + 1
    else:
        _roll_back(trainer)
    if trainer.progress:
        next_step = "it is skipped" if choice == "skip" else f"back to step {trainer.state.step}"
        trainer.progress.print(f"{words} Now {next_step}.")


def _roll_back(trainer: Trainer) -> None:
    """To the last checkpoint; the data go on behind this step's."""
    data, state = trainer.data, trainer.state
    bad_steps, ahead = state.bad_steps + 1, state.step + state.data_offset + 1
    position = data.state_dict() if hasattr(data, "state_dict") else None
    trainer.resume()
    if position is not None:
        data.load_state_dict(position)  # type: ignore[attr-defined]
    trainer.state.bad_steps, trainer.state.data_offset = bad_steps, ahead - trainer.state.step
    if trainer.tracker:
        trainer.tracker.rewind(trainer.state.step)


def _record(trainer: Trainer, batches: list[Any], loss: float, norm: float) -> str:
    """Write the record of the step; returns the words that say where."""
    if not trainer.output_dir:
        return ""
    number = trainer.state.step + 1
    parts = [
        {"loss": str(part), "rows": trainer.describe(batch) if trainer.describe else None}
        for part, batch in zip(trainer.micro_batch_losses, batches)
    ]
    content = {"step": number, "loss": str(loss), "grad_norm": str(norm), "micro_batches": parts}
    rank = f"-rank{trainer.ranks.rank}" if trainer.ranks.size > 1 else ""
    path = trainer.output_dir / f"bad_step-{number:06d}{rank}.json"
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return f" Its records are in {path}."
