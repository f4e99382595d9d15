"""`Reader` on a CPU through native/decode.c: a whole step, of however many texts, is one call.

The weights are used where they are, so nothing is prepared and nothing kept. For the families with RMSNorm, rotary
positions, and SwiGLU or ReLU², in fp32 and bf16.

N tokens, D width, H heads, G key/value heads, K head width, F inner width, V vocabulary, S slots of a text.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.generate.fast import is_plain
from zero2hero.generate.pages import PAGE, Pages
from zero2hero.generate.reader import Piece
from zero2hero.machine import native_library
from zero2hero.models.decoder import Block, Decoder
from zero2hero.nn import native
from zero2hero.nn.attention import Attention
from zero2hero.nn.feedforward import FeedForward
from zero2hero.nn.norms import RMSNorm
from zero2hero.nn.positions import Rotary

_BLOCK_WEIGHTS = {  # the fields of decode.c's `block`, and a Block's parameters
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "output": "self_attn.o_proj.weight",
    "output_bias": "self_attn.o_proj.bias",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up": "mlp.up_proj.weight",
    "up_bias": "mlp.up_proj.bias",
    "down": "mlp.down_proj.weight",
    "down_bias": "mlp.down_proj.bias",
}
_MODULES = {Decoder, Block, Attention, FeedForward, RMSNorm, Rotary, nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList}
_ONE_THREAD = 1 << 20  # weights times tokens; below this, threads wait for each other longer than they work


class _Block(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*_BLOCK_WEIGHTS, "keys", "values")]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "D", "H", "G", "K", "F", "V", "window")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        ("blocks", ctypes.POINTER(_Block)),
        *((name, ctypes.c_void_p) for name in ("norm", "head", "cos", "sin")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "wanted", "table_width", "scratch_size")),
        *((name, ctypes.c_void_p) for name in ("positions", "texts", "rows", "tables", "x")),
        *((name, ctypes.c_void_p) for name in ("normalized", "queries", "mixed", "hidden", "scratch", "logits")),
    ]


class NativeReader:
    """See `Reader`. It points to the weights, so it must not outlive a change of their memory.

    (A weight that is replaced meanwhile is kept alive, and used as it was.)
    """

    adapters: frozenset[str] = frozenset()  # a model with adapters it does not know

    @staticmethod
    def fits(model: Decoder) -> bool:
        """Whether decode.c can do this model's steps here."""
        c, parameters = model.config, list(model.parameters())
        vocabulary = c.vocab_size * c.hidden_size
        return (
            is_plain(model)
            and {type(module) for module in model.modules()} <= _MODULES
            and (c.position, c.norm, c.feedforward in ("swiglu", "relu2")) == ("rotary", "rmsnorm", True)
            and len(set(c.windows)) == 1
            and not model.rotary.dynamic
            and len({m.eps for m in model.modules() if isinstance(m, RMSNorm)}) == 1
            and model.lm_head.bias is None
            and c.num_matrix_parameters
            == sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) + vocabulary
            and model.embed_tokens.weight.numel() == vocabulary == model.lm_head.weight.numel()
            and native.usable(*parameters)
            and all(p.is_contiguous() for p in parameters)
            and _library() is not None
        )

    def __init__(self, model: Decoder, pages: Pages) -> None:
        c, self.config, rotary = model.config, model.config, model.rotary
        self.pages, self.device, self.embedding = pages, torch.device("cpu"), model.embed_tokens.weight.detach()
        if rotary.table.dtype != torch.float32 or rotary.table.shape[1] < c.max_position_embeddings:
            rotary.grow(max(c.max_position_embeddings, rotary.table.shape[1]))
        self.longest = rotary.table.shape[1]
        tensors: dict[str, Any] = {"norm": model.norm.weight, "head": model.lm_head.weight}
        tensors["cos"], tensors["sin"] = rotary.table
        blocks = [self._tensors(block, pages, i) for i, block in enumerate(model.layers)]
        # what the pointers point to stays alive with this object
        self.memory = [t.detach() for group in [tensors, *blocks] for t in group.values()]
        self.model = _Model(
            layers=len(blocks), D=c.hidden_size, H=c.num_attention_heads, G=c.num_key_value_heads, K=c.head_dim,
            F=c.intermediate_size, V=c.vocab_size, window=c.windows[0] or self.longest, eps=model.norm.eps,
            scale=c.head_dim**-0.5, blocks=(_Block * len(blocks))(*(_Block(**_pointers(block)) for block in blocks)),
            **_pointers(tensors),
        )  # fmt: skip
        self.function = getattr(_library(), "step_fp32" if self.embedding.dtype == torch.float32 else "step_bf16")
        self.working: dict[str, Tensor] = {}

    @staticmethod
    def _tensors(block: nn.Module, pages: Pages, layer: int) -> dict[str, Tensor]:
        parameters = dict(block.named_parameters())
        weights = {name: parameters[path] for name, path in _BLOCK_WEIGHTS.items() if path in parameters}
        return weights | {"keys": pages.keys[layer], "values": pages.values[layer]}

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        ids = torch.tensor([token_id for piece in pieces for token_id in piece.ids])
        x = F.embedding(ids, self.embedding).float()
        rows: list[int] = []
        positions: list[int] = []
        texts: list[int] = []
        width = max(len(piece.pages) for piece in pieces)
        for text, piece in enumerate(pieces):
            start, end = piece.start, piece.start + len(piece.ids)
            if end > min(self.longest, len(piece.pages) * PAGE):
                raise IndexError(f"token {end} of a text with {len(piece.pages)} pages and {self.longest} positions")
            if piece.vectors is not None:
                x[len(texts) : len(texts) + len(piece.ids)] = piece.vectors
            positions += range(start, end)
            texts += [text] * len(piece.ids)
            rows += range(len(texts) - piece.wanted, len(texts))
        tables = [piece.pages + [0] * (width - len(piece.pages)) for piece in pieces]
        N = len(texts)
        threads = 1 if self.config.num_matrix_parameters * N < _ONE_THREAD else torch.get_num_threads()
        given = {
            "positions": torch.tensor(positions), "texts": torch.tensor(texts), "x": x,
            "rows": torch.tensor(rows, dtype=torch.int64), "tables": torch.tensor(tables, dtype=torch.int32),
            "logits": torch.empty(len(rows), self.config.vocab_size),
        }  # fmt: skip
        working = self._working(N, width * PAGE, threads)
        batch = _Batch(
            N=N, wanted=len(rows), table_width=width, scratch_size=working["scratch"].shape[1],
            **_pointers(given), **_pointers(working),
        )  # fmt: skip
        self.function(ctypes.byref(self.model), ctypes.byref(batch), threads)
        return given["logits"]

    def _working(self, N: int, S: int, threads: int) -> dict[str, Tensor]:
        """Working memory, kept from step to step and made anew when it is too small."""
        c, scratch = self.config, self.working.get("scratch")
        needed = max(S, N * max(c.head_dim, 8))
        known = len(self.working["hidden"]) if self.working else 0
        if known < N or scratch is None or scratch.shape[0] < threads or scratch.shape[1] < needed:
            N = max(N, known)
            heads = c.num_attention_heads * c.head_dim
            widths = {"normalized": c.hidden_size, "queries": heads, "mixed": heads, "hidden": c.intermediate_size}
            self.working = {name: torch.empty(N, width) for name, width in widths.items()}
            needed = max(needed, N * max(c.head_dim, 8), 0 if scratch is None else scratch.shape[1])
            self.working["scratch"] = torch.empty(threads, needed)
        return self.working


@functools.cache
def _library() -> ctypes.CDLL | None:
    if native.library() is None:  # it also makes torch's OpenMP visible, which this library needs too
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        library = native_library("decode", *native._FLAGS)
        for step in (library.step_fp32, library.step_bf16):
            step.argtypes, step.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        return library
    return None


def _pointers(tensors: dict[str, Any]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}
