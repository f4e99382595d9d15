"""The n-gram language model: predict the next token from the last n-1, by counting.

Shannon (1948) printed the first text sampled from one. It is the honest baseline of every curve in this
package: a network that does not beat it has learnt no more than which tokens follow which.

Counts alone give probability zero to all that was never seen. Interpolated Kneser-Ney smoothing (Kneser &
Ney 1995; three discounts as in Chen & Goodman 1998, "modified") takes a little from every count and hands it
to the next shorter context:

    p(w | h) = (c(hw) - D(c(hw))) / c(h.)  +  gamma(h) p(w | h'),       h' = h without its oldest token
    gamma(h) = sum_w D(c(hw)) / c(h.),                                  so that p(. | h) sums to one

`c` are plain counts at the highest order. Below it they are *continuation counts*: in how many different
contexts w follows h, for "Francisco" is frequent, but only after "San". The recursion ends at 1/V.

A document is padded on the left, so that every prediction has n-1 tokens of context and none crosses into
the document before. The first token of a document is given, never predicted.

An n-gram is one int64, its tokens the digits of a number in base V + 1 (the extra digit is the padding).
The number modulo base**k is its last k tokens, the number divided by base its context; counting is sorting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zero2hero.errors import UserError

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

# where too few n-grams occur once, twice, ... to estimate a discount: half of what leaving all would take
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Level:
    """All that is known about contexts of one length; both key arrays are sorted."""

    ngrams: Int64  # n-grams seen, context and token packed
    probs: Float64  # p(token | context), interpolated with every shorter context
    contexts: Int64  # contexts seen
    backoff: Float64  # gamma(context): the probability left for tokens not seen after it

    def apply(self, ngrams: Int64, shorter: Float64, base: int) -> Float64:
        """p(token | context) of any n-grams, where `shorter` is p(token | context without its oldest)."""
        at, seen = _find(self.ngrams, ngrams)
        context_at, context_seen = _find(self.contexts, ngrams // base)
        gamma = np.where(context_seen, self.backoff[context_at], 1.0)
        return np.where(seen, self.probs[at], gamma * shorter)


class NGram:
    """Interpolated modified Kneser-Ney over token ids `0 .. vocab_size - 1`.

    `tokens` is an integer array and `spans` int64 [documents, 2]: document i is
    `tokens[spans[i, 0]:spans[i, 1]]`.
    """

    def __init__(self, order: int, vocab_size: int) -> None:
        """Raises `UserError` when `order` tokens of this vocabulary do not fit in 63 bits."""
        if order < 1 or vocab_size < 1:
            raise UserError(f"an n-gram model needs order and vocab_size >= 1, not {order} and {vocab_size}")
        self.order, self.vocab_size = order, vocab_size
        self.base = vocab_size + 1
        if self.base**order > 2**63 - 1:
            bits = math.log2(self.base)
            raise UserError(
                f"{order} tokens of a vocabulary of {vocab_size} need {order * bits:.1f} bits, only 63 fit; "
                f"take order <= {int(63 / bits)}"
            )
        self.levels: list[Level] = []

    def fit(self, tokens: ArrayLike, spans: ArrayLike) -> NGram:
        """Count and smooth; returns self. Time is that of sorting the tokens once."""
        ngrams = self._ngrams(tokens, spans)
        if not len(ngrams):
            raise UserError("an n-gram model needs at least one document of two tokens or more")
        counted = [np.unique(ngrams, return_counts=True)]
        for n in range(self.order - 1, 0, -1):  # every distinct (n+1)-gram is one context that its suffix has
            counted.insert(0, np.unique(counted[0][0] % self.base**n, return_counts=True))

        self.levels = []
        shorter = np.full(len(counted[0][0]), 1 / self.vocab_size)
        for n, (ngrams, counts) in enumerate(counted, start=1):
            if n > 1:
                at, _ = _find(self.levels[-1].ngrams, ngrams % self.base ** (n - 1))
                shorter = self.levels[-1].probs[at]
            self.levels.append(_smooth(ngrams, counts, shorter, self.base))
        return self

    def token_logprobs(self, tokens: ArrayLike, spans: ArrayLike) -> Float64:
        """ln p of every predicted token [sum of (length - 1)], document after document, in nats."""
        self._check_fitted()
        ngrams, inverse = np.unique(self._ngrams(tokens, spans), return_inverse=True)
        probs = np.full(len(ngrams), 1 / self.vocab_size)
        for n, level in enumerate(self.levels, start=1):
            probs = level.apply(ngrams % self.base**n, probs, self.base)
        return np.log(probs)[inverse]

    def mean_nll(self, tokens: ArrayLike, spans: ArrayLike) -> float:
        """Mean negative log-likelihood in nats per predicted token (all of a document but its first)."""
        logprobs = self.token_logprobs(tokens, spans)
        if not len(logprobs):
            raise UserError("nothing to score: no document has two tokens or more")
        return float(-logprobs.mean())

    def next_probs(self, prefix: Sequence[int]) -> Float64:
        """p(. | prefix) over the vocabulary [vocab_size]; `prefix` starts where its document starts."""
        self._check_fitted()
        padded = [self.vocab_size] * self.order + [int(token) for token in prefix[-self.order :]]
        probs = np.full(self.vocab_size, 1 / self.vocab_size)
        context = 0
        for n, level in enumerate(self.levels, start=1):
            if n > 1:
                context += padded[1 - n] * self.base ** (n - 2)
            first, last = np.searchsorted(level.ngrams, [context * self.base, (context + 1) * self.base])
            if last > first:  # seen: its row is a run of consecutive n-grams
                probs = probs * level.backoff[np.searchsorted(level.contexts, context)]
                probs[level.ngrams[first:last] % self.base] = level.probs[first:last]
        return probs

    def sample(self, prompt_ids: Sequence[int], n: int, seed: int) -> list[int]:
        """`n` tokens drawn after the prompt (which is not repeated); the same seed gives the same text."""
        random = np.random.default_rng(seed)
        ids = self._check_ids(np.asarray(prompt_ids, dtype=np.int64)).tolist()
        for _ in range(n):
            cumulative = np.cumsum(self.next_probs(ids))
            ids.append(int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")))
        return ids[len(prompt_ids) :]

    def _ngrams(self, tokens: ArrayLike, spans: ArrayLike) -> Int64:
        """The n-gram of the highest order that ends at each predicted token, packed."""
        tokens, spans = np.asarray(tokens), np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        starts, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
        if len(spans) and (starts.min() < 0 or lengths.min() < 0 or spans[:, 1].max() > len(tokens)):
            bad = int(np.flatnonzero((starts < 0) | (lengths < 0) | (spans[:, 1] > len(tokens)))[0])
            raise UserError(f"document {bad} spans {spans[bad].tolist()}, outside of {len(tokens)} tokens")
        position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        text = self._check_ids(tokens[np.repeat(starts, lengths) + position].astype(np.int64))
        ngrams = text.copy()
        for back in range(1, self.order):
            earlier = np.full_like(text, self.vocab_size)
            earlier[back:] = text[:-back]
            earlier[position < back] = self.vocab_size  # before the document's start: padding
            ngrams += earlier * self.base**back
        return ngrams[position > 0]

    def _check_ids(self, ids: Int64) -> Int64:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UserError(f"token id {bad} is outside of the vocabulary of {self.vocab_size}")
        return ids

    def _check_fitted(self) -> None:
        if not self.levels:
            raise RuntimeError("call fit(tokens, spans) first")


def _smooth(ngrams: Int64, counts: Int64, shorter: Float64, base: int) -> Level:
    """Discounted, interpolated probabilities from counts; `shorter` is the next lower order's, per n-gram."""
    contexts, row = np.unique(ngrams // base, return_inverse=True)
    discount = _discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(row, weights=counts)
    backoff = np.bincount(row, weights=discount) / total
    return Level(ngrams, (counts - discount) / total[row] + backoff[row] * shorter, contexts, backoff)


def _discounts(counts: Int64) -> Float64:
    """What to take from counts of 0, 1, 2 and 3 or more (Chen & Goodman 1998, equation 26)."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    y = n1 / max(n1 + 2 * n2, 1)
    discounts = [0.0]
    for k, (fewer, more) in enumerate([(n1, n2), (n2, n3), (n3, n4)], start=1):
        estimate = k - (k + 1) * y * more / fewer if fewer else 0.0
        discounts.append(estimate if 0 < estimate < k else FALLBACK_DISCOUNTS[k - 1])
    return np.array(discounts)


def _find(keys: Int64, wanted: Int64) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each wanted number stands among the sorted keys, and whether it is there at all."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
