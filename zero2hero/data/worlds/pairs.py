"""Pairs of a text to read and the text to write, each pair with one right answer.

    Translation().record(0)   # {"source": "the old fox did not find two boats", "target": "ostiu pal vosi ne-dorika"}
    Reversal().record(0)      # {"source": "green lamp under seven", "target": "seven under lamp green"}

Translation is from a small English into a made-up language that works otherwise: the place comes first and the verb
last, adjectives stand behind their nouns, there are no articles but endings (-u for `the`), plurals end in -i, and
tense and denial are parts of the verb (`-ka` for the past, `ne-`). So words must be looked up, moved, and put into the
right form. A sentence belongs to a split by a hash of its subject, verb and object: no such triple of validation is
seen in training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from zero2hero.data.worlds.base import BaseWorld, document_rng, split_of

VALIDATION_SHARE = 8  # one triple in this many is for validation

_NOUNS = {"fox": "osti", "boat": "vos", "girl": "mela", "boy": "tark", "bird": "pir", "tree": "dun", "lamp": "luk",
          "king": "ravo", "horse": "hest", "dog": "gau", "book": "lib", "stone": "kam", "house": "tupa",
          "flower": "sor", "bear": "urs", "apple": "pom"}  # fmt: skip
_ADJECTIVES = {"old": "pal", "small": "min", "red": "rod", "clever": "sof", "brave": "kor", "green": "zel",
               "quiet": "tis", "happy": "fel", "tall": "alt", "cold": "zim"}  # fmt: skip
_VERBS = {("find", "found"): "dori", ("see", "saw"): "vida", ("want", "wanted"): "hoce", ("carry", "carried"): "nosi",
          ("follow", "followed"): "gane", ("paint", "painted"): "fara", ("wash", "washed"):
          "lavo", ("hide", "hid"): "skri", ("love", "loved"): "ama", ("hear", "heard"): "uslu"}  # fmt: skip
_PLACES = {"in the forest": "silva-ne", "by the river": "reka-te", "on the hill": "gora-pe",
           "at the market": "torgo-te", "near the sea": "mare-te"}  # fmt: skip


@dataclass(frozen=True)
class _Phrase:
    """A noun with its article and perhaps an adjective, one of it or several."""

    noun: str
    adjective: str
    definite: bool
    plural: bool

    @property
    def english(self) -> str:
        words = [self.adjective] * bool(self.adjective) + [
            self.noun + ("es" if self.noun == "fox" else "s") * self.plural
        ]
        article = "the" if self.definite else "some" if self.plural else "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])

    @property
    def made_up(self) -> str:
        ending = "i" * self.plural
        noun = _NOUNS[self.noun] + ending + "u" * self.definite
        return f"{noun} {_ADJECTIVES[self.adjective]}{ending}" if self.adjective else noun


def _phrase(rng: random.Random) -> _Phrase:
    adjective = rng.choice(list(_ADJECTIVES)) if rng.random() < 0.5 else ""
    return _Phrase(rng.choice(list(_NOUNS)), adjective, rng.random() < 0.5, rng.random() < 0.4)


class _Pairs(BaseWorld):
    """A world of records {"source", "target"}; a document is a pair on two lines."""

    def record(self, index: int, split: str = "train") -> dict[str, str]:
        """Pair number `index` of a split: a pure function of seed, split and index."""
        rng = document_rng(self.name, self.seed, split, index)
        while True:  # by rejection: a pair of the other split is drawn again
            source, target, key = self.pair(rng)
            if split_of(key, VALIDATION_SHARE) == split:
                return {"source": source, "target": target}

    def pair(self, rng: random.Random) -> tuple[str, str, str]:
        """(source, target, what decides its split)."""
        raise NotImplementedError

    def document(self, index: int, split: str = "train") -> str:
        return "\n".join(self.record(index, split).values())


class Translation(_Pairs):
    """From English into a made-up language."""

    name = "translation"

    def pair(self, rng: random.Random) -> tuple[str, str, str]:
        who, what = _phrase(rng), _phrase(rng)
        (now, past), root = rng.choice(list(_VERBS.items()))
        in_past, denied = rng.random() < 0.5, rng.random() < 0.3
        place = rng.choice(list(_PLACES)) if rng.random() < 0.4 else ""
        third = "" if who.plural else "s"
        if denied:
            verb = f"{'did' if in_past else 'do' if who.plural else 'does'} not {now}"
        else:
            verb = past if in_past else now[:-1] + "ies" if third and now.endswith("rry") else now + third
            verb = "washes" if verb == "washs" else verb
        english = f"{who.english} {verb} {what.english} {place}".strip()
        made_up = f"{'ne-' * denied}{root}{'ka' * in_past}"
        target = " ".join(filter(None, [_PLACES.get(place), who.made_up, what.made_up, made_up]))
        return english, target, f"{who.noun} {now} {what.noun}"


class Reversal(_Pairs):
    """The words of a line, and the same words from the last to the first."""

    name = "reversal"

    def pair(self, rng: random.Random) -> tuple[str, str, str]:
        words = rng.sample([*_NOUNS, *_ADJECTIVES], rng.randint(3, 8))
        return " ".join(words), " ".join(reversed(words)), " ".join(words)
