"""AdamW whose two moments take one byte per weight each instead of four (Dettmers et al. 2021, arXiv 2110.02861).

The bytes are those of nn/dynamic_code.py. In every step a tensor's moments are decoded, updated in fp32, and encoded
again: at any time one tensor's are in fp32, not all. Small tensors keep fp32 moments, as do embeddings (see
train/optim.py): their rows' gradients differ most, and they are where the paper found 8 bits to be unstable.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zero2hero.nn.dynamic_code import decode, encode

SMALLEST = 4096  # weights; below this a tensor's moments stay in fp32
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in 8 bits: the states of a tensor are its codes and their scales."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})

    def _update(self, p: Tensor, grad: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        state = self.state[p]
        step = state["step"] = float(state.get("step", 0)) + 1
        beta1, beta2 = betas
        mean, square = (self._moment(p, name) for name in MOMENTS)
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.mul_(1 - lr * weight_decay)
        size = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
        p.addcdiv_(mean, size, value=-lr / (1 - beta1**step))
        if p.numel() >= SMALLEST:
            for (name, signed), value in zip(MOMENTS.items(), (mean, square)):
                state[name], state[f"{name}_scale"] = encode(value, signed)

    def _moment(self, p: Tensor, name: str) -> Tensor:
        """A moment in fp32: its memory where it is kept so, a decoded copy otherwise, zeros at first."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        codes = state[name]
        return codes if codes.dtype == torch.float32 else decode(codes, state[f"{name}_scale"], MOMENTS[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch turns loaded states into the parameter's dtype; codes become bytes again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                if f"{name}_scale" in state:
                    state[name] = state[name].to(torch.uint8)
