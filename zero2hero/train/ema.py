"""An average of the weights along the way, which is often better than the weights themselves.

Late in training the weights wander about the bottom of a valley; their mean lies nearer to it (Polyak & Juditsky 1992;
Izmailov et al. 2018, arXiv 1803.05407). The exponential moving average, average <- d average + (1 - d) weights, looks
back over about 1 / (1 - d) steps. In the beginning d = (1 + t) / (10 + t) is smaller, so that the first, random
weights are soon forgotten. Training itself goes on with the weights; what is evaluated and kept is their average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from zero2hero.train.watch import Watcher

if TYPE_CHECKING:
    from zero2hero.train.loop import Trainer

T = TypeVar("T")


class WeightAverage(Watcher):
    """The exponential moving average of the fp32 weights, by name; empty before the first step."""

    name = "weight_average"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_update(self, trainer: Trainer) -> None:
        weights = trainer.masters.parameters
        if not self.average:
            self.average = {name: p.detach().clone() for name, p in weights.items()}
        decay = min(self.decay, (1 + trainer.state.step) / (10 + trainer.state.step))
        torch._foreach_lerp_(list(self.average.values()), [weights[name] for name in self.average], 1 - decay)

    @contextlib.contextmanager
    def applied(self, trainer: Trainer) -> Iterator[None]:
        """Within, the model computes with the average; afterwards its weights are what they were, bit for bit."""
        weights = trainer.masters.parameters
        kept = {name: weights[name].detach().clone() for name in self.average}
        self.keep(trainer)
        try:
            yield
        finally:
            self._put(trainer, kept)

    def keep(self, trainer: Trainer) -> None:
        """Put the average in the weights' place."""
        self._put(trainer, self.average)

    @staticmethod
    @torch.no_grad()
    def _put(trainer: Trainer, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            trainer.masters.parameters[name].copy_(value)
        trainer.masters.publish()

    def around(self, trainer: Trainer, work: Callable[..., T]) -> Callable[..., T]:
        """`work`, done by the average."""

        def averaged(*arguments: Any) -> T:
            with self.applied(trainer):
                return work(*arguments)

        return averaged

    def state_dict(self) -> dict[str, Any]:
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = {name: value.clone() for name, value in state.items()}
