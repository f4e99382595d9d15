"""Fast numbers for the products, exact numbers for the weights.

In bf16 the matrix products of a step run several times faster where the machine has instructions for it, but a
weight kept in bf16 (8 bits) stands still when its update is below 1/256 of it. So the model holds bf16 copies, and
the optimizer owns fp32 master weights (Micikevicius et al. 2017, arXiv 1710.03740): gradients are added up in fp32,
the step is taken in fp32, and the copies are refreshed. There is no autocast: what a tensor is, it is everywhere.

In fp32 the masters are the model's own parameters, and nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zero2hero.nn.native import accumulate_


class MasterWeights:
    """The fp32 parameters that the optimizer owns, by name; the model computes in `dtype`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.copies = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shared = dtype == torch.float32
        if self.shared:
            self.parameters: dict[str, Tensor] = dict(self.copies)
            return
        self.parameters = {name: p.detach().float().clone() for name, p in self.copies.items()}
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        for name, copy in self.copies.items():
            master = self.parameters[name]
            master.grad = torch.zeros_like(master)
            copy.register_post_accumulate_grad_hook(lambda p, m=master: self._collect(p, m))

    @staticmethod
    def _collect(copy: Tensor, master: Tensor) -> None:
        """Add a micro-batch's gradient to the master's, in fp32, as soon as it is complete."""
        assert copy.grad is not None
        assert master.grad is not None
        accumulate_(master.grad, copy.grad)
        copy.grad = None

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            if self.shared:
                p.grad = None
            else:
                p.grad.zero_()  # type: ignore[union-attr]

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """After a step: refresh the model's copies."""
        if not self.shared:
            torch._foreach_copy_(list(self.copies.values()), list(self.parameters.values()))
