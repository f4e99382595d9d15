"""The feed-forward half of a Transformer block: it works on each position alone.

Plain (GPT-2, BERT): `down(act(up(x)))`. ReLU² (So et al. 2021, "Primer", arXiv 2109.08668) is the plain form
with a squared ReLU: cheap, sparse, and what the fastest small-model recipes use. Gated (Shazeer 2020,
arXiv 2002.05202; Llama, Qwen): `down(act(gate(x)) * up(x))`, SwiGLU when the activation is SiLU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.nn.linear import joint_linear


def relu2(x: Tensor) -> Tensor:
    """`max(x, 0)²`."""
    return F.relu(x).square()


def gelu_new(x: Tensor) -> Tensor:
    """GELU in GPT-2's tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": relu2,
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "silu": F.silu,
}


class _SiluProduct(torch.autograd.Function):
    """`silu(gate) * up`, keeping only its two inputs; the backward pass makes `silu(gate)` again.

    Autograd would also keep `silu(gate)`: a third [tokens, F] tensor in every layer.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class FeedForward(nn.Module):
    """`kind`: an activation's name for the plain form, or `"swiglu"` for the gated one.

    x [..., D] -> [..., D], through width F.
    """

    def __init__(self, width: int, inner: int, kind: str, bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        if kind == "swiglu":
            self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate, up = joint_linear(x, self.gate_proj, self.up_proj)
            return self.down_proj(_SiluProduct.apply(gate, up))
        return self.down_proj(ACTIVATIONS[self.kind](self.up_proj(x)))
