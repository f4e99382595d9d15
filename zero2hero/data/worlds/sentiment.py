"""Opinions: sentences that praise or blame, whose label is known.

    record(0)   # {"text": "The soup was not cold, and the waiter was friendly.", "label": "positive"}

A list of good and bad words is not enough: "not", "nobody would call", and "but" turn the words around. An opinion
belongs to a split by a hash of its turn of phrase, thing and word, so none of validation is ever seen in training.
"""

from __future__ import annotations

import random

from zero2hero.data.worlds.base import BaseWorld, document_rng, split_of

LABELS = ("negative", "positive")
VALIDATION_SHARE = 8  # one opinion in this many is for validation

# things -> what they are when bad, and when good
_WORDS: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("soup", "bread", "cake", "salad", "breakfast", "dinner", "pie", "coffee"): (
        ("cold", "stale", "bitter", "salty", "burnt", "tasteless"),
        ("delicious", "fresh", "warm", "tasty", "rich", "perfect"),
    ),
    ("waiter", "driver", "guide", "host", "teacher", "clerk", "cook", "nurse"): (
        ("rude", "slow", "careless", "grumpy", "unfair", "lazy"),
        ("friendly", "quick", "helpful", "patient", "kind", "polite"),
    ),
    ("room", "garden", "train", "hall", "cabin", "bus", "kitchen", "pool"): (
        ("dirty", "noisy", "dark", "crowded", "shabby", "broken"),
        ("clean", "quiet", "bright", "cozy", "lovely", "spotless"),
    ),
    ("film", "play", "concert", "book", "song", "show", "story", "dance"): (
        ("dull", "silly", "boring", "confusing", "clumsy", "endless"),
        ("funny", "moving", "clever", "gripping", "charming", "brilliant"),
    ),
}
_VERY = ("", "", "very ", "really ", "quite ", "rather ")
# {x} says what the label says, {y} the opposite; {thing} and {other} are two things
_TURNS = (
    "The {thing} was {very}{x}.",
    "The {thing} was not {y}.",
    "The {thing} was {y}, but the {other} was {very}{x2}, and that is what counts.",
    "Although the {other} was {y2}, the {thing} was {very}{x} and we left {mood}.",
    "Nobody would call the {thing} {y}.",
    "We feared the {thing} would be {y}, yet it was {very}{x}.",
    "I had read that the {thing} was {y}, and that is simply not true.",
    "The {thing} was {x}, and the {other} was not {y2}.",
)
_MOODS = ("sad", "happy")


def record(index: int, split: str = "train", seed: int = 0) -> dict[str, str]:
    """Opinion number `index` of a split: a pure function of its arguments.

    Raises UserError for an unknown split or a negative index.
    """
    rng = document_rng("sentiment", seed, split, index)
    while True:  # by rejection: an opinion of the other split is drawn again
        text, label, key = _opinion(rng)
        if split_of(key, VALIDATION_SHARE) == split:
            return {"text": text, "label": label}


def _opinion(rng: random.Random) -> tuple[str, str, str]:
    good, turn = rng.randrange(2), rng.randrange(len(_TURNS))
    kind, kind2 = rng.sample(list(_WORDS), 2)
    thing, other = rng.choice(kind), rng.choice(kind2)
    x, y = rng.choice(_WORDS[kind][good]), rng.choice(_WORDS[kind][1 - good])
    x2, y2 = rng.choice(_WORDS[kind2][good]), rng.choice(_WORDS[kind2][1 - good])
    words = _TURNS[turn] if good else _TURNS[turn].replace("feared", "hoped")
    text = words.format(thing=thing, other=other, x=x, y=y, x2=x2, y2=y2, very=rng.choice(_VERY), mood=_MOODS[good])
    return text, LABELS[good], f"{turn} {thing} {y if '{y}' in words else x}"


class Sentiment(BaseWorld):
    """The world of opinions: document `index` is the text of `record(index)`."""

    name = "sentiment"

    def record(self, index: int, split: str = "train") -> dict[str, str]:
        return record(index, split, self.seed)

    def document(self, index: int, split: str = "train") -> str:
        return self.record(index, split)["text"]
