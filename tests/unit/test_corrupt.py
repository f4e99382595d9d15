"""Masked words and corrupted spans: exact on examples by hand, right on average, the same for the same seed and row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zero2hero.data.batches import IGNORE, Batch
from zero2hero.data.corrupt import (
    MaskedBatches,
    SpanBatches,
    choose_spans,
    corrupt_spans,
    mask_tokens,
    span_counts,
    span_lengths,
    tokens_for,
)
from zero2hero.data.pairs import seq2seq_batch
from zero2hero.errors import UserError
from zero2hero.model_configs import EncoderConfig
from zero2hero.models import Encoder
from zero2hero.train.objectives import masked_lm

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, MASK, CLS, SEP = 1000, 3, 1, 2


class Text:
    """Endless rows of random words; row g of the run is a function of g."""

    def __init__(self, batch_size: int, length: int = 100) -> None:
        self.batch_size, self.length = batch_size, length

    def __getitem__(self, index: int) -> Batch:
        rows = [np.random.default_rng(index * self.batch_size + r) for r in range(self.batch_size)]
        ids = np.stack([row.integers(10, VOCAB, size=self.length) for row in rows])
        ids[:, 0], ids[:, -1] = CLS, SEP
        positions = np.tile(np.arange(self.length), (self.batch_size, 1))
        return Batch(ids, ids, positions, np.zeros_like(ids))


def masked(batch_size: int = 8, **options) -> MaskedBatches:
    return MaskedBatches(Text(batch_size), MASK, VOCAB, **{"seed": 5, "special_ids": (CLS, SEP), **options})


def test_shares_of_masks_random_words_and_words_left():
    plain, rows = Text(100), masked(100)
    fates = {"mask": 0, "kept": 0, "random": 0}
    for index in range(20):
        before, after = plain[index].ids_BT, rows[index]
        chosen = after.targets_BT != IGNORE
        assert (chosen.sum(1) == 15).all()  # 15 % of the 98 words of each row, rounded
        assert (after.targets_BT[chosen] == before[chosen]).all()
        assert (after.ids_BT[~chosen] == before[~chosen]).all()
        assert not chosen[:, 0].any()
        assert not chosen[:, -1].any()
        fates["mask"] += int((after.ids_BT[chosen] == MASK).sum())
        fates["kept"] += int((after.ids_BT[chosen] == before[chosen]).sum())
    total = 20 * 100 * 15
    fates["random"] = total - fates["mask"] - fates["kept"]
    for fate, share in (("mask", 0.8), ("kept", 0.1), ("random", 0.1)):
        deviation = (total * share * (1 - share)) ** 0.5
        assert abs(fates[fate] - total * share) < 4 * deviation, fates


def test_every_place_is_chosen_as_often():
    chosen = sum((masked(100)[i].targets_BT != IGNORE).sum(0) for i in range(20))
    expected, deviation = 2000 * 15 / 98, (2000 * 0.153 * 0.847) ** 0.5
    assert (abs(chosen[1:-1] - expected) < 5 * deviation).all()


def test_masking_depends_on_seed_and_row_alone():
    one, eight = masked(1), masked(8)
    for row in range(8):
        a, b = one[16 + row], eight[2]
        assert (a.ids_BT[0] == b.ids_BT[row]).all()
        assert (a.targets_BT[0] == b.targets_BT[row]).all()
    assert (eight[2].ids_BT == masked(8)[2].ids_BT).all()
    assert (masked(8, seed=6)[2].targets_BT != eight[2].targets_BT).any()
    assert (eight[3].targets_BT != eight[2].targets_BT).any()


def test_whole_words_are_chosen_whole():
    starts = np.arange(VOCAB) % 3 == 0  # a third of the pieces begin a word
    rows = masked(50, starts_word_V=starts)
    total = 0
    for index in range(10):
        before, after = Text(50)[index].ids_BT, rows[index]
        for ids, targets in zip(before, after.targets_BT):
            chosen = targets[1:-1] != IGNORE
            begins = starts[ids[1:-1]]
            assert not (chosen[1:] != chosen[:-1])[~begins[1:]].any()  # it changes only where a word begins
            assert chosen.sum() >= 15
            total += chosen.sum()
    assert 15 <= total / 500 < 18


def test_a_text_without_words_has_no_targets():
    ids = np.array([CLS, SEP])
    corrupted, targets = mask_tokens(ids, np.zeros(2, bool), MASK, VOCAB, np.random.default_rng(0))
    assert (corrupted == ids).all()
    assert (targets == IGNORE).all()


def test_loss_of_masked_words_is_their_cross_entropy_and_trains_everything():
    model = Encoder(EncoderConfig(VOCAB, 16, 2, 2, max_position_embeddings=100, hidden_dropout_prob=0,
                                  attention_probs_dropout_prob=0))  # fmt: skip
    batch = masked(4)[0].to("cpu")
    torch.nn.init.normal_(model.head.decoder.bias)
    loss = masked_lm(model, batch)
    logits = model.logits(model(batch.ids_BT))
    want = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
    assert loss.weight == 60
    assert torch.allclose(loss.sum, want, rtol=1e-5)
    got = torch.autograd.grad(loss.sum, list(model.parameters()))
    expected = torch.autograd.grad(want, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), got, expected):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), name
        if name not in ("layers.0.self_attn.k_proj.bias", "layers.1.self_attn.k_proj.bias"):  # cancels in the softmax
            assert a.abs().max() > 1e-4, name


# --- spans --------------------------------------------------------------------------------------------------


def test_spans_by_hand():
    """'Thank you for inviting me to your party last week' of the T5 paper, figure 2; sentinels 99, 98, ..., end 1."""
    ids = np.arange(10, 20)
    spoilt = np.zeros(10, bool)
    spoilt[[2, 3, 8]] = True
    inputs, targets = corrupt_spans(ids, spoilt, 99, 1)
    assert inputs.tolist() == [10, 11, 99, 14, 15, 16, 17, 98, 19, 1]
    assert targets.tolist() == [99, 12, 13, 98, 18, 97, 1]


@pytest.mark.parametrize("length", [2, 3, 5, 10, 64, 113, 568])
def test_spans_add_up(length):
    spoilt, spans = span_counts(length)
    for seed in range(20):
        chosen = choose_spans(length, np.random.default_rng(seed))
        assert chosen.sum() == spoilt
        assert not chosen[0]
        assert chosen[-1]
        assert (np.diff(chosen.astype(int)) == 1).sum() == spans
        inputs, targets = corrupt_spans(np.arange(length), chosen, 10**6, -1)
        assert (len(inputs), len(targets)) == span_lengths(length)
        put_back = [int(i) for i in inputs[:-1]]
        for piece in reversed(_pieces(targets[:-1].tolist())):
            place = put_back.index(piece[0])
            put_back[place : place + 1] = piece[1:]
        assert put_back == list(range(length))


def _pieces(targets: list[int]) -> list[list[int]]:
    pieces: list[list[int]] = []
    for token in targets:
        if token > 10**5:
            pieces.append([])
        pieces[-1].append(token)
    return pieces


def test_lengths_are_those_of_t5():
    """Raffel et al. pretrain on 512 input tokens: 568 tokens of text, 114 of targets."""
    assert tokens_for(512) == 568
    assert span_lengths(568) == (512, 114)
    assert span_counts(568) == (85, 28)


def test_every_token_is_spoilt_about_as_often():
    """But for the ends, which are always kept and always spoilt; and spans are of 3 tokens on average."""
    chosen = np.stack([choose_spans(100, np.random.default_rng(seed)) for seed in range(3000)])
    assert chosen.mean() == pytest.approx(0.15)
    assert (abs(chosen[:, 20:80].mean(0) - 0.15) < 0.04).all()
    lengths = np.diff(np.flatnonzero(np.diff(np.pad(chosen, ((0, 0), (1, 1))).astype(int).reshape(-1))))[::2]
    assert lengths.mean() == pytest.approx(3.0)
    assert lengths.std() > 1.5


def spans(batch_size: int = 4, length: int = 100, **options) -> SpanBatches:
    settings = {"first_sentinel": 999, "eos_id": 1, "start_id": 0, "seed": 3, **options}
    return SpanBatches(Text(batch_size, length), **settings)


def test_batches_of_spans():
    batch = spans()[2]
    assert batch.ids_BS.shape == (4, span_lengths(100)[0])
    assert batch.targets_BT.shape == (4, span_lengths(100)[1])
    assert (batch.targets_BT[:, 0] == 999).all()
    assert (batch.targets_BT[:, -1] == 1).all()
    assert (batch.decoder_ids_BT[:, 0] == 0).all()
    assert (batch.decoder_ids_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
    for row in range(4):
        assert (spans(1)[8 + row].ids_BS[0] == batch.ids_BS[row]).all()
        assert (spans(1)[8 + row].targets_BT[0] == batch.targets_BT[row]).all()
    assert (spans(seed=4)[2].ids_BS != batch.ids_BS).any()
    assert batch.to("cpu").ids_BS.dtype == torch.int64


def test_too_few_sentinels():
    with pytest.raises(UserError, match="5 spans, and the vocabulary has 4"):
        spans(num_sentinels=4)[0]


def test_pairs_are_padded_and_shifted():
    batch = seq2seq_batch([[5, 6, 7], [8]], [[9, 1], [4, 3, 2, 1]], start_id=0)
    assert batch.ids_BS.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.targets_BT.tolist() == [[9, 1, IGNORE, IGNORE], [4, 3, 2, 1]]
    assert batch.decoder_ids_BT.tolist() == [[0, 9, 1, 0], [0, 4, 3, 2]]
    assert dataclasses.replace(batch, attention_mask_BS=None).to("cpu").attention_mask_BS is None
