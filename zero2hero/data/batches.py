"""From a corpus to training batches: order, packing, targets.

Training. In every epoch the documents are permuted anew and laid end to end on a circle. Windows of
`max_length` inputs are cut side by side, beginning at a random phase, and visited in a permuted order (so
that one long book is shuffled too). Nothing is padded, and nothing is stored: `batches[i]` is a function of
the seed and i alone, so a run resumes exactly where it stopped by knowing one integer. Window number g of the
run stands in batch g // batch_size, whatever the batch size: 8 batches of 1 hold the same windows as 1 of 8.

What a window says. `targets` are the inputs' next tokens; where the next token begins another document, the
target is -100 (ignored): the first token of a document (BOS) is never predicted. `document_ids` number the
documents within the row, so that attention can be kept inside each (as in the Llama 3 report, section 3.2).
`positions` count from 0 at each document's start, or at the row's start for a document that began earlier.

Evaluation. See `evaluation_windows`: no randomness, every token of every document predicted exactly once.

Letters: B batch, T time. Arrays are numpy int64; `Batch.to(device)` makes torch tensors of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from zero2hero.data.cache import Corpus
from zero2hero.errors import UserError

IGNORE = -100  # the target that is not trained on; torch's own default ignore_index


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents; every array is int64 [B, T], numpy or (after `to`) torch.

    `weights_BT`, fp32, says how much each target counts; None, the usual case, is 1 for all.

    `records`: for each row, what its documents are called (here their numbers in the corpus, one for each token), for
    a person who wants to know what a step was made of. It is not for the model, and stays as it is.
    """

    ids_BT: Any
    targets_BT: Any
    positions_BT: Any
    document_ids_BT: Any
    records: Any = None
    weights_BT: Any = None

    def to(self, device: Any) -> Batch:
        """The same batch as torch tensors on `device`."""
        import torch

        arrays = {name: value for name, value in vars(self).items() if name.endswith("_BT") and value is not None}
        moved = {name: torch.as_tensor(value).to(device, non_blocking=True) for name, value in arrays.items()}
        return replace(self, **moved)

    @property
    def num_tokens(self) -> int:
        """Inputs, padding included: what speed is measured by."""
        return self.ids_BT.shape[0] * self.ids_BT.shape[1]

    @property
    def crosses_documents(self) -> bool:
        """Does any row hold more than one document? If not, plain causal attention is right as it is."""
        return bool((self.document_ids_BT[:, -1] > 0).any())


def layout(inputs_start_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions, document ids) [B, T], given where documents start; a row always begins with number 0."""
    starts = inputs_start_BT.copy()
    starts[:, 0] = False
    column = np.broadcast_to(np.arange(starts.shape[1]), starts.shape)
    positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return positions, np.cumsum(starts, axis=1, dtype=np.int64)


def batch_of_rows(tokens: np.ndarray, starts: np.ndarray, document_mask: bool = True, records: Any = None) -> Batch:
    """The training batch of rows of T inputs and one token more.

    Args:
        tokens: [B, T + 1].
        starts: [B, T + 1], where documents begin.
        document_mask: see `Batches`.
        records: see `Batch`.
    """
    targets = np.where(starts[:, 1:], IGNORE, tokens[:, 1:])
    positions, document_ids = layout(starts[:, :-1] & document_mask)
    return Batch(np.ascontiguousarray(tokens[:, :-1]), targets, positions, document_ids, records)


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Epoch:
    """One epoch's circle: document d of the order begins at `begins[d]`; its tokens lie at + `shift[d]`."""

    begins: np.ndarray
    shift: np.ndarray
    phase: int
    windows: np.ndarray
    order: np.ndarray  # the corpus's number of each document


class Batches:
    """An endless sequence of training batches: `batches[i]` for any i >= 0.

    With N tokens in the corpus an epoch has N // max_length windows. Each token is an input exactly once in
    an epoch, except the N % max_length tokens before the phase; another epoch's phase brings those in.

    Args:
        corpus: the training documents.
        max_length: T, inputs per row.
        batch_size: B, rows.
        seed: of the order.
        document_mask: False numbers all tokens of a row as one document with positions 0..T-1, so that
            documents see those before them. Targets are the same.
        start: the index at which this sequence begins, for a run whose max_length changes on the way:
            `batches[i]` then counts windows from i - start.

    Raises:
        UserError: the corpus is shorter than one window.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        document_mask: bool = True,
        start: int = 0,
    ):
        if max_length < 1 or batch_size < 1:
            raise UserError(f"max_length and batch_size are at least 1, not {max_length} and {batch_size}.")
        if corpus.num_tokens <= max_length:
            raise UserError(
                f"the context is longer than the data: max_length is {max_length}, but the training text has "
                f"only {corpus.num_tokens} tokens. Set --train.max_length below that, or give more text."
            )
        self.corpus, self.max_length, self.batch_size = corpus, max_length, batch_size
        self.seed, self.document_mask, self.start = seed, document_mask, start
        self._lengths = corpus.spans[:, 1] - corpus.spans[:, 0]
        self._num_tokens = int(self._lengths.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # a batch may stand astride two

    @property
    def windows_per_epoch(self) -> int:
        return self._num_tokens // self.max_length

    @property
    def batches_per_epoch(self) -> float:
        """Not always whole: a batch may take its last rows from the next epoch."""
        return self.windows_per_epoch / self.batch_size

    def with_length(self, max_length: int, batch_size: int, start: int = 0) -> Batches:
        """The same documents in windows of another length, in their own order, from index `start` on."""
        return Batches(
            self.corpus,
            max_length=max_length,
            batch_size=batch_size,
            seed=self.seed,
            document_mask=self.document_mask,
            start=start,
        )

    def __getitem__(self, index: int) -> Batch:
        if index < self.start:
            raise IndexError(f"batch {index} is before the first, {self.start}")
        first = (index - self.start) * self.batch_size
        epochs, within = np.divmod(np.arange(first, first + self.batch_size), self.windows_per_epoch)
        rows = [self._windows(int(epoch), within[epochs == epoch]) for epoch in np.unique(epochs)]
        tokens, starts, records = (np.concatenate(parts) for parts in zip(*rows))
        return batch_of_rows(tokens, starts, self.document_mask, records[:, :-1])

    def __iter__(self) -> Iterator[Batch]:
        index = self.start
        while True:
            yield self[index]
            index += 1

    def _windows(self, number: int, within: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, document starts and documents [len(within), T + 1] of windows of one epoch."""
        epoch = self._epoch(number)
        begin = epoch.phase + epoch.windows[within] * self.max_length
        place = (begin[:, None] + np.arange(self.max_length + 1)) % self._num_tokens  # on the circle
        document = np.searchsorted(epoch.begins, place, side="right") - 1
        tokens = self.corpus.tokens[place + epoch.shift[document]].astype(np.int64)
        return tokens, place == epoch.begins[document], epoch.order[document]

    def _make_epoch(self, number: int) -> _Epoch:
        generator = np.random.default_rng([self.seed % 2**64, self.max_length, number])
        order = generator.permutation(len(self._lengths))
        begins = np.cumsum(self._lengths[order]) - self._lengths[order]
        return _Epoch(
            begins=begins,
            shift=self.corpus.spans[order, 0] - begins,
            phase=int(generator.integers(self._num_tokens)),
            windows=generator.permutation(self.windows_per_epoch),
            order=order,
        )


# --- evaluation ---------------------------------------------------------------------------------------------


def evaluation_windows(corpus: Corpus, max_length: int, batch_size: int) -> EvaluationWindows:
    """The fixed protocol by which a corpus is scored; see `EvaluationWindows`."""
    return EvaluationWindows(corpus, max_length, batch_size)


class EvaluationWindows:
    """Every document cut in non-overlapping windows; every token but each document's first predicted once.

    Window j of a document has inputs `document[j*T : j*T + T]` and the targets one further on: stride T, no
    overlap, as nanoGPT's loss over a full split. The first tokens of a window thus have little context, which
    makes the loss a little higher than a sliding window's; numbers are comparable only at the same T. For one
    raw span of text the windows are exactly `tokens[i*T : i*T + T + 1]`.

    Short windows share a row, each as a document of its own (best fit, in order), so with a document mask the
    loss of a document does not depend on its neighbours. What is left of a row, and of the last batch, is
    padding with the target -100; it stands behind all that is scored, where causal attention cannot see it.
    """

    def __init__(self, corpus: Corpus, max_length: int, batch_size: int):
        self.corpus, self.max_length, self.batch_size = corpus, max_length, batch_size
        lengths = np.maximum(corpus.spans[:, 1] - corpus.spans[:, 0] - 1, 0)  # predictions in each document
        self.num_targets = int(lengths.sum())
        windows = -(-lengths // max_length)
        document = np.repeat(np.arange(len(lengths)), windows)
        offset = (np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)) * max_length
        self._begin = corpus.spans[document, 0] + offset
        self._length = np.minimum(lengths[document] - offset, max_length)
        self._row, self._column = best_fit(self._length, max_length)
        self._by_row = np.argsort(self._row, kind="stable")
        self.num_rows = int(self._row.max(initial=-1)) + 1

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shape = (self.batch_size, self.max_length)
        ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        starts = np.zeros(shape, dtype=bool)
        first_row = index * self.batch_size
        first, last = np.searchsorted(self._row[self._by_row], [first_row, first_row + self.batch_size])
        for window in self._by_row[first:last]:
            row, column = self._row[window] - first_row, self._column[window]
            begin, length = self._begin[window], self._length[window]
            tokens = self.corpus.tokens[begin : begin + length + 1]
            ids[row, column : column + length] = tokens[:-1]
            targets[row, column : column + length] = tokens[1:]
            starts[row, column] = True
        return Batch(ids, targets, *layout(starts))


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay items in rows: each, in order, into the row with the least room that it fits in, else a new row.

    Returns:
        (row, column) [n]: the row of each item and where in it the item begins.
    """
    rows, columns = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    rooms: list[int] = []  # those sizes of room that some row has, sorted
    count = 0
    for item, length in enumerate(lengths.tolist()):
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[place]
        else:
            room, row, count = capacity, count, count + 1
        rows[item], columns[item] = row, capacity - room
        left = room - length
        if left:
            if not open_rows[left]:
                insort(rooms, left)
            open_rows[left].append(row)
    return rows, columns
