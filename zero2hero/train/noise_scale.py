"""How large a batch pays: the gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162).

The gradient of B tokens is the true gradient G plus noise, whose squared length falls as 1/B:

    E |G_B|^2 = |G|^2 + S / B

Two batch sizes give two equations, hence |G|^2 and S (their appendix A.1). A step has both sizes at hand when it adds
up several micro-batches: the first one alone, and all of them. Their ratio S / |G|^2 is a number of tokens. Far below
it, doubling the batch nearly halves the steps that are needed; far above it, it hardly saves any. Both estimates are
noisy, so each is averaged over many steps before they are divided; the scale grows while the loss falls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zero2hero.train.watch import Watcher

if TYPE_CHECKING:
    from zero2hero.train.loop import Trainer

MEMORY = 0.98  # of the running means: about fifty steps


class NoiseScale(Watcher):
    """Logs `gradient_noise_scale`, in tokens with a target. Needs several micro-batches a step, and whole gradients."""

    name = "noise_scale"

    def __init__(self) -> None:
        self.signal, self.noise = 0.0, 0.0  # running means of |G|^2 and S; both begin at 0, so their ratio is unbiased
        self._first_weight, self._first_norm = 0.0, 0.0

    def after_micro_batch(self, trainer: Trainer, index: int, weight: float) -> None:
        several = trainer.config.gradient_accumulation_steps * trainer.ranks.data_size > 1
        if index == 0 and several and not trainer.masters.divided:
            norms = torch.stack(torch._foreach_norm(trainer.masters.gradients))
            self._first_weight, self._first_norm = weight, float(torch.linalg.vector_norm(norms))

    def before_update(self, trainer: Trainer) -> None:
        small, big = self._first_weight, trainer.step_weight
        if not 0 < small < big:
            return
        small_square, big_square = (self._first_norm / small) ** 2, trainer.metrics["grad_norm"] ** 2
        signal = (big * big_square - small * small_square) / (big - small)
        noise = (small_square - big_square) / (1 / small - 1 / big)
        self.signal = MEMORY * self.signal + (1 - MEMORY) * signal
        self.noise = MEMORY * self.noise + (1 - MEMORY) * noise

    def metrics(self) -> dict[str, float]:
        """Nothing while chance has one of the estimates below zero."""
        positive = self.signal > 0 and self.noise > 0
        return {"gradient_noise_scale": self.noise / self.signal} if positive else {}

    def state_dict(self) -> dict[str, Any]:
        return {"signal": self.signal, "noise": self.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.signal, self.noise = float(state["signal"]), float(state["noise"])
