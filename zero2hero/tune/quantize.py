"""Quantization: a model's matrices in four or eight bits, so that a large model fits beside what learns.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the base model stands still in NF4, an eighth of fp32 or a quarter of
bf16, and an adapter in full precision learns beside it (tune/lora.py). The gradient passes through the frozen matrices
and changes none.

    model = add_lora(quantize_nf4(model), LoraConfig(r=16))

`from_pretrained(..., load_in_4bit=True)` quantizes each matrix as it is read, so that a model never stands in memory
whole. What the modules do is in nn/quantized.py, and files in models/quantized_files.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.nn import nf4
from zero2hero.nn.nf4 import NF4
from zero2hero.nn.quantized import Int8, QuantizedLinear, put_in, quantizable, quantize_rows


def quantize_nf4(model: nn.Module, double_quant: bool = True, skip_modules: Collection[str] = ()) -> nn.Module:
    """The same model, changed in place, with the matrices of its layers in NF4: 4.127 bits a weight.

    It computes in the precision of its inputs: of the embeddings, that is.

    Args:
        model: embeddings, heads, norms and routers of experts stay as they are.
        double_quant: blocks' scales are quantized too; without, 4.5 bits.
        skip_modules: names, or ends of names, of further modules to leave as they are.

    Raises:
        UserError: there is nothing to quantize, or a weight is not finite.
    """
    return _quantize(model, lambda weight: nf4.quantize(weight, double_quant), skip_modules)


def quantize_int8(model: nn.Module, skip_modules: Collection[str] = ()) -> nn.Module:
    """The same model, changed in place, with the matrices of its layers in int8. See `quantize_nf4`."""
    return _quantize(model, quantize_rows, skip_modules)


def _quantize(model: nn.Module, quantize: Callable[[Tensor], NF4 | Int8], skip_modules: Collection[str]) -> nn.Module:
    found = quantizable(model, skip_modules)
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError("the model is quantized already")
    if not found:
        raise UserError(
            f"nothing in this {type(model).__name__} can be quantized: it takes linear modules inside `layers`"
        )
    for name, module in found.items():
        try:
            put_in(model, name, quantize(module.weight))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return model


def dequantize(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model, changed in place, with ordinary linear modules again; what was rounded off does not come back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.dequantize(dtype))
            linear.register_parameter("bias", module.bias)
            model.set_submodule(name, linear)
    return model
