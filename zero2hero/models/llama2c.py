"""Checkpoints of llama2.c: a small Llama as one file of numbers, so that a C program of a few hundred lines can run it.

A header of 4-byte integers, then fp32 matrices one after another, each stacked over the layers. Two versions (export.py
of karpathy/llama2.c says so): the first has no mark, and tables of rotary angles that nobody needs; version 1 begins
with "ak42" and keeps the norms first. Queries and keys pair neighbouring features, (0, 1), (2, 3), ...; the ecosystem
pairs (i, i + K/2), so their rows change places here.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.models.decoder import Decoder

MAGIC = 0x616B3432
_NORMS = {"rms_att": "input_layernorm.weight", "rms_ffn": "post_attention_layernorm.weight"}
_MATRICES = {
    "wq": "self_attn.q_proj.weight", "wk": "self_attn.k_proj.weight", "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight", "w1": "mlp.gate_proj.weight", "w2": "mlp.down_proj.weight",
    "w3": "mlp.up_proj.weight",
}  # fmt: skip
_ORDER = {
    0: ["embedding", "rms_att", "wq", "wk", "wv", "wo", "rms_ffn", "w1", "w2", "w3", "norm", "angles", "head"],
    1: ["rms_att", "rms_ffn", "norm", "embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "head"],
}


def read_llama2c(path: str | Path) -> Decoder:
    """The model in a llama2.c file, legacy or version 1.

    Raises:
        UserError: not such a file, quantized (version 2), or of another size than its header says.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    version, config, start = _read_header(path, content)
    shapes = {part: shape for part, shape in _shapes(config).items() if part in _ORDER[version]}
    expected = start + 4 * sum(math.prod(shape) for shape in shapes.values())
    if len(content) != expected:
        raise UserError(f"{path} has {len(content)} bytes; a llama2.c model with its header would have {expected}")
    with torch.device("meta"):
        model = Decoder(config)
    state: dict[str, Tensor] = {}
    for part in _ORDER[version]:
        if part in shapes:
            count = math.prod(shapes[part])
            numbers = torch.from_numpy(np.frombuffer(content, "<f4", count, start).copy()).view(shapes[part])
            start += 4 * count
            state |= _ours(part, numbers, config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def _read_header(path: Path, content: bytes) -> tuple[int, DecoderConfig, int]:
    """The version, the model's shape, and where its numbers begin."""
    if len(content) < 256:
        raise UserError(f"{path} is too short to be a llama2.c checkpoint")
    magic, version = struct.unpack_from("<Ii", content)
    marked = magic == MAGIC
    if marked and version != 1:
        raise UserError(f"{path} is a llama2.c checkpoint of version {version} (quantized); versions 0 and 1 are read")
    dim, inner, layers, heads, key_heads, vocabulary, length = struct.unpack_from("<7i", content, 8 if marked else 0)
    shared = bool(content[36]) if marked else vocabulary > 0
    if not all(0 < n < 2**28 for n in (dim, inner, layers, heads, key_heads, abs(vocabulary), length)) or dim % heads:
        raise UserError(f"{path} does not begin like a llama2.c checkpoint")
    config = DecoderConfig(
        vocab_size=abs(vocabulary), hidden_size=dim, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=length, norm_eps=1e-5,
        tie_word_embeddings=shared, bos_token_id=1, eos_token_id=2, model_type="llama",
    )  # fmt: skip
    return int(marked), config.derived(), 256 if marked else 28


def _shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    L, D, F, K = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.head_dim
    inner = {"wq": c.num_attention_heads * K, "wk": c.num_key_value_heads * K, "wv": c.num_key_value_heads * K}
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (c.vocab_size, D), "rms_att": (L, D), "rms_ffn": (L, D), "norm": (D,),
        **{name: (L, rows, D) for name, rows in inner.items()}, "wo": (L, D, c.num_attention_heads * K),
        "w1": (L, F, D), "w2": (L, D, F), "w3": (L, F, D), "angles": (2, c.max_position_embeddings, K // 2),
    }  # fmt: skip
    return shapes if c.tie_word_embeddings else shapes | {"head": (c.vocab_size, D)}


def _ours(part: str, numbers: Tensor, config: DecoderConfig) -> dict[str, Tensor]:
    whole = {"embedding": "embed_tokens.weight", "norm": "norm.weight", "head": "lm_head.weight"}
    if part == "angles":
        return {}
    if part in whole:
        return {whole[part]: numbers}
    if part in ("wq", "wk"):  # from neighbours (2i, 2i + 1) to halves (i, i + K/2)
        L, rows, D = numbers.shape
        numbers = numbers.view(L, -1, config.head_dim // 2, 2, D).transpose(2, 3).reshape(L, rows, D)
    name = (_NORMS | _MATRICES)[part]
    return {f"layers.{i}.{name}": layer.clone() for i, layer in enumerate(numbers)}
