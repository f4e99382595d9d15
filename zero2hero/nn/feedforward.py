"""The feed-forward half of a Transformer block: it works on each position alone.

Plain (GPT-2, BERT): `down(act(up(x)))`. ReLU² (So et al. 2021, "Primer", arXiv 2109.08668) is the plain form
with a squared ReLU: cheap, sparse, and what the fastest small-model recipes use. Gated (Shazeer 2020,
arXiv 2002.05202; Llama, Qwen, Gemma): `down(act(gate(x)) * up(x))`, SwiGLU when the activation is SiLU, GeGLU when it
is GELU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2hero.nn import native
from zero2hero.nn.linear import joint_linear, linear


class _ReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.relu2(x) if native.usable(x) else F.relu(x).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return native.relu2_backward(x, grad) if native.usable(x, grad) else F.relu(x).mul_(grad).mul_(2.0)


def relu2(x: Tensor) -> Tensor:
    """`max(x, 0)²`."""
    return _ReLU2.apply(x)


def gelu_new(x: Tensor) -> Tensor:
    """GELU in GPT-2's tanh approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """GELU in CLIP's approximation by one sigmoid (the same paper)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": relu2,
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": gelu_new,
}  # the gated forms, and what is done to the gate


class _SiluProduct(torch.autograd.Function):
    """`silu(gate) * up`, keeping only its two inputs; the backward pass makes `silu(gate)` again.

    Autograd would also keep `silu(gate)`: a third [tokens, F] tensor in every layer.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if native.usable(gate, up):
            return native.silu_product(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        if native.usable(gate, up, grad):
            return native.silu_product_backward(gate, up, grad)
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class FeedForward(nn.Module):
    """`kind`: an activation's name for the plain form, or `"swiglu"` or `"geglu"` for the gated ones.

    x [..., D] -> [..., D], through width F.
    """

    def __init__(self, width: int, inner: int, kind: str, bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        if kind in GATES:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in GATES:
            gate, up = joint_linear(x, self.gate_proj, self.up_proj)
            product = _SiluProduct.apply(gate, up) if self.kind == "swiglu" else GATES[self.kind](gate) * up
            return linear(product, self.down_proj)
        return linear(ACTIVATIONS[self.kind](linear(x, self.up_proj)), self.down_proj)
