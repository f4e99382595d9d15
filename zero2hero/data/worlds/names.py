"""Sentences with names in them, each word labelled: persons, places and organizations.

    record(0)   # {"tokens": ["Ada", "Novak", "lives", "in", "Port", "Elm", "."], "ner_tags": ["B-PER", "I-PER", ...]}

The same word may be a person's name, a place or part of a company ("Florence", "Jordan", "Ford"), so what stands around
it decides. A sentence belongs to a split by a hash of its turn of phrase and its names.
"""

from __future__ import annotations

import random

from zero2hero.data.worlds.base import BaseWorld, document_rng, split_of

VALIDATION_SHARE = 8  # one sentence in this many is for validation

_FIRST = (
    "Ada",
    "Florence",
    "Jordan",
    "Chelsea",
    "Milan",
    "Tom",
    "Nina",
    "Victoria",
    "Austin",
    "Hugo",
    "Lena",
    "Sydney",
)
_LAST = ("Novak", "Lincoln", "Ford", "Baker", "Wells", "Houston", "Stone", "Marsh", "York", "Hill")
_PLACES = ("Florence", "Jordan", "Milan", "Lincoln", "Austin", "Sydney", "Houston", "Port Elm", "New York", "Wells",
           "Mount Hill", "Victoria", "Lake Baker", "Tallin")  # fmt: skip
_FIRMS = ("Ford", "Baker & Sons", "Stone Bank", "Northern Rail", "Wells Press", "Marsh Motors", "Victoria Airways",
          "Lincoln College", "Hill Records", "Chelsea")  # fmt: skip
_TURNS = (
    "{PER} lives in {LOC} .", "{PER} works for {ORG} .", "{ORG} opened an office in {LOC} last year .",
    "Yesterday {PER} met {PER} near {LOC} .", "The head of {ORG} , {PER} , was born in {LOC} .",
    "{PER} sold the old house to {ORG} .", "In {LOC} it rained when {PER} arrived .",
    "{ORG} beat {ORG} by two goals in {LOC} .", "Mrs. {PER} teaches at {ORG} .",
    "A train from {LOC} to {LOC} was late .",
    "Nobody at {ORG} knew where {PER} was .", "The letter was late , said the clerk .",
)  # fmt: skip


def record(index: int, split: str = "train", seed: int = 0) -> dict[str, list[str]]:
    """Sentence number `index` of a split: a pure function of its arguments.

    Raises UserError for an unknown split or a negative index.
    """
    rng = document_rng("names", seed, split, index)
    while True:  # by rejection: a sentence of the other split is drawn again
        tokens, tags = _sentence(rng)
        if split_of(" ".join(tokens), VALIDATION_SHARE) == split:
            return {"tokens": tokens, "ner_tags": tags}


def _sentence(rng: random.Random) -> tuple[list[str], list[str]]:
    tokens: list[str] = []
    tags: list[str] = []
    for word in rng.choice(_TURNS).split():
        kind = word.strip("{}")
        if kind == word:
            name = [word]
        elif kind == "PER":
            name = [rng.choice(_FIRST)] * (rng.random() < 0.7) + [rng.choice(_LAST)]
            name = name if rng.random() < 0.8 else name[:1]
        else:
            name = rng.choice(_PLACES if kind == "LOC" else _FIRMS).split()
        tokens += name
        tags += ["O"] if kind == word else [f"B-{kind}", *[f"I-{kind}"] * (len(name) - 1)]
    return tokens, tags


class Names(BaseWorld):
    """The world of names: document `index` is the text of `record(index)`."""

    name = "names"

    def record(self, index: int, split: str = "train") -> dict[str, list[str]]:
        return record(index, split, self.seed)

    def document(self, index: int, split: str = "train") -> str:
        return " ".join(self.record(index, split)["tokens"])
