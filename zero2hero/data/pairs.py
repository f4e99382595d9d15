"""Pairs of a text to read and a text to write, as batches for an encoder-decoder: translations, questions and answers.

The decoder is trained on all places of a target at once: it reads the target one place to the right, behind a start
token, and at each place predicts the token that follows (Sutskever et al. 2014, arXiv 1409.3215).

B batch, S time of the source, T time of the target.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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
        import torch

        values = (getattr(self, field.name) for field in fields(self))
        return Seq2SeqBatch(*(None if v is None else torch.as_tensor(v).to(device, non_blocking=True) for v in values))


def shift_right(targets_BT: np.ndarray, start_id: int) -> np.ndarray:
    """What the decoder reads when it should write `targets_BT`: the start token, then all targets but the last."""
    shifted = np.concatenate([np.full_like(targets_BT[:, :1], start_id), targets_BT[:, :-1]], axis=1)
    return np.where(shifted == IGNORE, start_id, shifted)


def seq2seq_batch(sources: list[Any], targets: list[Any], *, start_id: int, pad_id: int = 0) -> Seq2SeqBatch:
    """Pairs of token lists as one batch, padded on the right."""
    ids, mask = _padded(sources, pad_id)
    target_ids, _ = _padded(targets, IGNORE)
    return Seq2SeqBatch(ids, shift_right(target_ids, start_id), target_ids, None if mask.all() else mask)


def _padded(texts: list[Any], fill: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(texts), max(map(len, texts))), fill, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask
