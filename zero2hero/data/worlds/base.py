"""What all worlds share: a name, a seed, checked arguments and a source of chance per document."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator

from zero2hero.errors import UserError, did_you_mean

SPLITS = ("train", "validation")


@functools.cache
def _key(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def document_rng(world: str, seed: int, split: str, index: int) -> random.Random:
    """The source of chance of one document: a pure function of its arguments, in every process and version.

    Raises UserError for a split that is not "train" or "validation", or a negative index.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use {' or '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
    if index < 0:
        raise UserError(f"a document's index must not be negative, got {index}")
    return random.Random((_key(world, seed, split) << 64) + index)


@functools.lru_cache(maxsize=1 << 16)
def split_of(key: str, validation_share: int) -> str:
    """The split that what `key` names belongs to: one in `validation_share` to validation, by a hash."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") % validation_share == 0]


class BaseWorld:
    """A world with a `document` still to be written."""

    name = ""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def document(self, index: int, split: str = "train") -> str:
        raise NotImplementedError

    def documents(self, split: str = "train", count: int = 1000) -> Iterator[str]:
        """The first `count` documents of a split."""
        return (self.document(index, split) for index in range(count))
