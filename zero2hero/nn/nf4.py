"""NF4: weights in four bits each, at the values that a Gaussian makes equally likely.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314). Trained weights are nearly Gaussian, so 16 equally spaced values would
leave the outer ones unused. NF4's are quantiles of the normal distribution, scaled to [-1, 1] and with an exact zero.
Each block of 64 weights is divided by its largest, which is kept beside the codes, in fp32 at first: 4.5 bits a weight.
Double quantization (section 3) keeps these in 8 bits, less their mean, in blocks of 256: 4.127 bits.

Codes and scales are bitsandbytes', bit for bit. What makes the weights again is a kernel of native/fused.c on a CPU,
and on a GPU bitsandbytes' where it is installed, or else the definition below, compiled. Its kernel for CPUs is about
as fast as ours (bench/qlora.py), but goes wrong where a row does not hold whole blocks (version 0.50).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.nn import native
from zero2hero.nn.dynamic_code import decode, encode

BLOCK = 64  # weights that share a scale
PIECE = 1 << 20  # weights at a time, so that what is in between stays small


class NF4(NamedTuple):
    """A tensor of `shape` in four bits: n weights, row after row, in n / 64 blocks.

    codes: uint8 [n / 2], two to a byte, the first one in the high half.
    absmax: each block's largest magnitude; fp32, or with double quantization its code, uint8.
    nested_absmax: fp32, of each 256 blocks; None without double quantization.
    offset: fp32, a scalar: the mean of the magnitudes, which the codes leave out; or None.
    """

    shape: tuple[int, ...]
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    @property
    def scales(self) -> Tensor:
        """Each block's largest magnitude in fp32."""
        if self.nested_absmax is None:
            return self.absmax
        assert self.offset is not None
        return decode(self.absmax, self.nested_absmax, signed=True) + self.offset


@functools.cache
def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values, ascending: eight positive quantiles, seven negative ones, and zero (section 3 and appendix E).

    The outermost quantile is half way between those of 1/30 and 1/32 from the ends.
    """
    outermost = 0.9677083
    positive, negative = (torch.linspace(outermost, 0.5, count + 1)[:-1].tolist() for count in (8, 7))
    quantile = NormalDist().inv_cdf
    values = [*map(quantile, positive), 0.0, *(-quantile(p) for p in negative)]
    return (torch.tensor(sorted(values)) / max(values)).to(device)


def quantize(weight: Tensor, double_quant: bool = True) -> NF4:
    """A tensor of floating-point numbers in NF4. Each weight becomes the nearest of 16 values times its block's scale.

    Raises:
        UserError: a number that is not finite.
    """
    flat, parts = weight.detach().flatten(), []
    code = nf4_code(weight.device)
    bounds = (code[:-1] + code[1:]) / 2
    for piece in flat.split(PIECE):
        blocks = F.pad(piece.float(), (0, -len(piece) % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        parts.append((_codes(blocks, 1.0 / absmax.clamp(min=1e-38), bounds), absmax))
    codes, absmax = (torch.cat(each) for each in zip(*parts))
    codes = codes.view(-1)[: (len(flat) + 1) // 2]
    if not absmax.isfinite().all():
        raise UserError("weights that are not finite cannot be quantized")
    if not double_quant:
        return NF4(tuple(weight.shape), codes, absmax)
    offset = absmax.mean()
    return NF4(tuple(weight.shape), codes, *encode(absmax - offset, signed=True), offset)


def _codes(blocks: Tensor, reciprocals: Tensor, bounds: Tensor) -> Tensor:
    """fp32 [blocks, 64] -> uint8 [blocks, 32]."""
    if native.usable(blocks):
        return native.nf4_encode(blocks, reciprocals, bounds)
    codes = torch.bucketize(blocks * reciprocals[:, None], bounds, out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2]


def dequantize(w: NF4, dtype: torch.dtype, borrowed: bool = False) -> Tensor:
    """The weights that the codes stand for, of their shape.

    `borrowed`: for one product at once; on a CPU the next call of this thread writes into the same memory. Memory that
    is asked for anew costs the system about as much as the decoding.
    """
    if torch.compiler.is_compiling():
        return _dequantize_when_compiled(w.codes, w.absmax, w.nested_absmax, w.offset, list(w.shape), dtype)
    scales, code = w.scales, nf4_code(w.codes.device)
    if native.usable(scales) and dtype in (torch.float32, torch.bfloat16):
        out = _scratch(math.prod(w.shape), dtype).view(w.shape) if borrowed else torch.empty(w.shape, dtype=dtype)
        return native.nf4_decode(w.codes, scales, code, out)
    if w.codes.is_cuda and (kernel := _bitsandbytes()):
        return kernel(w.codes, scales, BLOCK, "nf4", w.shape, dtype)
    make = _compiled() if w.codes.is_cuda else _weights
    return make(w.codes, scales, code, dtype)[: math.prod(w.shape)].view(w.shape)


_of_thread = threading.local()


def _scratch(count: int, dtype: torch.dtype) -> Tensor:
    """This thread's memory for so many numbers: as much as its largest matrix has needed."""
    kept = getattr(_of_thread, "kept", None)
    if kept is None or kept.dtype != dtype or len(kept) < count:
        _of_thread.kept = kept = torch.empty(count, dtype=dtype)
    return kept[:count]


@torch.library.custom_op("zero2hero::dequantize_nf4", mutates_args=())
def _dequantize_when_compiled(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, shape: list[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same as one operator, which a model that is compiled calls and does not look into."""
    return dequantize(NF4(tuple(shape), codes, absmax, nested_absmax, offset), dtype)


@_dequantize_when_compiled.register_fake
def _(codes, absmax, nested_absmax, offset, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


def _weights(codes: Tensor, scales: Tensor, code: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: 64 weights for each block, whole or not."""
    pairs = torch.cartesian_prod(code, code)  # what a byte stands for
    bytes_ = F.pad(codes, (0, -len(codes) % (BLOCK // 2)))
    return (pairs[bytes_.int()].view(-1, BLOCK) * scales[:, None]).to(dtype).view(-1)


@functools.cache
def _bitsandbytes() -> Callable[..., Tensor] | None:
    """bitsandbytes' operator (codes, scales, block size, kind, shape, dtype) -> weights, where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes.dequantize_4bit.default


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One kernel of it, for all shapes."""
    return torch.compile(_weights, dynamic=True)
