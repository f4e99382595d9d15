"""Linear modules whose weights are kept in four or eight bits, and are made anew whenever they are needed.

They compute in the precision of what comes in: a weight is decoded to that precision, used for one product, and thrown
away. The way back decodes it once more instead of keeping it, so that a training step holds one matrix at a time in
full. Weights do not learn; the input gets its gradient, and so does everything below it and beside it (an adapter).

Four bits are NF4 (see nf4.py). Eight are those of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): each row is
divided by its largest magnitude and rounded to -127 ... 127, which bf16 holds exactly. Only weights are rounded here,
never activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2hero.errors import UserError
from zero2hero.nn import nf4
from zero2hero.nn.nf4 import NF4


class Int8(NamedTuple):
    """A matrix [out, in] in eight bits. codes: int8 [out, in]; absmax: fp32 [out], each row's largest magnitude."""

    codes: Tensor
    absmax: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)


def quantize_rows(weight: Tensor) -> Int8:
    """A matrix in int8. It goes through fp16 on the way, as in bitsandbytes, whose bytes these are.

    Raises:
        UserError: a number that is not finite in fp16.
    """
    half = weight.detach().half()
    absmax = half.abs().amax(1).float()
    if not absmax.isfinite().all():
        raise UserError("weights that are not finite in fp16 cannot be quantized to int8")
    shares = half * (127.0 / absmax.clamp(min=1e-38))[:, None]
    return Int8(shares.round().to(torch.int8), absmax)


class _Frozen(torch.autograd.Function):
    """y = x W^T, where W = make(dtype, *stored) is made for each way and not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, make: Callable[..., Tensor], *stored: Tensor | None) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(*stored)
        return F.linear(x, make(x.dtype, *stored))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        stored = ctx.saved_tensors  # to be asked for once, under activation checkpointing
        return grad @ ctx.make(grad.dtype, *stored), None, *(None for _ in stored)


class QuantizedLinear(nn.Module):
    """x [..., in] -> [..., out], with a weight that stands in buffers; the bias, a parameter, is left as it is."""

    def __init__(self, weight: Any, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        for name, value in weight._asdict().items():
            if name != "shape":
                self.register_buffer(name, value)

    @property
    def quantized(self) -> Any:
        """The weight as it is kept."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] as numbers."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """`to`, `half`, `cuda` and the like move the weight, and leave its scales in fp32."""
        before = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        kept = {name: self._buffers[name] for name in before}
        super()._apply(fn, recurse)
        for name, dtype in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != dtype:
                self._buffers[name] = kept[name].to(moved.device)  # type: ignore[union-attr]
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Linear4bit(QuantizedLinear):
    """A weight in NF4."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    @property
    def quantized(self) -> NF4:
        return NF4((self.out_features, self.in_features), self.codes, self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return nf4.dequantize(self.quantized, dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape, *stored = self.quantized
        y = _Frozen.apply(x, lambda dtype, *stored: nf4.dequantize(NF4(shape, *stored), dtype, True), *stored)
        return y if self.bias is None else y + self.bias


class Linear8bit(QuantizedLinear):
    """A weight in int8. The rows' scales multiply the product, where that is exact."""

    codes: Tensor
    absmax: Tensor

    @property
    def quantized(self) -> Int8:
        return Int8(self.codes, self.absmax)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.codes * (self.absmax / 127)[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _Frozen.apply(x, lambda dtype, codes: codes.to(dtype), self.codes)
        y = (y * (self.absmax / 127)).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantizable(model: nn.Module, skip_modules: Collection[str] = ()) -> dict[str, nn.Linear]:
    """The linear modules that may be quantized, by name: those inside a model's layers, but no router of experts.

    Embeddings, heads and norms are few of the weights, and every token depends on them.

    Args:
        model: one with `layers`, at whatever depth.
        skip_modules: names, or ends of names, of modules to leave as they are, with all that is in them.
    """
    found = {}
    for name, module in model.named_modules():
        inside = "layers" in name.split(".") and not name.endswith(".gate")
        skipped = any(f".{skip}." in f".{name}." for skip in skip_modules)
        if type(module) is nn.Linear and inside and not skipped:
            found[name] = module
    return found


def moved(weight: NF4 | Int8, device: torch.device | str) -> NF4 | Int8:
    """The weight on a device."""
    parts: dict[str, Any] = {n: v.to(device) for n, v in weight._asdict().items() if isinstance(v, Tensor)}
    return weight._replace(**parts)


def put_in(model: nn.Module, name: str, weight: NF4 | Int8) -> None:
    """Let the linear module `name` keep this weight; its bias stays."""
    kind, linear = Linear4bit if isinstance(weight, NF4) else Linear8bit, cast(nn.Linear, model.get_submodule(name))
    model.set_submodule(name, kind(weight, linear.bias))


def quantized_weights(model: nn.Module) -> dict[str, NF4 | Int8]:
    """The weights that are kept so, by the names that they had as parameters."""
    return {f"{n}.weight": m.quantized for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
