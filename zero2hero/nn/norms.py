"""Normalization: keep activations at a steady scale so that deep stacks train.

LayerNorm (Ba et al. 2016, arXiv 1607.06450) subtracts the mean and divides by the standard deviation.
RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) drops the mean and the bias: one pass less, equally good,
and what Llama, Qwen and Gemma use. Statistics are computed in fp32 whatever the activations' precision,
because a bf16 mean of squares keeps only 8 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension; the input's shape and dtype."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """`"rmsnorm"` or `"layernorm"`, as a configuration names it."""
    return RMSNorm(width, eps) if kind == "rmsnorm" else nn.LayerNorm(width, eps=eps)
