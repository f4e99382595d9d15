"""Numbers as bytes: the dynamic code of 8-bit optimizers (Dettmers et al. 2021, arXiv 2110.02861).

What a tensor of moments or of scales holds is spread over many powers of ten, so 256 equally spaced values would lose
the small ones. The dynamic code spaces them like floating point: in [0.1, 1] finely, in [0.01, 0.1] half as finely, and
so on over seven powers of ten. Each block of 256 numbers is divided by its largest entry first, so one outlier costs
its own block only.

Codes and scales are bitsandbytes', bit for bit.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers that share a scale


@functools.cache
def dynamic_code(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of a byte, ascending: 0, 1 and the middles of equal parts of [0.1, 1] x 10^-6, ..., 10^0.

    The number of parts doubles with each power of ten, from 1 (signed) or 2.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent * (1 if signed else 2) + 1)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.to(device)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """fp32 values of any shape -> (bytes of that shape, fp32 scale of each block of 256 in order).

    Each value becomes the nearest of scale * dynamic_code; `signed=False` is for values that are never negative.
    """
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    code = dynamic_code(signed, values.device)
    shares = blocks * (1.0 / scales.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(shares, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(flat)].view(values.shape), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """What `encode` kept of the values."""
    values = dynamic_code(signed, codes.device)[codes.flatten().int()]
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) * scales[:, None]
    return blocks.view(-1)[: len(values)].view(codes.shape)
