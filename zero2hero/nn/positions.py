"""Where a token stands: learned, sinusoidal, rotary and relative positions.

Learned (GPT-2): a vector per position, added to the embedding. Sinusoidal (Vaswani et al. 2017, arXiv
1706.03762): the same from sines and cosines, nothing to learn. Rotary (Su et al. 2021, arXiv 2104.09864;
Llama, Qwen): rotate each pair of a query's and a key's features by an angle proportional to the position, so
that their product depends on the distance alone. Pairs are (i, i + K/2), the Hugging Face convention.
Relative (Raffel et al. 2019, T5, arXiv 1910.10683): each head adds a learned number to a score, by distance.

Angles are made in fp32: in bf16 position 257 would be rounded to 256. The tables are constants, made on the CPU even
when a model is laid out on the meta device to receive its weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2hero.errors import UserError
from zero2hero.nn import native
from zero2hero.nn.rope_scaling import frequencies


def sinusoidal_table(length: int, width: int) -> Tensor:
    """[length, width]: sines in the even columns, cosines in the odd ones."""
    position = torch.arange(length, dtype=torch.float32, device="cpu")[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32, device="cpu") * (-math.log(10_000.0) / width))
    table = torch.empty(length, width, device="cpu")
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency[: width // 2])
    return table


class Rotary(nn.Module):
    """Cosines and sines of the rotation angles: positions [B, T] -> (cos, sin), each [B, T, 1, K/2].

    The table is a constant made from `theta` and `scaling` (see rope_scaling.py) for the `length` of training; it
    grows when a longer position is asked for.
    """

    table: Tensor

    def __init__(self, head_dim: int, theta: float, length: int, scaling: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.head_dim, self.theta, self.trained, self.scaling = head_dim, theta, length, scaling
        self.dynamic = scaling is not None and scaling["rope_type"] == "dynamic"
        self.register_buffer("table", torch.empty(0, device="cpu"), persistent=False)
        self.grow(length)

    def grow(self, length: int) -> None:
        frequency, factor = frequencies(self.head_dim, self.theta, self.scaling, self.trained, length)
        angle = torch.arange(length, dtype=torch.float32, device="cpu")[:, None] * frequency
        table = torch.stack([angle.cos(), angle.sin()]).mul_(factor)  # [2, length, K/2]
        self.table = table.to(self.table.device)

    def forward(self, positions_BT: Tensor, dtype: torch.dtype, past: int = 0, end: int = 0) -> tuple[Tensor, Tensor]:
        """`past`: tokens that a cache holds already; `end`: the number of tokens with these.

        Raises:
            UserError: dynamic scaling, and the text grows past the trained length after some of it was cached.
        """
        size = self.table.shape[1]
        if self.dynamic and max(end, size) > self.trained:
            if past and end > self.trained:
                raise UserError(
                    f"with dynamic rotary scaling a text longer than {self.trained} tokens is read as a whole: "
                    "the keys in the cache were rotated for a shorter one"
                )
            self.grow(max(int(positions_BT.max()) + 1, self.trained))
        elif end > size:
            self.grow(max(end, int(positions_BT.max()) + 1))
        elif self.table.dtype != torch.float32:  # a model cast to bf16 keeps exact angles
            self.grow(size)
        cos, sin = self.table[:, positions_BT].to(dtype).unsqueeze(-2).unbind(0)
        return cos, sin


class _Rotate(torch.autograd.Function):
    """The rotation of every pair (x1, x2) of the first `turned` tensors; its gradient is the opposite rotation.

    The rest (values) are only laid out anew, as [B, H, T, K] in memory: what attention reads. Their gradients are
    written side by side, because they are parts of one projection's output.
    """

    @staticmethod
    def forward(ctx, turned: int, cos: Tensor, sin: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.turned = turned
        out = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in parts]
        for i, (x, y) in enumerate(zip(parts, out)):
            _rotate_into(y, x, cos, sin, 1.0 if i < turned else 0.0)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        B, T, _, K = grads[0].shape
        heads = [g.shape[2] for g in grads]
        out = grads[0].new_empty(B, T, sum(heads), K).split(heads, dim=2)
        for i, (grad, y) in enumerate(zip(grads, out)):
            _rotate_into(y, grad, cos, sin, -1.0 if i < ctx.turned else 0.0)
        return None, None, None, *out


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> None:
    if native.usable(x, cos, sin):
        native.rotate(x, cos, sin, direction, out)
    elif direction == 0.0:
        out.copy_(x)
    elif torch.compiler.is_compiling():  # which writes into no view
        x1, x2 = x.chunk(2, -1)
        out.copy_(torch.cat([x1 * cos - x2 * (sin * direction), x2 * cos + x1 * (sin * direction)], -1))
    else:
        (x1, x2), (out1, out2) = x.chunk(2, -1), out.chunk(2, -1)
        torch.mul(x1, cos, out=out1)
        out1.addcmul_(x2, sin, value=-direction)
        torch.mul(x2, cos, out=out2)
        out2.addcmul_(x1, sin, value=direction)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, T, H, K] by the angles of `Rotary`."""
    return _Rotate.apply(1, cos, sin, x_BTHK)[0]


def rotate_queries_and_keys(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotate q [B, T, H, K] and k [B, T, G, K]; v [B, T, G, K] only gets their layout. Same shapes out."""
    return _Rotate.apply(2, cos, sin, q, k, v)


def distance_buckets(distance: Tensor, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The number of the bucket for each distance, query position minus key position; any shape.

    The first half of the buckets are one distance wide; then they widen logarithmically, and the last has all from
    `max_distance` on. Without `causal` there is such a row of half as many for each direction.
    """
    first = torch.zeros_like(distance)
    if causal:
        distance = distance.clamp(min=0)
    else:
        num_buckets //= 2
        distance, first = distance.abs(), (distance < 0) * num_buckets
    exact = num_buckets // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (share * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, wide)


class RelativeBias(nn.Module):
    """What each head adds to a score by the distance of query and key: one table for all layers of a stack."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_buckets, num_heads))
        self.max_distance, self.causal = max_distance, causal

    def forward(self, query_positions_T: Tensor, key_positions_S: Tensor) -> Tensor:
        """[1, H, T, S]."""
        distance = query_positions_T[:, None] - key_positions_S
        buckets = distance_buckets(distance, len(self.weight), self.max_distance, self.causal)
        return nn.functional.embedding(buckets, self.weight).permute(2, 0, 1)[None]
