"""Muon's step by native/muon.c, where the processor has products in bf16 (AVX-512): whole matrices, each in one core's
cache, and of every symmetric product only half. The same update as train/muon.py's, within the rounding of bf16.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from zero2hero.nn import native

Job = tuple[Tensor, Tensor, float, float]  # weight, momentum, keep, rate: weight = keep weight - rate update


def usable(params: Sequence[Tensor]) -> bool:
    """Whether native/muon.c can take these matrices: whole, fp32, on the CPU, sides of 16 n, enough for all threads."""
    return len(params) >= torch.get_num_threads() and all(map(_suits, params)) and _library() is not None


def _suits(p: Tensor) -> bool:
    assert p.grad is not None
    plain = all(t.is_contiguous() and native.usable(t) for t in (p, p.grad))
    return plain and p.dtype == torch.float32 and p.shape[0] % 16 == 0 == p.shape[1] % 16


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.kernels("muon")
    return library if library is not None and library.muon_usable() else None


def step(jobs: Sequence[Job], polynomials: Sequence[Sequence[float]], momentum: float, nesterov: bool) -> None:
    """Momentum, orthogonalization and update of every weight, which has a gradient.

    Raises:
        MemoryError: no room for a matrix's intermediate results.
    """
    jobs = sorted(jobs, key=lambda job: -job[0].numel())  # the last to be taken are small, so no thread waits for long
    weights, old, keeps, rates = zip(*jobs)

    def array(kind, values):
        return (kind * len(values))(*values)

    def addresses(tensors):
        return array(ctypes.c_void_p, [t.data_ptr() for t in tensors])

    failed = _library().muon_step(  # type: ignore[union-attr]
        addresses(weights), addresses(old), addresses([w.grad for w in weights]),
        array(ctypes.c_int64, [side for w in weights for side in w.shape]),
        array(ctypes.c_float, keeps), array(ctypes.c_float, rates), ctypes.c_int64(len(jobs)),
        array(ctypes.c_float, [k for abc in polynomials for k in abc]), ctypes.c_int64(len(polynomials)),
        ctypes.c_float(momentum), ctypes.c_int64(nesterov), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the optimizer's step")
