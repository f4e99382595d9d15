"""Every token is trained on, none twice in an epoch; every target is the next token of the same document."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zero2hero.data.batches import IGNORE, Batches, best_fit, evaluation_windows
from zero2hero.data.cache import Corpus
from zero2hero.errors import UserError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def corpus_of(lengths, gap: int = 3) -> Corpus:
    """Each token is its own address, so a batch tells where it comes from; gaps belong to no document."""
    begins = np.cumsum([gap, *(length + gap for length in lengths)])[:-1]
    spans = np.stack([begins, begins + np.array(lengths)], axis=1)
    return Corpus(np.arange(spans[-1, 1] + gap, dtype=np.uint32), spans)


def make(lengths, max_length, batch_size=1, seed=0, **options) -> Batches:
    return Batches(corpus_of(lengths), max_length=max_length, batch_size=batch_size, seed=seed, **options)


def rows(batches, first: int, count: int) -> np.ndarray:
    return np.concatenate([batches[i].ids_BT for i in range(first, first + count)])


# --- training -----------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_an_epoch_holds_every_token_once_but_for_the_remainder(lengths, max_length, seed, epoch):
    assume(sum(lengths) > max_length)
    batches = make(lengths, max_length, seed=seed)
    count = batches.windows_per_epoch
    seen = rows(batches, epoch * count, count).ravel()
    corpus = batches.corpus
    everything = np.concatenate([corpus.document(i) for i in range(corpus.num_documents)])
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(everything.tolist())
    assert len(everything) - len(seen) == len(everything) % max_length < max_length


@given(LENGTHS, st.integers(1, 50), st.integers(0, 60))
@settings(deadline=None, max_examples=150)
def test_targets_are_next_tokens_and_never_the_first_of_a_document(lengths, max_length, index):
    assume(sum(lengths) > max_length)
    batches = make(lengths, max_length, batch_size=3)
    batch = batches[index]
    last = set((batches.corpus.spans[:, 1] - 1).tolist())
    for token, target in zip(batch.ids_BT.ravel().tolist(), batch.targets_BT.ravel().tolist()):
        assert target == (IGNORE if token in last else token + 1)


@given(LENGTHS, st.integers(1, 50), st.integers(0, 60))
@settings(deadline=None, max_examples=100)
def test_positions_and_document_ids(lengths, max_length, index):
    assume(sum(lengths) > max_length)
    batches = make(lengths, max_length, batch_size=2)
    batch = batches[index]
    firsts = set(batches.corpus.spans[:, 0].tolist())
    crosses = False
    for row, (positions, documents) in enumerate(zip(batch.positions_BT.tolist(), batch.document_ids_BT.tolist())):
        position, document = -1, 0
        for column, token in enumerate(batch.ids_BT[row].tolist()):
            if column and token in firsts:
                position, document, crosses = -1, document + 1, True
            position += 1
            assert (positions[column], documents[column]) == (position, document)
    assert batch.crosses_documents == crosses
    plain = make(lengths, max_length, batch_size=2, document_mask=False)[index]
    assert (plain.ids_BT == batch.ids_BT).all()
    assert (plain.targets_BT == batch.targets_BT).all()
    assert (plain.document_ids_BT == 0).all()
    assert (plain.positions_BT == np.arange(max_length)).all()


@given(LENGTHS, st.integers(1, 20), st.integers(0, 100), st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_windows_do_not_depend_on_batch_size_or_on_what_was_asked_before(lengths, max_length, first, batch_size):
    assume(sum(lengths) > max_length)
    one = make(lengths, max_length)
    many = make(lengths, max_length, batch_size=batch_size)
    many[first + 3]
    expected = np.stack([one[first * batch_size + b].ids_BT[0] for b in reversed(range(batch_size))])[::-1]
    assert (many[first].ids_BT == expected).all()


def test_order_is_new_in_every_epoch_and_for_every_seed():
    batches = make([7] * 40, 10)
    count = batches.windows_per_epoch
    orders = {rows(batches, epoch * count, count).tobytes() for epoch in range(20)}
    orders |= {rows(make([7] * 40, 10, seed=seed), 0, count).tobytes() for seed in range(1, 20)}
    assert len(orders) == 39
    # neighbours in the visiting order are not neighbours in the text, even for one long document
    book = make([4001], 10)
    starts = np.sort(rows(book, 0, 400)[:, 0]).tolist(), rows(book, 0, 400)[:, 0].tolist()
    assert starts[0] != starts[1]
    assert np.mean(np.diff(starts[1]) == 10) < 0.02


def test_what_one_epoch_leaves_out_another_brings():
    batches = make([5, 3, 9, 2], 8)  # 19 tokens: 3 of them are left out each time
    count = batches.windows_per_epoch
    left_out = [19 - len(np.unique(rows(batches, epoch * count, count))) for epoch in range(12)]
    assert left_out == [3] * 12
    assert len(np.unique(rows(batches, 0, 12 * count))) == 19


def test_windows_start_evenly_on_the_circle():
    """The phase is uniform: each token of one document begins a window about equally often."""
    batches = make([64], 8)
    begins = np.bincount([batches[i].ids_BT[0, 0] - 3 for i in range(8 * 1600)], minlength=64)
    assert abs(begins - 200).max() < 5 * np.sqrt(200)


def test_phases_of_a_length_schedule():
    short = make([30] * 20, 8, batch_size=4)
    long = short.with_length(32, 1, start=100)
    assert long[100].ids_BT.shape == (1, 32)
    seen = rows(long, 100, long.windows_per_epoch)
    assert len(np.unique(seen)) == seen.size
    with pytest.raises(IndexError):
        long[99]
    first = iter(long)
    assert (next(first).ids_BT == long[100].ids_BT).all()
    assert short.batches_per_epoch == 600 // 8 / 4


def test_a_context_longer_than_the_data():
    with pytest.raises(UserError, match=r"max_length is 12, but the training text has only 12 tokens.*max_length"):
        Batches(corpus_of([5, 7]), max_length=12, batch_size=1, seed=0)
    assert Batches(corpus_of([5, 7]), max_length=11, batch_size=5, seed=0)[3].ids_BT.shape == (5, 11)
    with pytest.raises(UserError, match="at least 1"):
        Batches(corpus_of([5, 7]), max_length=4, batch_size=0, seed=0)


def test_tensors():
    torch = pytest.importorskip("torch")
    batch = make([9, 9], 8, batch_size=2)[0]
    tensors = batch.to("cpu")
    for name in ("ids_BT", "targets_BT", "positions_BT", "document_ids_BT"):
        tensor = getattr(tensors, name)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        assert tensor.tolist() == getattr(batch, name).tolist()
    assert tensors.crosses_documents == batch.crosses_documents


# --- evaluation ---------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 50), st.integers(1, 5))
@settings(deadline=None, max_examples=150)
def test_evaluation_predicts_every_token_once(lengths, max_length, batch_size):
    corpus = corpus_of(lengths)
    windows = evaluation_windows(corpus, max_length, batch_size)
    predicted = []
    for batch in windows:
        assert batch.ids_BT.shape == (batch_size, max_length)
        for row in range(batch_size):
            context: list[int] = []
            for column in range(max_length):
                if column == 0 or batch.document_ids_BT[row, column] != batch.document_ids_BT[row, column - 1]:
                    context = []
                assert batch.positions_BT[row, column] == len(context)
                context.append(int(batch.ids_BT[row, column]))
                target = int(batch.targets_BT[row, column])
                if target != IGNORE:
                    predicted.append(target)
                    begin, end = next(span for span in corpus.spans if span[0] <= target < span[1])
                    start = begin + (target - 1 - begin) // max_length * max_length
                    assert context == list(range(start, target))  # all of the window before it, and no more
    expected = [token for begin, end in corpus.spans for token in range(begin + 1, end)]
    assert sorted(predicted) == expected
    assert windows.num_targets == len(expected)


def test_evaluation_of_a_raw_span_is_the_plain_protocol():
    corpus = corpus_of([1000])
    tokens = corpus.document(0).astype(np.int64)
    windows = evaluation_windows(corpus, 64, 3)
    ids = np.concatenate([batch.ids_BT for batch in windows])
    targets = np.concatenate([batch.targets_BT for batch in windows])
    for row in range(999 // 64):
        assert (ids[row] == tokens[row * 64 : row * 64 + 64]).all()
        assert (targets[row] == tokens[row * 64 + 1 : row * 64 + 65]).all()
    assert (targets[15] != IGNORE).sum() == 999 - 15 * 64
    assert not any(batch.crosses_documents for batch in windows)


def test_evaluation_of_nothing():
    assert list(evaluation_windows(Corpus(np.zeros(3, np.uint16), np.zeros((0, 2), np.int64)), 8, 2)) == []
    assert list(evaluation_windows(corpus_of([1, 1]), 8, 2)) == []


@given(st.lists(st.integers(1, 20), max_size=80))
@settings(deadline=None, max_examples=100)
def test_best_fit_overlaps_nothing_and_wastes_little(lengths):
    row, column = best_fit(np.array(lengths, dtype=np.int64), 20)
    used = np.zeros((len(lengths) + 1, 20), dtype=int)
    for r, c, length in zip(row, column, lengths):
        assert c + length <= 20
        used[r, c : c + length] += 1
    assert used.max() <= 1
    filled = used.sum(axis=1)[: row.max(initial=-1) + 1]
    assert (filled[:-1] + filled[1:] > 20).all()  # a later row's first item did not fit in an earlier one
