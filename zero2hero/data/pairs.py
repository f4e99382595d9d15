"""Pairs of a text to read and a text to write, as batches for an encoder-decoder: translations, questions and answers.

The decoder is trained on all places of a target at once: it reads the target one place to the right, behind a start
token, and at each place predicts the token that follows (Sutskever et al. 2014, arXiv 1409.3215).

B batch, S time of the source, T time of the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zero2hero.data.batches import IGNORE


@dataclass(frozen=True)
class Seq2SeqBatch:
    """A text to read and one to write. int64 arrays, numpy or (after `to`) torch.

    `attention_mask_BS` is 1 for tokens and 0 for padding, or None where nothing is padded. `decoder_ids_BT` are the
    targets one place to the right, behind the start token; a target of -100 is not trained on.
    """

    ids_BS: Any
    decoder_ids_BT: Any
    targets_BT: Any
    attention_mask_BS: Any = None

    @property
    def num_tokens(self) -> int:
        """Inputs of encoder and decoder, padding included."""
        return sum(ids.shape[0] * ids.shape[1] for ids in (self.ids_BS, self.decoder_ids_BT))

    def to(self, device: Any) -> Seq2SeqBatch:
        """The same batch as torch tensors on `device`."""
        return moved(self, device)


def moved(batch: Any, device: Any) -> Any:
    """A dataclass of arrays (or None) with torch tensors on `device` in their place."""
    import torch

    arrays = {name: value for name, value in vars(batch).items() if value is not None}
    return replace(batch, **{n: torch.as_tensor(v).to(device, non_blocking=True) for n, v in arrays.items()})


def shift_right(targets_BT: np.ndarray, start_id: int) -> np.ndarray:
    """What the decoder reads when it should write `targets_BT`: the start token, then all targets but the last."""
    shifted = np.concatenate([np.full_like(targets_BT[:, :1], start_id), targets_BT[:, :-1]], axis=1)
    return np.where(shifted == IGNORE, start_id, shifted)


def seq2seq_batch(sources: list[Any], targets: list[Any], *, start_id: int, pad_id: int = 0) -> Seq2SeqBatch:
    """Pairs of token lists as one batch, padded on the right."""
    ids, mask = padded(sources, pad_id)
    target_ids, _ = padded(targets, IGNORE)
    return Seq2SeqBatch(ids, shift_right(target_ids, start_id), target_ids, None if mask.all() else mask)


def padded(texts: list[Any], fill: int = IGNORE) -> tuple[np.ndarray, np.ndarray]:
    """Lists of unequal length as one array [B, T], filled up on the right; and 1 where a list is, 0 elsewhere."""
    ids = np.full((len(texts), max(map(len, texts))), fill, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask
