"""AdamW whose two moments take one byte per weight each instead of four (Dettmers et al. 2021, arXiv 2110.02861).

Moments spread over many powers of ten, so 256 equally spaced values would lose the small ones. The dynamic code spaces
them like floating point: in [0.1, 1] finely, in [0.01, 0.1] half as finely, and so on over seven powers of ten. Each
block of 256 weights is divided by its largest entry first, so one outlier costs its own block only. In every step a
tensor's moments are decoded, updated in fp32, and encoded again: at any time one tensor's are in fp32, not all.

Codes and scales are bitsandbytes', bit for bit. Small tensors keep fp32 moments, as do embeddings (see train/optim.py):
their rows' gradients differ most, and they are where the paper found 8 bits to be unstable.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # weights that share a scale
SMALLEST = 4096  # weights; below this a tensor's moments stay in fp32
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign


@functools.cache
def dynamic_code(signed: bool) -> Tensor:
    """The 256 values of a byte, ascending: 0, 1 and the middles of equal parts of [0.1, 1] x 10^-6, ..., 10^0.

    The number of parts doubles with each power of ten, from 1 (signed) or 2.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent * (1 if signed else 2) + 1)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 values of any shape -> (bytes of that shape, fp32 scale of each block of 256 in order).

    Each value becomes the nearest of scale * dynamic_code; `signed=False` is for values that are never negative.
    """
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    code = dynamic_code(signed).to(values.device)
    shares = blocks * (1.0 / scales.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(shares, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(flat)].view(values.shape), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """What `encode` kept of the values."""
    values = dynamic_code(signed).to(codes.device)[codes.flatten().int()]
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) * scales[:, None]
    return blocks.view(-1)[: len(values)].view(codes.shape)


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
