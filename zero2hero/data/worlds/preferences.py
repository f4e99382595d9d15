"""Preferences of simulated raters with a known taste, over two ways in which a story may go on.

    told = preference(0)            # a story's beginning, and two continuations of it
    told.chosen, told.rejected      # as a rater voted, who errs
    taste(told.chosen)              # what raters value, as a number: so a tuned model can be held to it

Both continuations follow the same plot; they differ in how it is told. Raters like stories in which people talk: their
reward is the share of sentences that hold direct speech, and of two stories they prefer one with the probability that
Bradley and Terry (1952) give it. So a reward model, or a model tuned by these votes, can be compared with the truth,
which human raters' votes do not allow.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from zero2hero.data.worlds.base import BaseWorld, document_rng
from zero2hero.data.worlds.stories import story_of
from zero2hero.tokenizer.turns import common_prefix

BEGINNING = 0.35  # of the choices that make a story, those that both have in common
STRENGTH = 40.0  # of the raters' taste: how far a difference in it decides a vote
_SENTENCE = re.compile(r"[.!?]+[\"”]?(?=\s|$)")


def taste(text: str) -> float:
    """The raters' reward: spoken passages for each sentence, 0 for none (about 0.2 in the stories)."""
    return len(re.findall(r'"[^"]+"?', text)) / max(1, len(_SENTENCE.findall(text)))


def preferred(one: str, other: str) -> float:
    """The probability that a rater prefers the first of two texts."""
    return 1 / (1 + math.exp(-STRENGTH * (taste(one) - taste(other))))


@dataclass(frozen=True)
class Preference:
    """The beginning of a story, and two continuations in the order of a rater's vote."""

    prompt: str
    chosen: str
    rejected: str


class _Fork(random.Random):
    """One source of chance for the first `common` numbers, another after them."""

    def __init__(self, first: random.Random, then: random.Random, common: float) -> None:
        super().__init__(0)
        self.first, self.then, self.common, self.drawn = first, then, common, 0

    def random(self) -> float:
        self.drawn += 1
        return (self.first if self.drawn <= self.common else self.then).random()


def preference(index: int, split: str = "train", seed: int = 0) -> Preference:
    """Preference number `index` of a split, a pure function of its arguments.

    The plots of the validation split are those that `stories` tell there alone.

    Raises UserError for an unknown split or a negative index.
    """
    rng = document_rng("preferences", seed, split, index)
    beginning = rng.getrandbits(64)

    def told(common: float) -> tuple[str, int]:
        fork = _Fork(random.Random(beginning), random.Random(rng.getrandbits(64)), common)
        return story_of(fork, split).text, fork.drawn

    whole, choices = told(math.inf)
    other = whole
    while other == whole:
        other, _ = told(int(BEGINNING * choices))
    shared = whole[: common_prefix(whole, other)]
    end = max((m.end() for m in _SENTENCE.finditer(shared) if m.end() < len(shared)), default=0)
    prompt, ways = whole[:end], [text[end:].rstrip() for text in (whole, other)]
    if rng.random() >= preferred(*ways):
        ways.reverse()
    return Preference(prompt, *ways)


class Preferences(BaseWorld):
    """The world of preferences: a document is the story that was preferred, a record the preference."""

    name = "preferences"

    def document(self, index: int, split: str = "train") -> str:
        found = preference(index, split, self.seed)
        return found.prompt + found.chosen

    def record(self, index: int, split: str = "train") -> dict[str, str]:
        """Preference number `index` in TRL's form, with who voted."""
        return vars(preference(index, split, self.seed)) | {"rater": "simulated"}
