"""Examples of different lengths as training batches: several whole ones in a row, or one in each.

Packing. Padding is computed and thrown away; of ragged conversations it is most of a batch. So in every epoch the
examples are sorted by length and each, the longest first, goes into the row with the least room that it fits in
("best-fit decreasing", Ding et al. 2024, arXiv 2404.10830, "Fewer truncations improve language modeling"). No example
is split. In its row each is a document of its own: positions begin anew and attention stays inside it, so that its
gradient is what it would be alone. Examples of equal length are shuffled before, the rows after.

Without packing a row holds one example, and rows of like length stand near each other.

As with `Batches`, `batches[i]` is a function of the seed and i alone, and row number g of the run stands in batch
g // batch_size, whatever the batch size.

B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from zero2hero.data.batches import IGNORE, Batch, best_fit, layout
from zero2hero.data.examples import Example
from zero2hero.errors import UserError

_ALIKE = 256  # rows among which those of like length are brought together, without packing
_TOGETHER = 16  # rows that then stay together
_MULTIPLE = 32  # a batch is as wide as its fullest row, rounded up, so that few widths occur


class PackedBatches:
    """An endless sequence of training batches: `batches[i]` for any i >= 0.

    Args:
        examples: each of at least two tokens.
        max_length: the most tokens of an example; a row has room for one token less, as the last is only predicted.
        batch_size: B, rows.
        seed: of the order.
        packing: several examples in a row, or one.

    Raises:
        UserError: no example, or one that is too long or too short; it names the record.
    """

    def __init__(
        self, examples: Sequence[Example], max_length: int, batch_size: int, seed: int, packing: bool = True
    ) -> None:
        if max_length < 2 or batch_size < 1:
            raise UserError(f"max_length is at least 2 and batch_size 1, not {max_length} and {batch_size}.")
        if not examples:
            raise UserError("there is no example to train on.")
        for example in examples:
            if not 2 <= len(example) <= max_length:
                raise UserError(
                    f"the example of record {example.number} has {len(example)} tokens; there must be 2 to max_length "
                    f"{max_length}. Cut it first (encode_records does)."
                )
        self.examples, self.max_length, self.batch_size = examples, max_length, batch_size
        self.seed, self.packing = seed, packing
        self._lengths = np.array([len(example) - 1 for example in examples])  # inputs
        self._rows = lru_cache(maxsize=2)(self._rows_of_epoch)  # a batch may stand astride two
        self.rows_per_epoch = len(self._rows(0))

    @property
    def batches_per_epoch(self) -> float:
        """Not always whole: a batch may take its last rows from the next epoch."""
        return self.rows_per_epoch / self.batch_size

    def __getitem__(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(index)
        first = index * self.batch_size
        numbers = (divmod(row, self.rows_per_epoch) for row in range(first, first + self.batch_size))
        rows = [self._rows(epoch)[row] for epoch, row in numbers]
        return batch_of_examples([[self.examples[i] for i in row] for row in rows], self.max_length - 1)

    def __iter__(self) -> Iterator[Batch]:
        index = 0
        while True:
            yield self[index]
            index += 1

    def _rows_of_epoch(self, epoch: int) -> list[list[int]]:
        """The examples' numbers in each row."""
        generator = np.random.default_rng([self.seed % 2**64, epoch])
        order = generator.permutation(len(self.examples))
        if self.packing:
            rows = pack(self._lengths, self.max_length - 1, order)
            return [rows[i] for i in generator.permutation(len(rows))]
        blocks = []
        for first in range(0, len(order), _ALIKE):
            alike = order[first : first + _ALIKE]
            alike = alike[np.argsort(self._lengths[alike], kind="stable")]
            blocks += [alike[i : i + _TOGETHER] for i in range(0, len(alike), _TOGETHER)]
        return [[int(i)] for block in generator.permutation(len(blocks)) for i in blocks[block]]


def evaluation_batches(examples: Sequence[Example], max_length: int, batch_size: int) -> list[Batch]:
    """Every example once, packed, in a fixed order; the last batch may have fewer rows."""
    if not examples:
        return []
    rows = pack(np.array([len(example) - 1 for example in examples]), max_length - 1, np.arange(len(examples)))
    return [
        batch_of_examples([[examples[i] for i in row] for row in rows[first : first + batch_size]], max_length - 1)
        for first in range(0, len(rows), batch_size)
    ]


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray) -> list[list[int]]:
    """Rows of items by best-fit decreasing; `order` decides among items of equal length."""
    order = order[np.argsort(-lengths[order], kind="stable")]
    row, _ = best_fit(lengths[order], capacity)
    rows: list[list[int]] = [[] for _ in range(int(row.max()) + 1)]
    for item, place in zip(order.tolist(), row.tolist()):
        rows[place].append(item)
    return rows


def batch_of_examples(rows: list[list[Example]], width: int) -> Batch:
    """Rows of examples, side by side, as a batch as wide as the fullest, rounded up within `width`.

    Targets of weight 0 are ignored; `weights_BT` is None where all others weigh 1. What is left of a row stands behind
    all that is trained, where causal attention cannot see it.
    """
    longest = max(sum(len(example) - 1 for example in row) for row in rows)
    shape = len(rows), min(-(-longest // _MULTIPLE) * _MULTIPLE, max(width, longest))
    ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    weights, starts, records = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool), np.zeros(shape, int)
    for r, row in enumerate(rows):
        column = 0
        for example in row:
            place = slice(column, column + len(example) - 1)
            ids[r, place], weights[r, place] = example.ids[:-1], example.weights[1:]
            targets[r, place] = np.where(example.weights[1:] > 0, example.ids[1:], IGNORE)
            starts[r, column], records[r, column:] = True, example.number
            column = place.stop
    plain = bool(((weights == 0) | (weights == 1)).all())
    return Batch(ids, targets, *layout(starts), records, None if plain else weights)
