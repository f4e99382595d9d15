"""LoRA: a large matrix stays as it is, and a small product beside it learns.

LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + s B A x, where A [r, in] and B [out, r] have a rank r of a few. The
gradient of W, its moments and its fp32 copy are not needed, and what was learned is a file of a few megabytes. B begins
as zero, so the first step starts from the base model itself. s = alpha / r; rsLoRA (Kalajdzievski 2023, arXiv
2312.03732) takes alpha / sqrt(r), under which high ranks learn as fast as low ones.

DoRA (Liu et al. 2024, arXiv 2402.09353): y = m (W + s B A) x / |W + s B A|, row by row: the length m [out] of each
row is learned apart from its direction. The norm counts as a constant in the gradient (section 4.3).

An adapter wraps any module that has `in_features`, `out_features` and a forward, a quantized one too. Projections of
one input are computed together (see nn/linear.py), their low-rank parts as well: of q, k and v, the three A stacked are
one matrix, and the three B one with blocks on its diagonal.

Shapes: N tokens, I in, O out, R the ranks together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2hero.nn.linear import joint_linear, side_by_side, stacked
from zero2hero.tune.config import LoraConfig


class LowRank(nn.Module):
    """One adapter of one matrix [out, in]: the update s B A, and for DoRA the rows' lengths. Kept in fp32."""

    def __init__(self, out_features: int, in_features: int, rank: int, alpha: float, config: LoraConfig) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.rank, self.alpha, self.config = rank, alpha, config
        self.scale = config.scale(rank, alpha)
        if config.use_dora:
            self.magnitude = nn.Parameter(torch.ones(out_features))

    @torch.no_grad()
    def reset(self, first: Tensor, second: Tensor, generator: torch.Generator) -> None:
        """Draw `first` at random and leave `second`, its partner, zero: the update is zero, but has a gradient."""
        kind, rank = self.config.init_lora_weights, self.rank
        for matrix in (first,) if kind else (first, second):
            if kind == "gaussian":
                values = torch.empty(matrix.shape).normal_(0, 1 / rank, generator=generator)
            else:  # what torch gives a linear layer
                bound = 1 / math.sqrt(matrix.shape[1])
                values = torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator)
            matrix.copy_(values)

    def update(self) -> Tensor:
        """s B A [out, in]."""
        return self.scale * (self.B @ self.A)

    def gain(self, weight: Tensor) -> Tensor:
        """DoRA's factor of each row [out, 1], for the base's weights."""
        with torch.no_grad():
            length = torch.linalg.vector_norm(weight.to(self.B.dtype) + self.update(), dim=1)
        return (self.magnitude / length)[:, None]

    def applied_to(self, weight: Tensor) -> Tensor:
        """The matrix that base and adapter are together, [out, in], in the adapter's precision."""
        whole = weight.to(self.B.dtype) + self.update()
        return self.gain(weight) * whole if self.config.use_dora else whole

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:.3g}"


def full_weight(module: Any) -> Tensor:
    """The weights of a linear module as numbers, [out, in]; those of a quantized one are made for the moment."""
    return module.dequantize() if hasattr(module, "dequantize") else module.weight


class Adapted(nn.Module):
    """A module and its adapters by name. At most one is active; None, or a name it does not have: the base alone."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    @property
    def current(self) -> Any:
        """The adapter that is active, or None."""
        here = self.active is not None and self.active in self.adapters
        return self.adapters[self.active] if here else None  # type: ignore[index]


class LoraLinear(Adapted):
    """A linear module with adapters: x [..., in] -> [..., out]."""

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features

    def add(self, name: str, rank: int, alpha: float, config: LoraConfig, generator: torch.Generator) -> None:
        adapter = LowRank(self.out_features, self.in_features, rank, alpha, config)
        adapter.reset(adapter.A, adapter.B, generator)
        weight = full_weight(self.base).detach()
        adapter.to(weight.device)
        if config.use_dora:
            with torch.no_grad():
                adapter.magnitude.copy_(torch.linalg.vector_norm(weight.float() + adapter.update(), dim=1))
        self.adapters[name] = adapter

    @property
    def weight(self) -> Tensor:
        """Of base and active adapter together; the loss takes it where the head is adapted."""
        weight = full_weight(self.base)
        return weight if self.current is None else self.current.applied_to(weight).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        bias: Any = self.base.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        return self.jointly(x, [self])[0]

    @staticmethod
    def jointly(x: Tensor, projections: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Several projections of one input, some of them adapted (see `joint_linear`, which calls this)."""
        bases: list[Any] = [p.base if isinstance(p, LoraLinear) else p for p in projections]
        adapters = [p.current if isinstance(p, LoraLinear) else None for p in projections]
        if not any(a is not None for a in adapters):
            return joint_linear(x, *bases)
        together = all(type(b) is nn.Linear and not b.weight.requires_grad for b in bases)
        together &= len({b.bias is None for b in bases}) == 1 and not torch.compiler.is_compiling()
        together &= not any(a.training and a.config.lora_dropout for a in adapters if a is not None)
        if together:
            return _together(x, bases, adapters)
        return tuple(base(x) if a is None else _adapted(x, base, a) for base, a in zip(bases, adapters))


def _adapted(x: Tensor, base: Any, a: LowRank) -> Tensor:
    """y = W x + b + s B A x; with DoRA y = g (W x + s B A x) + b. The definition, for any base module."""
    dropped = F.dropout(x, a.config.lora_dropout, a.training)
    low_rank = F.linear(F.linear(dropped, a.A.to(x.dtype)), a.B.to(x.dtype)) * a.scale
    y = base(x)
    if not a.config.use_dora:
        return y + low_rank
    bias = 0.0 if base.bias is None else base.bias
    return a.gain(full_weight(base))[:, 0].to(x.dtype) * (y - bias + low_rank) + bias


def _together(x: Tensor, bases: list[Any], adapters: list[LowRank | None]) -> tuple[Tensor, ...]:
    """The same for frozen linear modules without dropout: two products forward, and two for the input's gradient."""
    A = torch.cat([a.A for a in adapters if a is not None]).to(x.dtype)
    B = torch.block_diag(*(b.weight.new_empty(b.out_features, 0) if a is None else a.scale * a.B
                           for a, b in zip(adapters, bases))).to(x.dtype)  # fmt: skip
    dora = any(a is not None and a.config.use_dora for a in adapters)
    biases = [] if dora or bases[0].bias is None else [base.bias for base in bases]
    ys = _JointLora.apply(x, A, B, stacked(biases) if biases else None, *(base.weight for base in bases))
    if not dora:
        return ys
    gains = [None if a is None else a.gain(b.weight)[:, 0].to(x.dtype) for a, b in zip(adapters, bases)]
    ys = tuple(y if gain is None else gain * y for y, gain in zip(ys, gains))
    return ys if bases[0].bias is None else tuple(y + base.bias for y, base in zip(ys, bases))


class _JointLora(torch.autograd.Function):
    """y = x W^T + (x A^T) B^T + bias for stacked frozen weights W; A [R, I], B [O, R]. The y_i are y's columns.

    With dy the gradients side by side and u = dy B: dx = dy W + u A, dA = u^T x, dB = dy^T (x A^T).
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        z = rows @ A.t()
        y = F.linear(rows, stacked(weights), bias).addmm_(z, B.t())
        ctx.save_for_backward(x, z, A, B, *weights)
        return y.view(*x.shape[:-1], -1).split([len(w) for w in weights], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, z, A, B, *weights = ctx.saved_tensors
        grad, rows = side_by_side(grads).flatten(0, -2), x.flatten(0, -2)
        u = grad @ B
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ stacked(weights)).addmm_(u, A).view_as(x)
        return grad_x, u.t() @ rows, (z.t() @ grad).t(), None, *(None for _ in weights)


class LoraEmbedding(Adapted):
    """An embedding with adapters: ids -> [..., D]. Its matrix is [V, D], the update (s B A)^T: A [r, V], B [D, r]."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base)
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim

    def add(self, name: str, rank: int, alpha: float, config: LoraConfig, generator: torch.Generator) -> None:
        adapter = LowRank(self.out_features, self.in_features, rank, alpha, config)
        adapter.reset(adapter.B, adapter.A, generator)
        weight: Any = self.base.weight
        self.adapters[name] = adapter.to(weight.device)

    @property
    def weight(self) -> Tensor:
        """Of base and active adapter together."""
        weight: Any = self.base.weight
        return weight if self.current is None else weight + self.current.update().t().to(weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x, a = self.base(ids), self.current
        if a is None:
            return x
        return x + F.linear(F.embedding(ids, a.A.t().to(x.dtype)), a.B.to(x.dtype)) * a.scale
