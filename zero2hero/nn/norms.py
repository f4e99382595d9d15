"""Normalization: keep activations at a steady scale so that deep stacks train.

LayerNorm (Ba et al. 2016, arXiv 1607.06450) subtracts the mean and divides by the standard deviation.
RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) drops the mean and the bias: one pass less, equally good,
and what Llama, Qwen and Gemma use. Statistics are computed in fp32 whatever the activations' precision,
because a bf16 mean of squares keeps only 8 bits.

RMSNorm's gradient is written out: autograd would go back through every cast and product one by one, in some twenty
passes over memory instead of eight (or two, in a native kernel).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2hero.nn import native


class _RMSNorm(torch.autograd.Function):
    """y = w x̂ with x̂ = x r and r = 1 / sqrt(mean(x²) + eps).

    With h = w dy, the chain rule gives dx = r (h - x̂ mean(h x̂)), and dw is the sum of dy x̂ over all rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if native.usable(x, weight):
            y, scale = native.rms_norm(x, weight, eps)
        else:
            squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
            scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
            y = (x * scale.to(x.dtype)).mul_(weight)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        if native.usable(x, weight, grad):
            return *native.rms_norm_backward(x, weight, scale, grad), None
        normalized = x * scale.to(x.dtype)
        product = grad * normalized
        grad_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (product @ weight)[..., None] / weight.numel()
        grad_x = (grad * weight).addcmul_(normalized, mean.to(grad.dtype), value=-1.0)
        return grad_x.mul_(scale.to(grad.dtype)), grad_weight, None


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension; the input's shape and dtype."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class OffsetRMSNorm(RMSNorm):
    """RMSNorm by 1 + weight, in fp32 throughout (Gemma): weight decay then pulls the scale towards one, not zero."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x.float(), 1.0 + self.weight.float(), self.eps).type_as(x)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": RMSNorm,
    "rmsnorm_offset": OffsetRMSNorm,
    "layernorm": nn.LayerNorm,
}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """One of `NORMS`, as a configuration names it."""
    return NORMS[kind](width, eps=eps)
