"""Worlds: synthetic text whose truth is known.

    world("stories").document(0, "train")      # the text of the first training document
    for text in world("sums").documents("validation", 100): ...

A world is a pure function from (seed, split, index) to a document, so it needs no download, no storage and no
order: any process can make any document. `stories` and `sums` know the answers to questions about their text;
`dialogues` (conversations that ask them), `sentiment`, `names`, `questions`, `translation` and `reversal` give records
with their answers and labels (`record`), `preferences` two ways to go on and which one raters like;
`markov`, `induction` and `palindromes` know the best loss that any model can reach on them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Protocol

from zero2hero.data.worlds.base import SPLITS
from zero2hero.errors import UserError, did_you_mean

__all__ = ["SPLITS", "WORLDS", "World", "world"]

# name -> (module, class); modules are imported when their world is asked for
WORLDS = {
    "stories": ("zero2hero.data.worlds.stories", "Stories"),
    "sums": ("zero2hero.data.worlds.sums", "Sums"),
    "two_digit_sums": ("zero2hero.data.worlds.sums", "TwoDigitSums"),
    "sentiment": ("zero2hero.data.worlds.sentiment", "Sentiment"),
    "names": ("zero2hero.data.worlds.names", "Names"),
    "questions": ("zero2hero.data.worlds.reading", "Questions"),
    "translation": ("zero2hero.data.worlds.pairs", "Translation"),
    "reversal": ("zero2hero.data.worlds.pairs", "Reversal"),
    "scenes": ("zero2hero.data.worlds.scenes", "Scenes"),
    "shapes": ("zero2hero.data.worlds.scenes", "Shapes"),
    "digits": ("zero2hero.data.worlds.digits", "Digits"),
    "dialogues": ("zero2hero.data.worlds.dialogues", "Dialogues"),
    "preferences": ("zero2hero.data.worlds.preferences", "Preferences"),
    "markov": ("zero2hero.data.worlds.symbolic", "MarkovChain"),
    "induction": ("zero2hero.data.worlds.symbolic", "Induction"),
    "palindromes": ("zero2hero.data.worlds.symbolic", "Palindromes"),
}


class World(Protocol):
    """What every world can do."""

    @property
    def name(self) -> str: ...

    def document(self, index: int, split: str = "train") -> str:
        """Document number `index` of a split ("train" or "validation"), the same one at every call."""

    def documents(self, split: str = "train", count: int = 1000) -> Iterator[str]:
        """The first `count` documents of a split."""


def world(name: str, seed: int = 0) -> World:
    """The world called `name`. Raises UserError when there is none."""
    if name not in WORLDS:
        raise UserError(f"unknown world {name!r}: there are {', '.join(WORLDS)}.{did_you_mean(name, WORLDS)}")
    module, class_name = WORLDS[name]
    made: World = getattr(importlib.import_module(module), class_name)(seed=seed)
    return made
