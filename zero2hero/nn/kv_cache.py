"""Keys and values of the tokens so far, so that each new token costs one step and not the whole text again.

A token's slot is its position. So a batch of prompts of unequal length needs no bookkeeping: each row
writes its next token at its own position, and what padding left in later slots is overwritten before the
causal mask ever lets a query see it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per layer two buffers [B, G, S, K], made once for `max_length` tokens.

    `end` is the number of slots in use; the model advances it after each call.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_key_value_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, num_key_value_heads, max_length, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.max_length = max_length
        self.end = 0

    def update(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all of this layer's in use, as [B, G, S, K].

        `slots`: one slice when all rows stand at the same position, else positions [B, T].
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(slots, slice):
            keys[:, :, slots] = k_BTGK.transpose(1, 2)
            values[:, :, slots] = v_BTGK.transpose(1, 2)
        else:
            rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
            keys[rows, :, slots] = k_BTGK
            values[rows, :, slots] = v_BTGK
        return keys[:, :, : self.end], values[:, :, : self.end]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows, in this order: finished rows leave, beams branch."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on."""
        self.end = min(self.end, length)
