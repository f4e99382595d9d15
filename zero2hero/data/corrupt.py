"""Spoil a text and ask for what was spoilt: how models that see both sides learn.

Masked language modelling (Devlin et al. 2018, BERT, arXiv 1810.04805): 15 % of the tokens are to be guessed. Of
these 80 % are replaced by [MASK], 10 % by a random token, and 10 % stay, since at use nothing is masked. With whole
words, the pieces of a word are chosen together: a piece is too easy to guess from the others.

Span corruption (Raffel et al. 2019, T5, arXiv 1910.10683): spans of 3 tokens on average, 15 % in all, each replaced
by one sentinel; the target lists the sentinels, each followed by the span that it stands for.

Both are pure functions of the seed and the row's number, as the batches below them are (see batches.py): a run resumes
exactly, and eight batches of one row are one batch of eight.

T time. Arrays are numpy.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from zero2hero.data.batches import IGNORE, Batch
from zero2hero.data.pairs import Seq2SeqBatch, shift_right
from zero2hero.errors import UserError


class Rows(Protocol):
    """Batches of text by number; see `Batches`."""

    @property
    def batch_size(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


def mask_tokens(
    ids_T: np.ndarray,
    eligible_T: np.ndarray,
    mask_id: int,
    vocab_size: int,
    generator: np.random.Generator,
    *,
    rate: float = 0.15,
    starts_T: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One row's corrupted inputs and targets [T], -100 where nothing is to be guessed.

    Args:
        eligible_T: False for tokens that are never chosen (padding, [CLS], [SEP]).
        starts_T: True where a word begins; whole words are then chosen, until their tokens reach the rate. By default
            every token is a word of its own.
    """
    places = np.flatnonzero(eligible_T)
    targets = np.full_like(ids_T, IGNORE)
    if not len(places):
        return ids_T.copy(), targets
    begins = np.ones(len(places), dtype=bool)
    if starts_T is not None:
        begins[1:] = starts_T[places[1:]] | (np.diff(places) > 1)
    word = np.cumsum(begins) - 1
    lengths = np.bincount(word)
    order = generator.permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]  # tokens chosen before this word's turn
    chosen = np.zeros(len(lengths), dtype=bool)
    chosen[order[before < max(1, round(rate * len(places)))]] = True
    places = places[chosen[word]]
    targets[places] = ids_T[places]
    corrupted, fate = ids_T.copy(), generator.random(len(places))
    corrupted[places[fate < 0.8]] = mask_id
    random = places[(fate >= 0.8) & (fate < 0.9)]
    corrupted[random] = generator.integers(vocab_size, size=len(random))
    return corrupted, targets


@dataclass(frozen=True)
class MaskedBatches:
    """`batches[i]`: the rows of `rows[i]` with masked inputs; targets are the words to guess.

    Args:
        special_ids: tokens that are never masked.
        starts_word_V: for whole words: by token id, whether a word begins with it. None masks token by token.
    """

    rows: Rows
    mask_id: int
    vocab_size: int
    seed: int
    special_ids: Collection[int] = ()
    rate: float = 0.15
    starts_word_V: np.ndarray | None = None

    def __getitem__(self, index: int) -> Batch:
        batch = self.rows[index]
        eligible = ~np.isin(batch.ids_BT, list(self.special_ids))
        starts = None
        if self.starts_word_V is not None:
            starts = self.starts_word_V[batch.ids_BT] | (batch.positions_BT == 0)
        corrupted, targets = zip(
            *(
                mask_tokens(
                    ids, eligible[row], self.mask_id, self.vocab_size, _generator(self.seed, index, row, self.rows),
                    rate=self.rate, starts_T=None if starts is None else starts[row],
                )
                for row, ids in enumerate(batch.ids_BT)
            )
        )  # fmt: skip
        return replace(batch, ids_BT=np.stack(corrupted), targets_BT=np.stack(targets))


def _generator(seed: int, index: int, row: int, rows: Rows) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, index * rows.batch_size + row])


# --- spans --------------------------------------------------------------------------------------------------


def span_counts(length: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How many of `length` tokens are spoilt, in how many spans."""
    spoilt = min(max(round(length * rate), 1), length - 1)
    return spoilt, min(max(round(spoilt / mean_span), 1), length - spoilt)


def span_lengths(length: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """(input length, target length) of `length` tokens, the end-of-text token of each included."""
    spoilt, spans = span_counts(length, rate, mean_span)
    return length - spoilt + spans + 1, spoilt + spans + 1


def tokens_for(input_length: int, rate: float = 0.15, mean_span: float = 3.0) -> int:
    """The most tokens whose corrupted input has at most `input_length`."""
    length = 2
    while span_lengths(length + 1, rate, mean_span)[0] <= input_length:
        length += 1
    return length


def choose_spans(
    length: int, generator: np.random.Generator, *, rate: float = 0.15, mean_span: float = 3.0
) -> np.ndarray:
    """[length] bool: True in the spoilt spans. Kept and spoilt spans alternate; the first is kept, the last spoilt."""
    spoilt, spans = span_counts(length, rate, mean_span)
    parts = [_random_parts(length - spoilt, spans, generator), _random_parts(spoilt, spans, generator)]
    return np.repeat(np.arange(2 * spans) % 2 == 1, np.stack(parts, 1).reshape(-1))


def _random_parts(total: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` whole numbers of at least 1 that add up to `total`, each such list as likely as any other."""
    cuts = np.sort(generator.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt_spans(ids_T: np.ndarray, spoilt_T: np.ndarray, first_sentinel: int, eos_id: int) -> tuple[Any, Any]:
    """(inputs, targets): each span gives way to a sentinel in one and is kept in the other. Both end with eos_id.

    Sentinels count down from `first_sentinel`, as T5's vocabulary has them.
    """
    return (
        _with_sentinels(ids_T, spoilt_T, first_sentinel, eos_id),
        _with_sentinels(ids_T, ~spoilt_T, first_sentinel, eos_id),
    )


def _with_sentinels(ids_T: np.ndarray, gone_T: np.ndarray, first_sentinel: int, eos_id: int) -> np.ndarray:
    begins = gone_T & ~np.concatenate([[False], gone_T[:-1]])
    sentinels = first_sentinel - (np.cumsum(begins) - 1)
    return np.append(np.where(begins, sentinels, ids_T)[~gone_T | begins], eos_id)


@dataclass(frozen=True)
class SpanBatches:
    """`batches[i]`: the rows of `rows[i]` (as many tokens in each) with corrupted spans, as a `Seq2SeqBatch`.

    Documents of a row are one text, as in T5's pretraining.
    """

    rows: Rows
    first_sentinel: int
    eos_id: int
    start_id: int
    seed: int
    num_sentinels: int = 100
    rate: float = 0.15
    mean_span: float = 3.0

    def __getitem__(self, index: int) -> Seq2SeqBatch:
        ids_BT = self.rows[index].ids_BT
        length = ids_BT.shape[1]
        spans = span_counts(length, self.rate, self.mean_span)[1]
        if spans > self.num_sentinels:
            raise UserError(
                f"rows of {length} tokens have {spans} spans, and the vocabulary has {self.num_sentinels} sentinels"
            )
        pairs = []
        for row, ids in enumerate(ids_BT):
            generator = _generator(self.seed, index, row, self.rows)
            spoilt = choose_spans(length, generator, rate=self.rate, mean_span=self.mean_span)
            pairs.append(corrupt_spans(ids, spoilt, self.first_sentinel, self.eos_id))
        inputs, targets = (np.stack(side).astype(np.int64) for side in zip(*pairs))
        return Seq2SeqBatch(inputs, shift_right(targets, self.start_id), targets)
