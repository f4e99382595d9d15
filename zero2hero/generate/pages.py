"""Memory for keys and values in pages, shared by all texts that begin alike.

Texts of unknown length that come and go would leave holes between them; so memory is dealt out in pages of 16 tokens,
and each text has a list of its pages (Kwon et al. 2023, "PagedAttention", arXiv 2309.06180). A full page depends on its
tokens and on all before them, and on nothing else. So texts with the same beginning (a system prompt, samples of one
prompt, a conversation that goes on) share its pages: a full page is known by its tokens and the page before it, which
makes a tree of all beginnings in memory (Zheng et al. 2024, "SGLang", arXiv 2312.07104). Pages that nobody uses any
more stay known until their memory is needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from zero2hero.models.decoder import Decoder

PAGE = 16  # tokens

Key = tuple[Hashable, tuple[int, ...]]


class Pages:
    """Keys [layers, pages, G, K, 16] and values [layers, pages, G, 16, K], and who uses which page.

    Page 0 belongs to nobody: lists of pages of unequal length are filled up with it.
    """

    def __init__(self, model: Decoder, tokens: int) -> None:
        c, like = model.config, model.embed_tokens.weight
        self.count = -(-tokens // PAGE)
        shape = c.num_hidden_layers, self.count + 1, c.num_key_value_heads
        options: Any = {"dtype": like.dtype, "device": like.device}
        self.keys = torch.zeros(*shape, c.head_dim, PAGE, **options)
        self.values = torch.zeros(*shape, PAGE, c.head_dim, **options)
        self._free = list(range(self.count, 0, -1))
        self._users = [0] * (self.count + 1)
        self._known: dict[Key, tuple[int, int]] = {}  # -> (the page, its name in keys of pages that follow)
        self._keys: dict[int, Key] = {}  # of the known pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages without a user, longest unused first
        self._names = 0

    @property
    def available(self) -> int:
        """Pages that can be had."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.available

    def take(self, count: int) -> list[int]:
        """Pages for a text; at most `available`."""
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(page)]
        self._users[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One user fewer of each; the end of a text is given up before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find(self, before: Hashable, ids: Sequence[int]) -> tuple[int, int] | None:
        """The known page with these 16 tokens after the page named `before`, with its name; nobody uses it yet."""
        return self._known.get((before, tuple(ids)))

    def share(self, page: int) -> None:
        """One user more."""
        self._idle.pop(page, None)
        self._users[page] += 1

    def know(self, before: Hashable, ids: Sequence[int], page: int) -> int:
        """Make a full page known; returns its name. Where an equal one is known, that one stays."""
        key = (before, tuple(ids))
        if key in self._known:
            return self._known[key][1]
        self._names += 1
        self._known[key], self._keys[page] = (page, self._names), key
        return self._names

    def forget(self) -> None:
        """No page is known any more: the weights have changed."""
        self._free += self._idle
        self._idle.clear()
        self._known.clear()
        self._keys.clear()
