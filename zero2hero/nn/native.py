"""The kernels of native/fused.c, where they can be had: on a CPU, in fp32 and bf16, with a C compiler at hand.

Each function here stands for a few tensor operations, which stay beside every call as the definition and for all other
devices: `if native.usable(x): ... else: ...`. The library is compiled at its first use and kept in the cache folder.
ZERO2HERO_NATIVE=0 does without it.

The kernels' threads are torch's own. torch brings an OpenMP library; a second one in the process would have threads of
its own that fight for the same cores. So the kernels are linked to none and find torch's, made visible first.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from zero2hero.machine import native_library

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp")
_SMALL = 1 << 14  # numbers; below this, waking a second thread costs more than it brings


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors, which must share one dtype."""
    dtype = tensors[0].dtype
    if dtype not in _NAMES or torch.compiler.is_compiling():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == dtype for t in tensors)
    return plain and kernels() is not None


@functools.cache
def kernels(name: str = "fused") -> ctypes.CDLL | None:
    """The compiled kernels of native/NAME.c, or None where they cannot be had."""
    if os.environ.get("ZERO2HERO_NATIVE") == "0" or sys.platform != "linux":
        return None
    openmp = _openmp_of_torch()
    if openmp is None:
        return None
    try:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return native_library(name, *_FLAGS)
    except FileNotFoundError:  # no compiler
        return None
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error).encode()
        warnings.warn(f"training is slower: native/{name}.c: {detail.decode(errors='replace')[:500]}", stacklevel=3)
        return None


def _openmp_of_torch() -> str | None:
    """The OpenMP library that torch brought; other packages may have brought theirs into the process as well."""
    paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")))
    own = [path for path in found if Path(torch.__file__).parent in Path(path).parents]
    return next(iter(own + found), None)


def _run(kernel: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Call the kernel for `like`'s dtype; the number of threads is every kernel's last argument."""
    numbers = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_float, type(None): ctypes.c_void_p}
    values = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else numbers[type(a)](a)  # type: ignore[arg-type]
        for a in (*arguments, _threads(like))
    ]
    getattr(kernels(), f"{kernel}_{_NAMES[like.dtype]}")(*values)


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > _SMALL else 1


def _rows(x: Tensor) -> tuple[int, int] | None:
    """(distance, count) of the last dimension's rows, where one distance leads through all of them in order."""
    if x.stride(-1) != 1 or x.dim() < 2:
        return None
    for i in range(x.dim() - 2):
        if x.shape[i] > 1 and x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return None
    return x.stride(-2), x.numel() // max(1, x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = w x r and r = 1 / sqrt(mean(x²) + eps), fp32, [..., 1]."""
    x = x.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _run("rms_norm", x, x, weight, y, scale, scale.numel(), x.shape[-1], eps)
    return y, scale


def rms_norm_backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    grad_x, grad_weight = torch.empty_like(x), x.new_empty(_threads(x), x.shape[-1], dtype=torch.float32)
    _run("rms_norm_backward", x, x, weight, scale, grad, grad_x, grad_weight, scale.numel(), x.shape[-1])
    return grad_x, grad_weight.sum(0).to(weight.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float, out: Tensor) -> None:
    """Turn x [B, T, H, K] by the angles [B or 1, T, 1, K/2], forth (1.0) or back (-1.0), or copy it (0.0), into out."""
    B, T, H, K = x.shape
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    cos, sin = (t.expand(B, T, 1, K // 2) for t in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    strides = (*x.stride()[:3], *out.stride()[:3], *cos.stride()[:2])
    _run("rotate", x, x, *strides[:3], out, *strides[3:6], cos, sin, *strides[6:], B, T, H, K, direction)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous."""
    gate, up, stride, count = _pair(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype)
    _run("silu_product", y, gate, up, stride, y, count, y.shape[-1])
    return y


def silu_product_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, side by side in one [..., 2F]."""
    gate, up, stride, count = _pair(gate, up)
    grad, F = grad.contiguous(), grad.shape[-1]
    both = grad.new_empty(*grad.shape[:-1], 2 * F)
    grad_gate, grad_up = both[..., :F], both[..., F:]
    _run("silu_product_backward", grad, gate, up, stride, grad, grad_gate, grad_up, 2 * F, count, F)
    return grad_gate, grad_up


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Two tensors whose rows are equally far apart, that distance, and how many rows."""
    rows = _rows(a)
    if rows is None or rows != _rows(b):
        a, b = a.contiguous(), b.contiguous()
        rows = a.shape[-1], a.numel() // max(1, a.shape[-1])
    return a, b, *rows


def relu2(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _run("relu2", x, x, y, x.numel() // max(1, x.shape[-1]), x.shape[-1])
    return y


def relu2_backward(x: Tensor, grad: Tensor) -> Tensor:
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    _run("relu2_backward", x, x, grad, grad_x, x.numel() // max(1, x.shape[-1]), x.shape[-1])
    return grad_x


def accumulate_(total: Tensor, part: Tensor) -> None:
    """total (fp32) += part in one pass; torch would first make an fp32 copy of a bf16 part. Works on all devices."""
    if usable(part) and total.dtype == torch.float32 and total.is_contiguous() and part.is_contiguous():
        _run("accumulate", part, total, part, part.numel())
    else:
        total += part


def momentum_(momentum: Tensor, grad: Tensor, ahead: Tensor, beta: float, nesterov: bool) -> None:
    """momentum (fp32) += (1 - beta) (grad - momentum); ahead becomes it or, `nesterov`, goes one such step further."""
    if usable(ahead) and usable(momentum, grad) and all(t.is_contiguous() for t in (momentum, grad, ahead)):
        _run("momentum", ahead, grad, momentum, ahead, ahead.numel(), beta, nesterov)
    else:
        momentum.lerp_(grad, 1 - beta)
        ahead.copy_(grad.lerp(momentum, beta) if nesterov else momentum)


def update_(weight: Tensor, update: Tensor, keep: float, rate: float) -> None:
    """weight (fp32) = keep * weight - rate * update."""
    if usable(update) and usable(weight) and weight.dtype == torch.float32 and weight.is_contiguous():
        update = update.contiguous()
        _run("update", update, weight, update, update.numel(), keep, rate)
    else:
        weight.mul_(keep).add_(update, alpha=-rate)


def softmax_(scores_BHTS: Tensor, allowed_BTS: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(scale * scores) over the keys each query may see, in the scores' memory (contiguous)."""
    B, H, T, S = scores_BHTS.shape
    allowed = None if causal or allowed_BTS is None else allowed_BTS.contiguous()
    apart = T * S if allowed is not None and len(allowed) > 1 else 0
    _run("softmax", scores_BHTS, scores_BHTS, allowed, apart, causal, B, H, T, S, scale)
    return scores_BHTS


def softmax_backward_(weights_BHTS: Tensor, grad_BHTS: Tensor, causal: bool, scale: float) -> Tensor:
    """The scores' gradient, in the memory of the weights' gradient (both contiguous)."""
    T, S = weights_BHTS.shape[-2:]
    rows = weights_BHTS.numel() // S
    _run("softmax_backward", grad_BHTS, weights_BHTS, grad_BHTS, causal, rows, T, S, scale)
    return grad_BHTS


def log_likelihood_(
    logits: Tensor, targets: Tensor, *, gradient: bool, weights: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The targets' log-probabilities [n], fp32, under softmax(scale * logits) of [n, V] (contiguous).

    With `gradient` the logits become weights * (softmax - onehot); `weights` [n], fp32, 1 by default.
    """
    n, V = logits.shape
    logprobs = logits.new_empty(n, dtype=torch.float32)
    _run("log_likelihood", logits, logits, targets.contiguous(), logprobs, gradient, weights, n, V, scale)
    return logprobs


def nf4_encode(blocks: Tensor, reciprocals: Tensor, bounds: Tensor) -> Tensor:
    """Two codes to a byte, [blocks, 32], of what is [blocks, 64]."""
    codes = torch.empty(len(blocks), 32, dtype=torch.uint8)
    _run("nf4_encode", blocks, blocks, reciprocals, bounds, codes, len(blocks))
    return codes


def nf4_decode(codes: Tensor, scales: Tensor, values: Tensor, out: Tensor) -> Tensor:
    _run("nf4_decode", out, codes, scales, values, out, out.numel())
    return out
