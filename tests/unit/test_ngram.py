"""The n-gram model against its formulas, written out slowly over dictionaries, and against known entropies."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2hero.errors import UserError
from zero2hero.models.ngram import NGram

DOCUMENTS = st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=14), min_size=1, max_size=8)


def pack(documents):
    """Documents as (tokens, spans), with a gap of junk between them that must never be read."""
    tokens, spans = [], []
    for document in documents:
        tokens.append(0)
        spans.append((len(tokens), len(tokens) + len(document)))
        tokens.extend(document)
    return np.array(tokens, dtype=np.uint16), np.array(spans, dtype=np.int64).reshape(-1, 2)


class Referee:
    """Interpolated modified Kneser-Ney, straight from Chen & Goodman (1998), one n-gram at a time."""

    def __init__(self, order, vocab_size, documents):
        self.order, self.vocab_size = order, vocab_size
        top = Counter()
        for document in documents:
            padded = ["pad"] * order + list(document)
            for end in range(order + 1, len(padded)):
                top[tuple(padded[end - order + 1 : end + 1])] += 1
        self.counts = {order: top}
        for n in range(order - 1, 0, -1):
            left = defaultdict(set)
            for ngram in self.counts[n + 1]:
                left[ngram[1:]].add(ngram[0])
            self.counts[n] = Counter({ngram: len(tokens) for ngram, tokens in left.items()})
        self.discounts = {n: self.estimate(counts) for n, counts in self.counts.items()}

    @staticmethod
    def estimate(counts):
        n = {k: sum(1 for count in counts.values() if count == k) for k in (1, 2, 3, 4)}
        result = {}
        for k in (1, 2, 3):
            try:
                result[k] = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k]
            except ZeroDivisionError:
                result[k] = 0
            if not 0 < result[k] < k:
                result[k] = {1: 0.5, 2: 1.0, 3: 1.5}[k]
        return result

    def prob(self, token, context, n=None):
        n = self.order if n is None else n
        if n == 0:
            return 1 / self.vocab_size
        context = tuple(context)[len(context) - (n - 1) :]
        followers = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == context}
        if not followers:
            return self.prob(token, context, n - 1)
        total = sum(followers.values())
        discount = self.discounts[n]
        left_over = sum(discount[min(c, 3)] for c in followers.values()) / total
        count = followers.get(token, 0)
        kept = count - discount[min(count, 3)] if count else 0
        return kept / total + left_over * self.prob(token, context, n - 1)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, DOCUMENTS, st.integers(1, 4))
def test_equals_the_formulas(documents, held_out, order):
    tokens, spans = pack(documents)
    if not any(len(document) > 1 for document in documents):
        with pytest.raises(UserError, match="two tokens"):
            NGram(order, 5).fit(tokens, spans)
        return
    model, referee = NGram(order, 5).fit(tokens, spans), Referee(order, 5, documents)
    expected = [
        math.log(referee.prob(document[t], ["pad"] * order + document[:t]))
        for document in held_out
        for t in range(1, len(document))
    ]
    np.testing.assert_allclose(model.token_logprobs(*pack(held_out)), expected, atol=1e-9, rtol=0)
    for document in held_out[:2]:  # whole distributions, after contexts seen and unseen
        probs = model.next_probs(document)
        context = ["pad"] * order + document
        np.testing.assert_allclose(probs, [referee.prob(w, context) for w in range(5)], atol=1e-9, rtol=0)
        assert probs.sum() == pytest.approx(1, abs=1e-12)
        assert probs.min() > 0


def test_big_vocabulary_packs_exactly():
    """Keys of 60 bits: one wrong rounding to float and n-grams would run into each other."""
    random = np.random.default_rng(0)
    documents = [random.choice([4093, 4094, 4095, 2048], size=40).tolist() for _ in range(6)]
    model, referee = NGram(5, 4096).fit(*pack(documents)), Referee(5, 4096, documents)
    expected = [math.log(referee.prob(d[t], ["pad"] * 5 + d[:t])) for d in documents[:2] for t in range(1, len(d))]
    np.testing.assert_allclose(model.token_logprobs(*pack(documents[:2])), expected, atol=1e-9, rtol=0)


def test_reaches_the_entropy_of_a_markov_chain():
    """On text from a known chain a bigram pays its entropy rate and no less; a unigram pays more."""
    random = np.random.default_rng(1)
    transition = random.dirichlet(np.full(6, 0.4), size=6)
    chain = [0]
    draws = random.random(60_000)
    for draw in draws:
        chain.append(min(int(np.searchsorted(np.cumsum(transition[chain[-1]]), draw)), 5))
    stationary = np.linalg.matrix_power(transition, 200)[0]
    entropy = -sum(stationary[i] * (transition[i] * np.log(transition[i] + 1e-300)).sum() for i in range(6))
    spans = np.arange(0, 60_000, 300)[:, None] + np.array([0, 300])
    nll = {n: NGram(n, 6).fit(chain, spans[:160]).mean_nll(chain, spans[160:]) for n in (1, 2, 3)}
    assert nll[2] == pytest.approx(entropy, abs=0.02)
    assert nll[3] == pytest.approx(entropy, abs=0.03)
    assert nll[1] > nll[2] + 0.1


def test_longer_contexts_predict_real_text_better():
    import textwrap  # a module of the standard library is text that is always there

    text = np.fromfile(textwrap.__file__, dtype=np.uint8)
    lines = np.flatnonzero(text == ord("\n")) + 1
    spans = np.stack([np.concatenate([[0], lines[:-1]]), lines], axis=1)
    train, held_out = spans[np.arange(len(spans)) % 5 > 0], spans[::5]
    nll = [NGram(n, 256).fit(text, train).mean_nll(text, held_out) for n in (1, 2, 3, 4)]
    assert math.log(256) > nll[0] > nll[1] > nll[2] > nll[3]


def test_documents_are_independent():
    one, two = [1, 2, 3, 1, 2, 4], [3, 3, 2, 1]
    forward, backward = pack([one, two]), pack([two, one])
    probe = pack([[1, 2, 3], [2, 2, 1, 2]])
    a = NGram(3, 5).fit(*forward).token_logprobs(*probe)
    np.testing.assert_array_equal(a, NGram(3, 5).fit(*backward).token_logprobs(*probe))
    # a document's first token is neither learnt nor scored
    assert len(a) == 2 + 3
    np.testing.assert_allclose(NGram(1, 5).fit(*pack([[4, 1]])).next_probs([])[[0, 4]], 0.1)


def test_sample():
    cycle = [list(range(10)) * 20]
    model = NGram(3, 10).fit(*pack(cycle))
    drawn = model.sample([3, 4], 200, seed=5)
    assert drawn == model.sample([3, 4], 200, seed=5) != model.sample([3, 4], 200, seed=6)
    follows = [b == (a + 1) % 10 for a, b in zip([4, *drawn], drawn)]
    assert np.mean(follows) > 0.75  # chance is 0.1; the rest is what smoothing gives away
    # frequencies of the next token are its probabilities
    uneven = NGram(2, 4).fit(*pack([[0, 1, 0, 1, 0, 2, 0, 3, 0, 1]]))
    drawn = [uneven.sample([0], 1, seed)[0] for seed in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, uneven.next_probs([0]), atol=0.04)


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"only 63 fit; take order <= 5"):
        NGram(6, 4096)
    NGram(5, 4096)
    with pytest.raises(UserError, match="order and vocab_size >= 1"):
        NGram(0, 10)
    with pytest.raises(UserError, match="token id 7 is outside of the vocabulary of 5"):
        NGram(2, 5).fit([1, 2, 7], [[0, 3]])
    with pytest.raises(UserError, match=r"document 1 spans \[2, 9\], outside of 4 tokens"):
        NGram(2, 5).fit([1, 2, 3, 4], [[0, 2], [2, 9]])
    model = NGram(2, 5).fit([1, 2, 3, 4], [[0, 4]])
    with pytest.raises(UserError, match="nothing to score"):
        model.mean_nll([1], [[0, 1]])
    with pytest.raises(UserError, match="token id 5"):
        model.sample([5], 1, seed=0)
    with pytest.raises(RuntimeError, match="fit"):
        NGram(2, 5).next_probs([1])
