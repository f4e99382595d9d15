"""Prefix tuning: keys and values before every text are learned, in each layer (Li & Liang 2021, arXiv 2101.00190).

A learned prompt (tune/prompt_tuning.py) speaks to the first layer only; a prefix to all of them. To the attention it is
a cache of n tokens that were never read, so the model needs no change: it is given that cache. The paper found random
numbers a bad beginning, so the first keys and values are those that the model has for real tokens.

    model = add_prefix(model, num_virtual_tokens=20)
    save_virtual_tokens(model, "runs/prefix")            # PEFT's files
    model = load_prefix(base, "runs/prefix")

n virtual tokens, L layers, G key/value heads, K head width: `prompt_embeddings` [n, L * 2 * G * K].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zero2hero.models.decoder import Decoder
from zero2hero.nn.kv_cache import KVCache
from zero2hero.tune.prompt_tuning import VirtualTokens, first_ids, read_virtual_tokens


class PrefixTuned(VirtualTokens):
    """The virtual tokens are keys and values in the place of a cache."""

    kind = "PREFIX_TUNING"

    def read(self, ids_BT: Tensor, cache: KVCache | None) -> Tensor:
        c, n, B = self.model.config, len(self.prompt_embeddings), len(ids_BT)
        table = self.prompt_embeddings.view(n, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
        table = table.to(self.model.embed_tokens.weight.dtype).permute(1, 2, 0, 3, 4)
        layers = table[:, :, None].expand(-1, -1, B, -1, -1, -1)
        if cache is None:
            return self.model(ids_BT, cache=_Prefix(layers, n + ids_BT.shape[1]))
        cache.end = n
        for i, (keys, values) in enumerate(layers):
            cache.update(i, keys, values, slice(0, n))
        return self.model(ids_BT, cache=cache)


class _Prefix:
    """A cache for one forward pass, through which gradients flow. `layers` [L, 2, B, n, G, K]."""

    def __init__(self, layers: Tensor, max_length: int) -> None:
        self.layers, self.max_length, self.end = layers, max_length, layers.shape[3]

    def update(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor, slots: slice) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        return torch.cat([keys, k_BTGK], 1).transpose(1, 2), torch.cat([values, v_BTGK], 1).transpose(1, 2)


@torch.no_grad()
def add_prefix(
    model: Decoder, num_virtual_tokens: int = 20, ids: Sequence[int] | None = None, seed: int = 0
) -> PrefixTuned:
    """The model behind a prefix that can be trained; the model itself is frozen. Arguments as for `add_prompt`."""
    first = first_ids(model, num_virtual_tokens, ids, seed)
    cache, training = model.make_cache(1, first.shape[1]), model.training
    model.eval()(first, cache=cache)
    model.train(training)
    layers = torch.stack([torch.stack(pair) for pair in zip(cache.keys, cache.values)])  # [L, 2, 1, G, n, K]
    return PrefixTuned(model, layers[:, :, 0].permute(3, 0, 1, 2, 4).flatten(1))


def load_prefix(model: Decoder, folder: str | Path) -> PrefixTuned:
    """The model behind a prefix that PEFT or `save_virtual_tokens` wrote."""
    c = model.config
    width = c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim
    return PrefixTuned(model, read_virtual_tokens(folder, "PREFIX_TUNING", width))
