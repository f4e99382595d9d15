"""One step of a model for many texts at once: the next tokens of each go in, the logits of what follows come out.

A text takes part with one token, with a draft of several (speculative.py), or with a piece of its prompt. `Reader` does
this through the model's own forward, or the prepared form of it (fast.py), so every decoder can be read: all texts with
one token in one call, pieces of several tokens one after the other.

B texts, T tokens, G key/value heads, K head width, V vocabulary, S length of the longest text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zero2hero.generate.fast import prepare
from zero2hero.generate.pages import PAGE, Pages
from zero2hero.models.decoder import Decoder
from zero2hero.nn.kv_cache import KVCache


class Piece(NamedTuple):
    """Tokens of one text from position `start` on, its pages, and for how many of the last tokens logits are wanted.

    `vectors` [T, D] are read in place of the ids, with the adapter of that name (None: with what the model wears).
    """

    ids: list[int]
    start: int
    pages: list[int]
    wanted: int
    vectors: Tensor | None = None
    adapter: str | None = None


class PagedCache(KVCache):
    """The pages of some texts as a cache that a model can be called with; `tables` [B, pages of a text]."""

    def __init__(self, pages: Pages, tables: Tensor) -> None:
        self.pages, self.tables = pages, tables
        self.max_length = tables.shape[1] * PAGE
        self.end = 0

    def update(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop, device=self.tables.device).expand(len(self.tables), -1)
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        page, offset = self.tables.gather(1, slots // PAGE), slots % PAGE
        keys[page, :, :, offset] = k_BTGK
        values[page, :, offset] = v_BTGK
        k = keys[self.tables].permute(0, 2, 1, 4, 3).flatten(2, 3)  # [B, pages, G, K, 16] -> [B, G, S, K]
        v = values[self.tables].transpose(1, 2).flatten(2, 3)
        return k[:, :, : self.end], v[:, :, : self.end]


class Reader:
    """`logits = reader(pieces)`: fp32 [sum of wanted, V], piece by piece."""

    def __init__(self, model: Decoder, pages: Pages) -> None:
        self.model, self.pages = model, pages
        self.prepared = prepare(model)
        self.device = model.embed_tokens.weight.device
        self.adapters = {name for module in _adapted(model) for name in module.adapters}

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        # a text may share pages that an earlier piece of this very step fills: so in order, single tokens last
        groups: list[list[int]] = []
        single: dict[str | None, list[int]] = {}
        for i, piece in enumerate(pieces):
            if len(piece.ids) == 1 and piece.vectors is None and piece.wanted:
                single.setdefault(piece.adapter, []).append(i)
            else:
                groups.append([i])
        logits: dict[int, Tensor] = {}
        for group in (*groups, *single.values()):
            wanted = pieces[group[0]].wanted
            with evaluating(self.model), wearing(self.model, pieces[group[0]].adapter):
                hidden = self._read([pieces[i] for i in group])
                if wanted:
                    rows = self.prepared.logits(hidden[:, -wanted:].flatten(0, 1)).float()
                    logits |= zip(group, rows.split(wanted))
        return torch.cat([logits[i] for i in sorted(logits)]) if logits else torch.empty(0)

    def _read(self, pieces: list[Piece]) -> Tensor:
        """Hidden states [B, T, D] of pieces that are equally long."""
        vectors = pieces[0].vectors
        ids = torch.tensor([piece.ids for piece in pieces], device=self.device) if vectors is None else vectors[None]
        T = len(pieces[0].ids)
        starts = [piece.start for piece in pieces]
        used = -(-(max(starts) + T) // PAGE)
        tables = [(piece.pages + [0] * used)[:used] for piece in pieces]
        cache = PagedCache(self.pages, torch.tensor(tables, device=self.device))
        cache.end = max(starts)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(T, device=self.device)
        return self.prepared(self.model, ids, cache, positions)


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "adapters") and hasattr(module, "active")]


@contextmanager
def wearing(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Within the block the model wears that adapter; None: what it wears anyway."""
    adapted = _adapted(model) if adapter is not None else []
    before = [module.active for module in adapted]
    for module in adapted:
        module.active = adapter
    try:
        yield
    finally:
        for module, active in zip(adapted, before):
            module.active = active


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model writes without dropout, also in the middle of its training."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
