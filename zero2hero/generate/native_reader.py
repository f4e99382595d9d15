"""`Reader` on a CPU through native/decode.c: a whole step, of however many texts, is one call.

The weights are used where they are, so nothing is prepared and nothing kept. For the families with RMSNorm, rotary
positions, and SwiGLU or ReLU², in fp32 and bf16; the layers' matrices may be in int8.

N tokens, D width, H heads, G key/value heads, K head width, F inner width, V vocabulary, S slots of a text.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
from array import array
from collections.abc import Sequence
from typing import Any, cast

import torch
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
from zero2hero.nn.quantized import Linear8bit

_MATRICES = {  # the fields of decode.c's `block`, and a Block's modules
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "input_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_norm": "post_attention_layernorm",
}
_MODULES = {Decoder, Block, Attention, FeedForward, RMSNorm, Rotary, nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList}
_MODULES |= {Linear8bit}
# of -ffast-math all but what would reorder sums
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp")
_GROUP = 64  # int8.c's GROUP
_ONE_THREAD = 1 << 20  # weights times tokens; below this, threads wait for each other longer than they work


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "bias", "scales")]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in _MATRICES),
        *((name, ctypes.c_void_p) for name in (*_NORMS, "keys", "values")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "D", "H", "G", "K", "F", "V", "window", "int8")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        ("blocks", ctypes.POINTER(_Block)),
        ("head", _Matrix),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "cos", "sin")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "wanted", "table_width", "scratch_size")),
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "texts", "rows", "tables")),
        *((name, ctypes.c_void_p) for name in ("x", "normalized", "queries", "mixed", "hidden", "codes", "shares")),
        *((name, ctypes.c_void_p) for name in ("scratch", "logits")),
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
        codes = [module.codes for module in model.modules() if isinstance(module, Linear8bit)]
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
            == sum(p.numel() for p in (*model.layers.parameters(), *codes) if p.dim() == 2) + vocabulary
            and model.embed_tokens.weight.numel() == vocabulary == model.lm_head.weight.numel()
            and native.usable(*parameters)
            and all(t.is_contiguous() and t.device.type == "cpu" for t in (*parameters, *codes))
            and _library() is not None
        )

    def __init__(self, model: Decoder, pages: Pages) -> None:
        c, self.config, rotary, dtype = model.config, model.config, model.rotary, model.embed_tokens.weight.dtype
        self.pages, self.device = pages, torch.device("cpu")
        if rotary.table.dtype != torch.float32 or rotary.table.shape[1] < c.max_position_embeddings:
            rotary.grow(max(c.max_position_embeddings, rotary.table.shape[1]))
        self.longest = rotary.table.shape[1]
        self.memory: list[Tensor] = []  # what the pointers point to stays alive with this object
        self.int8 = any(isinstance(module, Linear8bit) for module in model.modules())
        cos, sin = map(self._pointer, rotary.table)
        self.model = _Model(
            layers=len(model.layers), D=c.hidden_size, H=c.num_attention_heads, G=c.num_key_value_heads, K=c.head_dim,
            F=c.intermediate_size, V=c.vocab_size, window=c.windows[0] or self.longest, int8=self.int8,
            eps=model.norm.eps, scale=c.head_dim**-0.5, head=self._matrix(model.lm_head), cos=cos, sin=sin,
            blocks=(_Block * len(model.layers))(*(self._block(b, pages, i) for i, b in enumerate(model.layers))),
            embedding=self._pointer(model.embed_tokens.weight), norm=self._pointer(cast(Tensor, model.norm.weight)),
        )  # fmt: skip
        self.function = getattr(_library(), "step_fp32" if dtype == torch.float32 else "step_bf16")
        self.working: dict[str, Tensor] = {}

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.memory.append(tensor.detach())
        return tensor.data_ptr()

    def _matrix(self, module: Any) -> _Matrix:
        if isinstance(module, Linear8bit):
            weights, scales = self._pointer(module.codes), self._pointer(module.absmax / 127)
        else:
            weights, scales = self._pointer(module.weight), None
        return _Matrix(weights, self._pointer(module.bias), scales)

    def _block(self, block: nn.Module, pages: Pages, layer: int) -> _Block:
        modules = dict(block.named_modules())
        return _Block(
            **{name: self._matrix(modules[path]) for name, path in _MATRICES.items() if path in modules},
            **{name: self._pointer(modules[path].weight) for name, path in _NORMS.items() if path in modules},
            keys=self._pointer(pages.keys[layer]), values=self._pointer(pages.values[layer]),
        )  # fmt: skip

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        ids: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        texts: list[int] = []
        tables: list[int] = []
        width = max(len(piece.pages) for piece in pieces)
        vectors: list[tuple[int, Tensor]] = []
        for text, piece in enumerate(pieces):
            start, end = piece.start, piece.start + len(piece.ids)
            if end > min(self.longest, len(piece.pages) * PAGE):
                raise IndexError(f"token {end} of a text with {len(piece.pages)} pages and {self.longest} positions")
            if piece.vectors is not None:
                vectors.append((len(ids), piece.vectors))
            ids += piece.ids if piece.vectors is None else [-1] * len(piece.ids)
            positions += range(start, end)
            texts += [text] * len(piece.ids)
            rows += range(len(ids) - piece.wanted, len(ids))
            tables += piece.pages + [0] * (width - len(piece.pages))
        N = len(ids)
        threads = 1 if self.config.num_matrix_parameters * N < _ONE_THREAD else torch.get_num_threads()
        pointers = self._working(N, width * PAGE, threads)
        for at, given in vectors:
            self.working["x"][at : at + len(given)] = given
        logits = torch.empty(len(rows), self.config.vocab_size)
        numbers = array("q", [*ids, *positions, *texts, *rows, *tables])
        first = numbers.buffer_info()[0]
        batch = _Batch(
            N, len(rows), width, self.working["scratch"].shape[1],
            *(first + 8 * at for at in (0, N, 2 * N, 3 * N, 3 * N + len(rows))), *pointers, logits.data_ptr(),
        )  # fmt: skip
        self.function(ctypes.byref(self.model), ctypes.byref(batch), threads)
        return logits

    def _working(self, N: int, S: int, threads: int) -> list[int]:
        """Pointers to working memory, which is kept from step to step and made anew when it is too small."""
        c, known = self.config, self.working
        if known:
            N, threads = max(N, len(known["x"])), max(threads, len(known["scratch"]))
            S = max(S, known["scratch"].shape[1])
        size = max(S, N * max(c.head_dim, 8))
        if not known or len(known["x"]) < N or known["scratch"].shape != (threads, size):
            heads = c.num_attention_heads * c.head_dim
            groups = -(-max(c.hidden_size, heads, c.intermediate_size) // _GROUP) if self.int8 else 0
            widths = {"x": c.hidden_size, "normalized": c.hidden_size, "queries": heads, "mixed": heads}
            known = {name: torch.empty(N, width) for name, width in (widths | {"hidden": c.intermediate_size}).items()}
            known |= {"codes": torch.empty(N, groups * _GROUP, dtype=torch.int8), "shares": torch.empty(N, groups)}
            self.working = known | {"scratch": torch.empty(threads, size)}
            self.pointers = [tensor.data_ptr() for tensor in self.working.values()]  # in the order of `_Batch`
        return self.pointers


@functools.cache
def _library() -> ctypes.CDLL | None:
    if native.kernels() is None:  # it also makes torch's OpenMP visible, which this library needs too
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        library = native_library("decode", *_FLAGS)
        for step in (library.step_fp32, library.step_bf16):
            step.argtypes, step.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        return library
    return None
