"""What looks on while a run trains: an average of its weights, a diagnosis of its health, its peak of memory.

The loop knows none of them; it calls each at three moments of a step and asks for numbers when it logs. What a watcher
must remember over a resume it hands out as `state_dict`, and the checkpoint keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zero2hero.train.loop import Trainer


class Watcher:
    """Does nothing; override what is needed. `name` keys its state in a checkpoint, so it is unique in a run."""

    name = "watcher"

    def after_micro_batch(self, trainer: Trainer, index: int, weight: float) -> None:
        """The step's micro-batches 0 ... `index` are in the gradients: sums so far, over `weight` in all."""

    def before_update(self, trainer: Trainer) -> None:
        """The step's gradients are complete, divided and clipped (`trainer.masters.gradients`), weights still old."""

    def after_update(self, trainer: Trainer) -> None:
        """The weights are new and `trainer.state.step` counts this step."""

    def metrics(self) -> dict[str, float]:
        """Numbers since the last call, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values that a resumed run needs to go on bit for bit."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
