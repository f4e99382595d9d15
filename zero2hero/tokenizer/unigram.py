"""Unigram tokenizers, trained: the pieces under which a text is likeliest (Kudo 2018, arXiv 1804.10959).

Every piece has a probability, and a word that of all its segmentations together. Training begins with far too many
pieces, all substrings that occur twice, and repeats:

    EM      how often is each piece expected to occur, over all segmentations? That, normalized, is its new probability
    prune   how much likelihood is lost if a piece goes, and its place is taken by its own best segmentation?
            A quarter of the pieces, those that matter least, go. Single characters stay.

The trainer of the `tokenizers` library does the same, but in the order of a hash table that differs from process to
process, so its pieces do too. Here equal texts give equal tokenizers.

Words of equal length are worked on together. W words, T characters, M the longest piece.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

LONGEST_PIECE = 16  # characters
MOST_SEEDS = 1_000_000
EM_STEPS = 2  # between prunings
SHRINKAGE = 0.75  # share of the pieces that a pruning leaves
RARE = 0.5  # a piece that is expected less often goes
CHUNK = 4096  # words that are worked on at a time


def train_pieces(words: Mapping[str, int], size: int) -> list[tuple[str, float]]:
    """Pieces and their log-probabilities, the likeliest first.

    Args:
        words: how often each occurs; no piece reaches from one into the next.
        size: of pieces, at most; but every character is one.
    """
    characters = sorted(set().union(*words)) if words else []
    pieces, scores = _seeds(words, characters)
    lattices = _lattices(words, pieces)
    counts = np.array(scores, dtype=np.float64)
    logprobs = np.log(counts / counts.sum())
    alive = np.ones(len(pieces), dtype=bool)
    single = np.array([len(piece) == 1 for piece in pieces])
    wanted = max(size, len(characters))
    inside = _lattices(dict.fromkeys(pieces, 1), pieces)  # of each piece's own characters
    while True:
        for _ in range(EM_STEPS):
            counts = _expected(lattices, logprobs)
            alive &= single | (counts >= RARE)
            logprobs = _maximized(counts, alive)
        if alive.sum() <= wanted:
            break
        loss = np.where(single, np.inf, -np.inf)
        judged = alive & ~single
        loss[judged] = counts[judged] * (logprobs[judged] - _without_itself(inside, logprobs)[judged])
        keep = max(wanted, int(SHRINKAGE * alive.sum()))
        alive = np.zeros_like(alive)
        alive[np.argsort(-loss, kind="stable")[:keep]] = True
        logprobs = np.where(alive, logprobs, -np.inf)
    order = [i for i in np.argsort(-logprobs, kind="stable") if alive[i]]
    return [(pieces[i], float(logprobs[i])) for i in order]


def _seeds(words: Mapping[str, int], characters: Sequence[str]) -> tuple[list[str], list[int]]:
    """The first pieces and a score for each: characters, and substrings that occur twice, by what they cover.

    A substring that is always followed by the same character is left out: the longer one says it all.
    """
    found: Counter[str] = Counter()
    for word, count in words.items():
        for i in range(len(word)):
            for end in range(i + 1, min(i + LONGEST_PIECE, len(word)) + 1):
                found[word[i:end]] += count
    swallowed = {piece[:-1] for piece, count in found.items() if count == found.get(piece[:-1])}
    longer = [p for p, count in found.items() if len(p) > 1 and count > 1 and p not in swallowed]
    longer.sort(key=lambda piece: (-len(piece) * found[piece], piece))
    pieces = [*characters, *longer[:MOST_SEEDS]]
    return pieces, [len(piece) * found[piece] for piece in pieces]


# --- lattices ---------------------------------------------------------------------------------------------------

Lattice = tuple[np.ndarray, np.ndarray]  # piece ids int32 [W, T, M], -1 for none; how often each word occurs [W]


def _lattices(words: Mapping[str, int], pieces: Sequence[str]) -> list[Lattice]:
    """Which piece begins where and ends where, for words of equal length: ids[w, t, m] is that of m + 1 characters."""
    number = {piece: i for i, piece in enumerate(pieces)}
    longest = max(map(len, pieces), default=1)
    found = []
    for length, group in groupby(sorted(words, key=len), key=len):
        alike, reach = list(group), min(length, longest)
        for first in range(0, len(alike), CHUNK):
            part = alike[first : first + CHUNK]
            ids = np.full((len(part), length, reach), -1, dtype=np.int32)
            for w, word in enumerate(part):
                for t in range(length):
                    for m in range(min(reach, length - t)):
                        ids[w, t, m] = number.get(word[t : t + m + 1], -1)
            found.append((ids, np.array([words[word] for word in part], dtype=np.float64)))
    return found


def _forward(edges: np.ndarray, add: np.ufunc = np.logaddexp) -> np.ndarray:
    """[W, T + 1]: the log-probability of each word's first t characters, over all segmentations or (maximum) the best.

    `edges` [W, T, M]: the log-probability of the piece of m + 1 characters that begins at t.
    """
    words, length, reach = edges.shape
    total = np.full((words, length + 1), -np.inf)
    total[:, 0] = 0.0
    for end in range(1, length + 1):
        for m in range(min(reach, end)):
            total[:, end] = add(total[:, end], total[:, end - m - 1] + edges[:, end - m - 1, m])
    return total


def _edges(ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    return np.where(ids >= 0, logprobs[ids], -np.inf)


def _expected(lattices: Sequence[Lattice], logprobs: np.ndarray) -> np.ndarray:
    """How often each piece is expected to occur."""
    counts = np.zeros(len(logprobs))
    for ids, often in lattices:
        edges, (_, length, reach) = _edges(ids, logprobs), ids.shape
        before = _forward(edges)
        after = np.full_like(before, -np.inf)  # of the characters from t on
        after[:, length] = 0.0
        for t in range(length - 1, -1, -1):
            for m in range(min(reach, length - t)):
                after[:, t] = np.logaddexp(after[:, t], edges[:, t, m] + after[:, t + m + 1])
        for t in range(length):
            for m in range(min(reach, length - t)):
                share = np.exp(before[:, t] + edges[:, t, m] + after[:, t + m + 1] - before[:, length]) * often
                there = ids[:, t, m] >= 0
                counts += np.bincount(ids[there, t, m], share[there], minlength=len(counts))
    return counts


def _maximized(counts: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """New log-probabilities. Nearly digamma(count) for log(count): what occurs rarely is made rarer (Bayesian EM)."""
    total = math.log(counts[alive].sum())
    return np.where(alive, np.log(np.maximum(counts - 0.5, 1e-3)) - total, -np.inf)


def _without_itself(inside: Sequence[Lattice], logprobs: np.ndarray) -> np.ndarray:
    """The log-probability of each piece's characters, best segmented into others."""
    found = np.full(len(logprobs), -np.inf)
    for ids, _ in inside:
        _, length, reach = ids.shape
        edges = _edges(ids, logprobs)
        itself = ids[:, 0, length - 1] if reach == length else None
        if itself is not None:
            edges[:, 0, length - 1] = -np.inf
            found[itself] = _forward(edges, np.maximum)[:, length]
    return found
