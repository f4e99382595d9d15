"""Settings are checked; each transformation does what its definition says; draws follow the distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from zero2hero.errors import UserError
from zero2hero.generate.request import Request, SamplingParams, Sequence
from zero2hero.generate.rows import History, Row, choose, transform
from zero2hero.generate.sampling import (
    SamplingConfig,
    apply_min_p,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    draw_number,
    random_stream,
    sample,
)

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": NAN},
        {"temperature": INF},
        {"temperature": "hot"},
        {"top_p": 1.5},
        {"top_p": NAN},
        {"min_p": -0.1},
        {"top_k": -1},
        {"top_k": 2.5},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"repetition_penalty": 0},
        {"repetition_penalty": NAN},
        {"seed": -1},
        {"num_return_sequences": 0},
        {"stop": ("",)},
        {"stop": (1,)},
        {"do_sample": "yes"},
    ],
)
def test_a_value_out_of_range_is_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


def test_contradictory_settings_are_refused():
    with pytest.raises(UserError, match="temperature"):
        SamplingConfig(do_sample=True, temperature=0)
    with pytest.raises(UserError, match="num_return_sequences"):
        SamplingConfig(temperature=0, num_return_sequences=2)


def test_temperature_zero_and_do_sample_false_are_greedy():
    assert SamplingConfig(temperature=0).greedy
    assert SamplingConfig(do_sample=False, temperature=0.7).greedy
    assert not SamplingConfig().greedy
    assert SamplingConfig(stop="END").stop == ("END",)


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero()[:, 0].tolist()


def test_cut_offs_on_a_distribution_known_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert kept(apply_top_k(logits, 2)) == [0, 1]
    assert kept(apply_top_k(logits, 99)) == [0, 1, 2, 3]
    assert kept(apply_top_p(logits, 0.6)) == [0, 1]
    assert kept(apply_top_p(logits, 0.0)) == [0]
    assert kept(apply_min_p(logits, 0.29)) == [0, 1, 2]
    assert kept(apply_min_p(logits, 1.0)) == [0]
    tied = torch.zeros(1, 5)
    assert kept(apply_top_k(tied, 1)) == [0, 1, 2, 3, 4]  # ties with the k-th stay
    assert len(kept(apply_top_p(tied, 0.5))) == 3


def test_the_repetition_penalty_lowers_seen_tokens_of_either_sign():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert apply_repetition_penalty(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    n = 20_000
    streams = [random_stream(i, (), 0) for i in range(n)]
    counts = Counter(sample(probabilities.log().expand(n, -1), [draw_number(stream) for stream in streams]).tolist())
    assert counts.keys() <= {0, 2, 3}  # never a token of probability 0
    chi_square = sum((counts[i] - n * float(probabilities[i])) ** 2 / (n * float(probabilities[i])) for i in (0, 2, 3))
    assert chi_square < 13.8  # 2 degrees of freedom: passed once in 1,000 by chance


class Constant:
    """A random stream that always gives the same 24 bits."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def getrandbits(self, count: int) -> int:
        return self.bits


@pytest.mark.parametrize("vocabulary", [2, 1000, 50_257])
def test_the_ends_of_the_distribution_are_not_overrun(vocabulary):
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = logits[0, -1] = -INF
    lowest, highest = (int(sample(logits, [draw_number(Constant(bits))])) for bits in (0, 2**24 - 1))
    if vocabulary > 2:
        assert 0 < lowest < vocabulary - 1
        assert 0 < highest < vocabulary - 1


def test_a_row_draws_the_same_alone_and_in_a_batch():
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))
    together = sample(logits, [draw_number(random_stream(7, (i,), 0)) for i in range(16)])
    alone = [int(sample(logits[i : i + 1], [draw_number(random_stream(7, (i,), 0))])) for i in range(16)]
    assert together.tolist() == alone
    assert len(set(alone)) > 8  # the streams differ


def test_streams_depend_on_seed_prompt_and_sample_only():
    def first(*key):
        return random_stream(*key).getrandbits(24)

    assert first(1, [5, 6], 0) == first(1, (5, 6), 0)
    assert len({first(1, [5, 6], 0), first(2, [5, 6], 0), first(1, [5, 7], 0), first(1, [5, 6], 1)}) == 4
    assert first(None, [1], 0) != first(None, [1], 0)


def rows_of(count: int, vocab_size: int, **settings) -> list[Row]:
    rows = []
    for i in range(count):
        request = Request([5], SamplingParams(**settings), sample=i)
        sequence = Sequence(request, [5], 9, frozenset(), None)
        sequence.history = History(sequence, vocab_size, torch.device("cpu"))
        rows.append(Row(sequence, []))
    return rows


def test_recorded_logprobs_are_those_of_the_distribution_drawn_from():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(2))
    rows = rows_of(8, 50, temperature=0.7, top_k=10, top_p=0.9, seed=3)
    tokens, logprobs = choose(logits, rows)
    expected = transform(logits, rows).log_softmax(-1)[range(8), tokens]
    torch.testing.assert_close(torch.tensor(logprobs), expected)
    tokens, logprobs = choose(logits, rows_of(8, 50, temperature=0))
    assert tokens == logits.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(logprobs), logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_numbers_are_reported(temperature):
    with pytest.raises(UserError, match="NaN"):
        choose(torch.full((1, 9), NAN), rows_of(1, 9, temperature=temperature))
