"""Weights in four and eight bits as bitsandbytes' files hold them: several tensors for each matrix.

    X.weight                                  U8 [n/2, 1]   NF4 codes, or I8 [out, in] of int8
    X.weight.absmax                           F32 [blocks]; U8 with double quantization, and then also
    X.weight.nested_absmax, .nested_quant_map F32, the scales of these and the 256 values of their code
    X.weight.quant_map                        F32 [16], the values of NF4
    X.weight.quant_state.bitsandbytes__nf4    U8, a JSON text: block sizes, shape, dtype, nested_offset
    X.SCB, X.weight_format                    of int8: F32 [out], each row's largest magnitude; the layout, 0

config.json says so under quantization_config. This was read from files that transformers 4.57 and 5 wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.nn.dynamic_code import BLOCK as NESTED_BLOCK
from zero2hero.nn.dynamic_code import dynamic_code
from zero2hero.nn.nf4 import BLOCK, NF4, nf4_code
from zero2hero.nn.quantized import Int8

NF4_STATE, FP4_STATE = (f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE, FP4_STATE)
KEY = "quantization_config"


def check_config(settings: Any) -> None:
    """Of what config.json has under `KEY`. Raises UserError: a quantization that cannot be read here."""
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method != "bitsandbytes":
        raise UserError(
            f"config.json: the weights are quantized by {method!r}, which cannot be read here; bitsandbytes' can"
        )


def config_of(weights: Iterable[NF4 | Int8]) -> dict[str, Any]:
    """What config.json says of a model with these weights, {} when there are none.

    Raises:
        UserError: a mixture of both kinds, or of NF4 with and without double quantization.
    """
    kinds = {(type(w), getattr(w, "nested_absmax", None) is not None) for w in weights}
    if not kinds:
        return {}
    if len(kinds) > 1:
        raise UserError("a file of bitsandbytes holds weights of one kind: all NF4, or all int8, quantized alike")
    (kind, double), *_ = kinds
    four = kind is NF4
    return {KEY: {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
        "bnb_4bit_quant_type": "nf4" if four else "fp4", "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_enable_fp32_cpu_offload": False,
    }}  # fmt: skip


def is_quantized(stored: str, files: Mapping[str, Any]) -> bool:
    """Whether the weight `stored` is in NF4, FP4 or int8, by the names that stand beside it."""
    return any(stored + ending in files for ending in (NF4_STATE, FP4_STATE)) or _scales(stored) in files


def describes_another(stored: str, files: Mapping[str, Any]) -> bool:
    """Whether a tensor is a part of what stands for a quantized weight."""
    module, _, kind = stored.rpartition(".")
    weights = [stored.removesuffix(ending) for ending in BESIDE if stored.endswith(ending)]
    weights += [f"{module}.weight"] * (kind in ("SCB", "weight_format"))
    return any(weight in files and is_quantized(weight, files) for weight in weights)


def _scales(stored: str) -> str:
    return f"{stored.removesuffix('.weight')}.SCB"


def read(stored: str, files: Mapping[str, Any], shape: tuple[int, ...]) -> NF4 | Int8:
    """A quantized weight that stands for numbers of this shape. `files`: each tensor's safetensors file.

    Raises:
        UserError: a part is missing or does not fit, or it is of a kind that is not read here.
    """
    if stored + FP4_STATE in files:
        raise UserError(f"tensor {stored} is in FP4, which is not read here; NF4 is")
    return (_read_nf4 if stored + NF4_STATE in files else _read_int8)(stored, files, shape)


def _read_nf4(stored: str, files: Mapping[str, Any], shape: tuple[int, ...]) -> NF4:
    count = math.prod(shape)
    blocks = -(-count // BLOCK)

    def part(ending: str, dtype: torch.dtype, *size: int) -> Tensor:
        if stored + ending not in files:
            raise UserError(f"tensor {stored} is in NF4, and its {stored + ending} is missing")
        value = files[stored + ending].get_tensor(stored + ending)
        if value.dtype != dtype or (size and value.shape != size):
            raise UserError(
                f"tensor {stored + ending} holds {value.dtype} {list(value.shape)}; it should be {dtype} {list(size)}"
            )
        return value

    try:
        state = json.loads(bytes(part(NF4_STATE, torch.uint8).tolist()))
        double = f"{stored}.nested_absmax" in files
        found = [state["shape"], state["blocksize"], state["quant_type"]]
        wanted: list[Any] = [list(shape), BLOCK, "nf4"]
        if double:
            found, wanted = [*found, state["nested_blocksize"]], [*wanted, NESTED_BLOCK]
            offset = torch.tensor(float(state["nested_offset"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"tensor {stored}{NF4_STATE} is no description of NF4 weights: {error!r}") from None
    if found != wanted:
        raise UserError(
            f"tensor {stored} is in NF4 of (shape, blocks, kind) {found}; config.json and this program want {wanted}"
        )
    codes = files[stored].get_tensor(stored).reshape(-1).view(torch.uint8)  # FSDP's users store them as other numbers
    if len(codes) != -(-count // 2):
        raise UserError(f"tensor {stored} holds {len(codes)} bytes; {count} weights in NF4 are {-(-count // 2)}")
    _check_code(stored, part(".quant_map", torch.float32, 16), nf4_code())
    if not double:
        return NF4(shape, codes, part(".absmax", torch.float32, blocks))
    _check_code(stored, part(".nested_quant_map", torch.float32, 256), dynamic_code(signed=True))
    nested = part(".nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK))
    return NF4(shape, codes, part(".absmax", torch.uint8, blocks), nested, offset)


def _check_code(stored: str, theirs: Tensor, ours: Tensor) -> None:
    if not torch.allclose(theirs, ours, atol=1e-6):
        raise UserError(f"tensor {stored} was quantized with a code of its own, which is not read here")


def _read_int8(stored: str, files: Mapping[str, Any], shape: tuple[int, ...]) -> Int8:
    scales, layout = _scales(stored), f"{stored}_format"
    codes, absmax = files[stored].get_tensor(stored), files[scales].get_tensor(scales)
    if layout in files and int(files[layout].get_tensor(layout)) != 0:
        raise UserError(f"tensor {stored} is laid out for one kind of GPU; save it anew with a newer bitsandbytes")
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape or absmax.numel() != shape[0]:
        raise UserError(
            f"tensor {stored} holds {codes.dtype} {list(codes.shape)} and {absmax.numel()} scales; config.json says it "
            f"should be int8 {list(shape)}"
        )
    return Int8(codes, absmax.float().flatten())


def spelt(stored: str, weight: NF4 | Int8, dtype: str) -> dict[str, Tensor]:
    """A quantized weight as a file's tensors; `dtype` is that of the numbers that it stands for."""
    if isinstance(weight, Int8):
        layout = torch.tensor(0, dtype=torch.uint8)
        return {stored: weight.codes.cpu(), _scales(stored): weight.absmax.cpu(), f"{stored}_format": layout}
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(weight.shape)}
    tensors = {stored: weight.codes[:, None], f"{stored}.absmax": weight.absmax, f"{stored}.quant_map": nf4_code()}
    if weight.nested_absmax is not None and weight.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": weight.offset.item()}
        tensors |= {
            f"{stored}.nested_absmax": weight.nested_absmax,
            f"{stored}.nested_quant_map": dynamic_code(signed=True),
        }
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    # a file holds the codes of each weight anew
    return {name: tensor.cpu().clone() for name, tensor in tensors.items()} | {stored + NF4_STATE: text}
