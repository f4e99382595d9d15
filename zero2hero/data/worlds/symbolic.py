"""Small symbolic worlds whose best possible loss is known in closed form.

A document has exactly `length` symbols, drawn from a fixed random process. `floor()` is the entropy of that
process in nats per predicted token: no model can have a lower expected loss, and a model that has learned the
process reaches it. That makes them tests of the whole training pipeline: too high, and something does not
learn; lower, and something peeks at the answer.

What is counted: the model is given a beginning-of-sequence token and predicts every symbol of the document, the
first one included. By default that is `length` tokens. If an end-of-sequence token is trained too, pass
`include_eos=True`: all documents are equally long, so an ideal predictor is sure of it (it costs 0 nats) and
the same total is divided by `length + 1`. Documents must not be cut or joined without resetting the context.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from zero2hero.data.worlds.base import BaseWorld, document_rng
from zero2hero.errors import UserError

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class _Symbolic(BaseWorld):
    """Documents of `length` symbols out of the first `alphabet` SYMBOLS."""

    def __init__(self, seed: int = 0, length: int = 64, alphabet: int = 16):
        super().__init__(seed)
        if not 2 <= alphabet <= len(SYMBOLS):
            raise UserError(f"alphabet must be between 2 and {len(SYMBOLS)} symbols, got {alphabet}")
        if length < 2:
            raise UserError(f"a symbolic document needs at least 2 symbols, got length={length}")
        self.length, self.symbols = length, SYMBOLS[:alphabet]

    def total(self) -> float:
        """The entropy of one document, in nats."""
        raise NotImplementedError

    def floor(self, include_eos: bool = False) -> float:
        """The lowest expected loss that any model can have, in nats per predicted token."""
        return self.total() / (self.length + include_eos)

    def logprob(self, document: str) -> float:
        """The exact log-probability of a document under the process that makes them, in nats."""
        raise NotImplementedError

    def _random(self, index: int, split: str, count: int) -> str:
        rnd, symbols = document_rng(self.name, self.seed, split, index).random, self.symbols
        return "".join([symbols[int(rnd() * len(symbols))] for _ in range(count)])


class MarkovChain(_Symbolic):
    """Each symbol depends on the one before it, by a fixed random transition matrix; the first symbol is drawn
    from the chain's stationary distribution, so that every position looks alike.

    With P the matrix (rows drawn from a Dirichlet distribution) and m its stationary distribution, a document of
    T symbols has the entropy H(m) + (T - 1) * sum_i m_i H(P_i) (Cover and Thomas, theorem 4.2.4).
    """

    name = "markov"

    def __init__(self, seed: int = 0, length: int = 64, alphabet: int = 16, concentration: float = 0.3):
        super().__init__(seed, length, alphabet)
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0x6D61726B], dtype=np.uint64)))
        rows = rng.dirichlet(np.full(alphabet, concentration), size=alphabet)
        self.transitions = 0.99 * rows + 0.01 / alphabet  # nothing is impossible, so the chain cannot get stuck
        self.stationary = _stationary(self.transitions)
        self._first = np.cumsum(self.stationary)
        self._next = np.cumsum(self.transitions, axis=1)

    def total(self) -> float:
        return _entropy(self.stationary) + (self.length - 1) * self.rate()

    def rate(self) -> float:
        """The entropy rate: nats per symbol once the symbol before is known."""
        return float(sum(m * _entropy(row) for m, row in zip(self.stationary, self.transitions)))

    def document(self, index: int, split: str = "train") -> str:
        rnd, last = document_rng(self.name, self.seed, split, index).random, len(self.symbols) - 1
        cumulative, out = self._first, []
        for _ in range(self.length):
            state = min(int(np.searchsorted(cumulative, rnd(), side="right")), last)
            out.append(self.symbols[state])
            cumulative = self._next[state]
        return "".join(out)

    def logprob(self, document: str) -> float:
        states = [self.symbols.index(symbol) for symbol in document]
        steps = [self.transitions[i, j] for i, j in itertools.pairwise(states)]
        return math.log(self.stationary[states[0]]) + float(np.log(steps).sum())


class Induction(_Symbolic):
    """A random sequence said twice: the second half can be copied from the first, which takes an induction head
    (Olsson et al., 2022). The first half costs ln A nats a symbol, the second nothing."""

    name = "induction"

    def __init__(self, seed: int = 0, length: int = 64, alphabet: int = 16):
        super().__init__(seed, length, alphabet)
        if length % 2:
            raise UserError(f"an induction document is one half said twice: length must be even, got {length}")

    def total(self) -> float:
        return self.length // 2 * math.log(len(self.symbols))

    def document(self, index: int, split: str = "train") -> str:
        return self._random(index, split, self.length // 2) * 2

    def logprob(self, document: str) -> float:
        half = self.length // 2
        right = len(document) == self.length and document[:half] == document[half:]
        return -self.total() if right else -math.inf


class Palindromes(_Symbolic):
    """A random half followed by its mirror image. An odd length has one symbol in the middle that belongs to the
    random half."""

    name = "palindromes"

    def total(self) -> float:
        return (self.length + 1) // 2 * math.log(len(self.symbols))

    def document(self, index: int, split: str = "train") -> str:
        half = self._random(index, split, (self.length + 1) // 2)
        return half + half[: self.length // 2][::-1]

    def logprob(self, document: str) -> float:
        right = len(document) == self.length and document == document[::-1]
        return -self.total() if right else -math.inf


def _entropy(p: Sequence[float] | np.ndarray) -> float:
    """Shannon entropy in nats; every entry must be positive."""
    return float(-(np.asarray(p) * np.log(p)).sum())


def _stationary(transitions: np.ndarray) -> np.ndarray:
    """The distribution m with m P = m and sum 1, by solving the linear system."""
    n = len(transitions)
    system = np.vstack([transitions.T - np.eye(n), np.ones(n)])
    solution = np.linalg.lstsq(system, np.append(np.zeros(n), 1.0), rcond=None)[0]
    return np.clip(solution, 1e-300, None) / solution.sum()
