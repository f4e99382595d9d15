"""pass@k and maj@k against their definitions, and what they make of a model."""

import itertools
import math
from statistics import fmean

import pytest

from zero2hero.align.rewards import load_rewards
from zero2hero.config import DecoderConfig
from zero2hero.evaluate.pass_at_k import Attempts, attempt, maj_at_k, pass_at_k, table, verdict
from zero2hero.language_model import LanguageModel
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer


def test_pass_at_k_is_the_share_of_groups_with_a_right_one():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c > n:
                continue
            groups = itertools.combinations([True] * c + [False] * (n - c), k)
            assert pass_at_k(n, c, k) == pytest.approx(fmean(any(group) for group in groups))
    assert pass_at_k(10_000, 1, 5000) == pytest.approx(0.5)
    for wrong in ((4, 2, 5), (4, 5, 1), (4, 2, 0)):
        with pytest.raises(ValueError, match="needs at least"):
            pass_at_k(*wrong)


def test_maj_at_k():
    answers, right = [7, 7, 8, 9, 9, 7], [True, True, False, False, False, True]
    assert maj_at_k(answers, right, 3) == 0.5  # 7 wins, 9 wins
    assert maj_at_k([7, 8], [True, False], 2) == 0.5  # a tie
    assert maj_at_k([7, 7, 7, 8], [True, True, True, False], 4) == 1.0
    assert maj_at_k([None, None, 7], [False, False, True], 3) == 1.0  # None does not vote
    assert maj_at_k([None], [False], 1) == 0.0
    assert maj_at_k(answers, right, 1) == fmean(right)


@pytest.fixture(scope="module")
def lm():
    tokenizer = Tokenizer.train(["0123456789 ab"], vocab_size=300)
    shape = DecoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = Decoder(shape.derived())
    init_weights(model, 0)
    return LanguageModel(model, tokenizer)


def test_attempts(lm):
    """What is right is what the first reward says; counts agree with counting."""
    seen = []

    def lucky(completions, answer, completion_ids):
        seen.extend(zip(completions, answer, completion_ids))
        return [float(len(text) % 3 == want) for text, want in zip(completions, answer)]

    def short(completions):
        return [0.5 if len(text) < 5 else 0.0 for text in completions]

    problems = [(f"{i} + a", {"answer": i % 3}) for i in range(70)]
    found = attempt(lm, problems, load_rewards([lucky, short]), samples=7, max_new_tokens=6, seed=3)
    assert len(seen) == 70 * 8
    right = [[len(t) % 3 == want for t, want, _ in seen[i : i + 8]] for i in range(0, len(seen), 8)]
    assert found.accuracy == pytest.approx(fmean(row[0] for row in right))
    assert found.pass_at == {k: pytest.approx(fmean(pass_at_k(7, sum(r[1:]), k) for r in right)) for k in (1, 2, 4)}
    assert found.maj_at[1] == pytest.approx(found.pass_at[1])
    assert found.length == pytest.approx(fmean(len(ids) for i, (_, _, ids) in enumerate(seen) if i % 8))
    assert found.form == {"short": pytest.approx(fmean(len(t) < 5 for i, (t, _, _) in enumerate(seen) if i % 8))}
    assert 0.9 < found.unfinished <= 1
    again = attempt(lm, problems, load_rewards([lucky, short]), samples=7, max_new_tokens=6, seed=3)
    assert again == found
    assert [name for name, *_ in table(found, again)][:3] == ["greedy accuracy", "pass@1", "pass@2"]


def attempts(one, many, error=0.01):
    errors = {name: error for name in ("accuracy", "pass@1", "pass@16")}
    return Attempts(200, 16, one, {1: one, 16: many}, {1: one, 16: one}, errors, 40.0, 0.0, {})


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((0.3, 0.7), (0.6, 0.9), "Training taught"),
        ((0.3, 0.7), (0.6, 0.71), "Training sharpened: .*could solve in 16 attempts"),
        ((0.3, 0.98), (0.6, 0.99), "Training sharpened: .*no room"),
        ((0.3, 0.7), (0.6, 0.6), "sharpened at a price"),
        ((0.3, 0.7), (0.31, 0.7), "changed nothing"),
        ((0.3, 0.7), (0.1, 0.7), "made it worse"),
    ],
)
def test_verdict(before, after, said):
    import re

    sentence = verdict(attempts(*before), attempts(*after))
    assert re.search(said, sentence)
    assert f"from {before[0]:.0%} to {after[0]:.0%}" in sentence
    assert "changed nothing" in verdict(attempts(*before), attempts(*after, error=math.inf))
