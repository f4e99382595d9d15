"""Fast numbers for the products, exact numbers for the weights.

In bf16 the matrix products of a step run several times faster where the machine has instructions for it, but a
weight kept in bf16 (8 bits) stands still when its update is below 1/256 of it. So the model holds bf16 copies, and
the optimizer owns fp32 master weights (Micikevicius et al. 2017, arXiv 1710.03740): gradients are added up in fp32,
the step is taken in fp32, and the copies are refreshed. There is no autocast: what a tensor is, it is everywhere.

In fp32 the masters are the model's own parameters, and nothing is copied.

fp16 is for GPUs without bf16. It has three bits more of precision and far less of range: what is above 65504 is
infinite and what is below 6e-8 is zero, gradients too. So the loss is multiplied before the backward pass by a factor
that moves its gradients to where fp16 is good, and they are divided by it in fp32 (`LossScale`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.nn.native import accumulate_
from zero2hero.train.parallel import Ranks
from zero2hero.train.watch import Watcher


class MasterWeights:
    """The fp32 parameters that the optimizer owns, by name; the model computes in `dtype`."""

    divided = False  # each rank has the whole; otherwise see train/sharding.py

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.copies = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shared = dtype == torch.float32
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        if self.shared:
            self.parameters: dict[str, Tensor] = dict(self.copies)
            return
        self.parameters = {name: p.detach().float().clone() for name, p in self.copies.items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        masters = self.parameters.values()  # their gradients lie side by side, to be zeroed and sent as one
        self._flat = torch.zeros(sum(m.numel() for m in masters), device=next(iter(masters)).device)
        parts = self._flat.split([m.numel() for m in masters])
        for (name, copy), part in zip(self.copies.items(), parts):
            master = self.parameters[name]
            master.grad = part.view_as(master)
            copy.register_post_accumulate_grad_hook(lambda p, m=master: self._collect(p, m))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (a sum, fp32) to the masters'."""
        (loss * self.loss_scale.value if self.loss_scale else loss).backward()

    def _collect(self, copy: Tensor, master: Tensor) -> None:
        """Add a micro-batch's gradient to the master's, in fp32, as soon as it is complete."""
        assert copy.grad is not None
        assert master.grad is not None
        if self.loss_scale:
            master.grad.add_(copy.grad, alpha=1.0 / self.loss_scale.value)
        else:
            accumulate_(master.grad, copy.grad)
        copy.grad = None

    def overflowed(self, norm: float) -> bool:
        """Whether fp16 could not hold the step's gradients, whose norm is given; the next step has another scale."""
        return self.loss_scale is not None and self.loss_scale.overflowed(norm)

    def zero_grad(self) -> None:
        if not self.shared:
            self._flat.zero_()
            return
        for p in self.parameters.values():
            p.grad = None

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def sum_over(self, ranks: Ranks) -> None:
        """Add up the gradients of all ranks."""
        ranks.sum_(self.gradients if self.shared else [self._flat])

    def norm(self) -> float:
        """Of all gradients together."""
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.gradients))))

    def gathered(self) -> dict[str, Tensor]:
        """The whole weights by name."""
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def publish(self) -> None:
        """After a step: refresh the model's copies."""
        if not self.shared:
            torch._foreach_copy_(list(self.copies.values()), list(self.parameters.values()))


class LossScale(Watcher):
    """The factor of the loss in fp16, found by trying (Micikevicius et al. 2017, section 3.2, and NVIDIA's recipe).

    A step whose gradients overflow is skipped and the factor is halved; after `GROWTH_STEPS` steps without one it is
    doubled. Losses are sums over thousands of tokens, so a small factor to begin with is as much as 65536 for a mean.
    """

    name = "loss_scale"
    FIRST, SMALLEST, GROWTH_STEPS = 16.0, 2.0**-16, 200

    def __init__(self) -> None:
        self.value, self.good_steps = self.FIRST, 0

    def overflowed(self, norm: float) -> bool:
        """Whether a step whose gradients have this norm must be skipped; adapts the factor for the next one.

        Raises:
            UserError: the factor is next to nothing, so it is not the factor that makes the gradients overflow.
        """
        if math.isfinite(norm):
            self.good_steps += 1
            if self.good_steps == self.GROWTH_STEPS:
                self.value, self.good_steps = 2 * self.value, 0
            return False
        self.value, self.good_steps = self.value / 2, 0
        if self.value < self.SMALLEST:
            raise UserError(
                f"the gradients overflow fp16 even when the loss is multiplied by {2 * self.value:.0e}. "
                "Use --precision bf16 or fp32, or a smaller --train.learning_rate."
            )
        return True

    def metrics(self) -> dict[str, float]:
        return {"loss_scale": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
