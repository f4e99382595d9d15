"""Several projections of one input as one matrix product, and a gradient of the weights made the fast way.

Query, key and value (or gate and up) all read the same activations. One product with the stacked weights
reads them once, and its backward pass makes the input's gradient in one product instead of three products
and two sums. The modules stay separate, so adapters, checkpoints and readers see `q_proj`, `k_proj`, `v_proj`;
a projection that is no longer a plain `nn.Linear` (quantized, say) simply runs alone, or brings a function `jointly`
of its own (LoRA).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _JointLinear(torch.autograd.Function):
    """y_i = x W_i^T + b_i for each i; the y_i are columns of one tensor. arguments: weights, then biases (or none).

    With W the stacked weights and dy the gradients side by side: dx = dy W, dW = dy^T x, db = the sum of dy's rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        weight, bias = stacked(weights), stacked(biases) if biases else None
        ctx.save_for_backward(x, *weights)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias).split([len(w) for w in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        sizes, count = [len(w) for w in weights], len(weights)
        needs_weights, needs_biases = any(ctx.needs_input_grad[2 : 2 + count]), any(ctx.needs_input_grad[2 + count :])
        grad = side_by_side(grads)
        rows = grad.flatten(0, -2)
        grad_x = grad @ stacked(weights) if ctx.needs_input_grad[0] else None
        grad_weights = weight_gradient(rows, x.flatten(0, -2)).split(sizes) if needs_weights else [None] * count
        none = [None] * (count if ctx.has_bias else 0)
        return grad_x, None, *grad_weights, *(rows.sum(0).split(sizes) if needs_biases else none)


def weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """grad^T x [O, I], the gradient of a linear map's weights.

    A CPU's bf16 product reads the rows of its first factor: a transposed one is laid out anew inside, several times.
    The smaller factor is the better one to have transposed, so unless they are equal, make the result's transpose.
    """
    O, I = grad_NO.shape[1], x_NI.shape[1]
    if grad_NO.device.type != "cpu" or grad_NO.dtype != torch.bfloat16 or O == I or len(grad_NO) < 1024:
        return grad_NO.t() @ x_NI
    transposed = x_NI.t().contiguous() if O > I else x_NI.t()
    return (transposed @ grad_NO).t().contiguous()


def stacked(tensors) -> Tensor:
    """Along the first dimension; not copied when there is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def side_by_side(parts: tuple[Tensor, ...]) -> Tensor:
    """The concatenation along the last dimension; not copied when the parts already are the columns of one tensor."""
    first, width = parts[0], sum(p.shape[-1] for p in parts)
    strides = [width] * (first.dim() - 1) + [1]
    for i in reversed(range(first.dim() - 2)):
        strides[i] = strides[i + 1] * first.shape[i + 1]
    offset = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != offset or list(part.stride()) != strides:
            return torch.cat(parts, dim=-1)
        offset += part.shape[-1]
    return first.as_strided((*first.shape[:-1], width), strides)


def joint_linear(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...]:
    """Apply each projection to `x` [..., D]; the results equal calling them one after another."""
    jointly: Any = next((p.jointly for p in projections if hasattr(p, "jointly")), None)
    if jointly is not None:
        return jointly(x, projections)
    biases = [getattr(p, "bias", None) for p in projections]
    some = [b for b in biases if b is not None]
    plain = not torch.compiler.is_compiling()  # which joins products by itself, and cannot follow storage
    plain &= all(type(p) is nn.Linear and not p._forward_hooks and not p._forward_pre_hooks for p in projections)
    if not plain or len(some) not in (0, len(biases)):
        return tuple(p(x) for p in projections)
    return _JointLinear.apply(x, len(projections), *(p.weight for p in projections), *some)


def linear(x: Tensor, projection: nn.Module) -> Tensor:
    """`projection(x)`, a plain nn.Linear's gradient made as above."""
    return joint_linear(x, projection)[0]
