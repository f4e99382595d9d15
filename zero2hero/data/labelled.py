"""Texts that carry labels, as batches of about equal length.

Padding is wasted work, so texts of like length go together. The rows of each step are chosen as a whole, and then cut
into micro-batches: 8 x 1, 4 x 2 and 1 x 8 see the same rows. Which they are is a function of the seed and the step
alone, so a run resumes by knowing one integer.

B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from zero2hero.data.pairs import moved, padded

GROUP = 32  # steps whose rows are sorted by length together


class RowsByLength:
    """`rows[i]`: the numbers of the rows in micro-batch i of the run.

    An epoch's rows are permuted; runs of GROUP steps are sorted by length and cut into steps, which are visited in a
    permuted order. What does not fill a step waits for another epoch.

    Args:
        lengths: of each row.
        batch_size: rows of a micro-batch.
        together: micro-batches of a step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, together: int, seed: int) -> None:
        self.lengths, self.batch_size, self.together, self.seed = np.asarray(lengths), batch_size, together, seed
        self.steps_per_epoch = max(1, len(lengths) // (batch_size * together))
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, index: int) -> np.ndarray:
        step, part = divmod(index, self.together)
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within][part * self.batch_size : (part + 1) * self.batch_size]

    def _make_epoch(self, number: int) -> np.ndarray:
        """[steps, rows of a step]."""
        generator, rows = np.random.default_rng([self.seed % 2**64, number]), self.batch_size * self.together
        wanted = self.steps_per_epoch * rows
        rounds = -(-wanted // len(self.lengths))  # more than one where the rows do not fill a step
        order = np.concatenate([generator.permutation(len(self.lengths)) for _ in range(rounds)])[:wanted]
        groups = np.split(order, range(GROUP * rows, wanted, GROUP * rows))
        order = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        return order.reshape(-1, rows)[generator.permutation(self.steps_per_epoch)]


@dataclass(frozen=True)
class LabelledBatch:
    """Texts and what is to be said of them; arrays are numpy or (after `to`) torch.

    `attention_mask_BT` is 1 for tokens and 0 for padding, or None where nothing is padded. `labels`: [B] for whole
    texts, [B, T] for each token (-100 for none), [B, 2] for the first and last token of an answer.
    """

    ids_BT: Any
    type_ids_BT: Any
    labels: Any
    attention_mask_BT: Any = None

    @property
    def inputs(self) -> tuple[Any, Any, Any]:
        """What an encoder is called with."""
        return self.ids_BT, self.attention_mask_BT, self.type_ids_BT

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return self.ids_BT.shape[0] * self.ids_BT.shape[1]

    def to(self, device: Any) -> LabelledBatch:
        """The same batch as torch tensors on `device`."""
        return moved(self, device)


@dataclass(frozen=True)
class LabelledTexts:
    """Encoded texts with their labels.

    `labels[i]` is a number, two places, or with `per_token` an array of the text's length.
    """

    ids: list[np.ndarray]
    type_ids: list[np.ndarray]
    labels: list[Any]
    pad_id: int
    per_token: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def batch(self, rows: Sequence[int] | np.ndarray) -> LabelledBatch:
        """These rows, padded on the right."""
        ids, mask = padded([self.ids[i] for i in rows], self.pad_id)
        types, _ = padded([self.type_ids[i] for i in rows], 0)
        labels = [self.labels[i] for i in rows]
        values = padded(labels)[0] if self.per_token else np.stack(labels)
        return LabelledBatch(ids, types, values, None if mask.all() else mask)


def drop_tokens(
    batch: LabelledBatch, share: float, mask_id: int, keep: Sequence[int], seed: int, first_row: int
) -> LabelledBatch:
    """The batch with a `share` of its tokens masked, but for those in `keep`; `first_row` is its first row's number
    in the run, so that what is masked does not depend on how a step is cut."""
    length = batch.ids_BT.shape[1]
    numbers = range(first_row, first_row + len(batch.ids_BT))
    chosen = np.stack([np.random.default_rng([seed % 2**64, number]).random(length) < share for number in numbers])
    return replace(batch, ids_BT=np.where(chosen & ~np.isin(batch.ids_BT, list(keep)), mask_id, batch.ids_BT))
