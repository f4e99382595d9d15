"""Who may look at whom.

One rule serves training, packing and cached decoding: a query sees a key when the key is not later
(causal), not farther back than the window (sliding), and in the same document (packed training), of which it may be
one of several branches (answers to one prompt).
Padding needs no rule of its own: it lies at later positions, or in a document of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Mask:
    """`allowed` [B or 1, T, S] bool: True where a query sees a key. None: every query sees every key.

    `causal` says that the rule is the plain triangle over a square [T, T], which fused kernels know.
    `position_bias` [B or 1, H, T, S] is added to the scores of each head (T5; see positions.py).
    """

    def __init__(self, allowed: Tensor | None, causal: bool = False, position_bias: Tensor | None = None) -> None:
        self.allowed, self.causal = allowed, causal
        self._bias: Tensor | None = None
        if position_bias is not None:
            self.causal = False
            if allowed is not None:
                position_bias = position_bias.masked_fill(~allowed[:, None], float("-inf"))
        self.position_bias = position_bias

    def for_fused(self, dtype: torch.dtype) -> Tensor | None:
        """The mask argument of a fused kernel, [B or 1, 1 or H, T, S]: bool, or numbers to add to scores of `dtype`."""
        if self.position_bias is not None:
            return self.position_bias.to(dtype)
        return None if self.causal or self.allowed is None else self.allowed[:, None]

    def bias(self, batch_size: int, num_heads: int, dtype: torch.dtype) -> Tensor:
        """The additive form [B * H, T, S], 0 where allowed and minus infinity elsewhere; made once for all layers."""
        assert self.allowed is not None
        if self._bias is None or self._bias.dtype != dtype:
            _, T, S = self.allowed.shape
            bias = torch.zeros(self.allowed.shape, dtype=dtype, device=self.allowed.device)
            bias = bias.masked_fill_(~self.allowed, float("-inf"))
            if len(bias) == 1:
                self._bias = bias.expand(batch_size * num_heads, T, S)
            else:
                self._bias = bias.repeat_interleave(num_heads, 0)
        return self._bias


def make_mask(
    query_positions_BT: Tensor,
    key_positions_BS: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
    branches_BT: Tensor | None = None,
) -> Mask:
    """The mask for positions (and documents, when rows are packed). Shapes may have B = 1.

    branches_BT: of rows that attend to themselves, which answer to its document's beginning a token is part of; 0 for
        the beginning, which all see. A branch sees no other.
    """
    distance = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed &= distance < window
        if not causal:
            allowed &= distance > -window
    if query_documents_BT is not None and key_documents_BS is not None:
        allowed = allowed & (query_documents_BT[:, :, None] == key_documents_BS[:, None, :])
    if branches_BT is not None:
        shared, same = branches_BT[:, None, :] == 0, branches_BT[:, :, None] == branches_BT[:, None, :]
        allowed = allowed & (shared | same)
    return Mask(allowed)


def causal_mask(length: int, device: torch.device) -> Mask:
    """The plain triangle for rows that each hold one document from position 0."""
    allowed = torch.ones(1, length, length, dtype=torch.bool, device=device).tril_()
    return Mask(allowed, causal=True)
