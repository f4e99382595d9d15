"""Scenes: small pictures of coloured shapes, with captions, and questions whose answers are exact.

    scene = Scenes().scene(0)
    scene.pixels        # [32, 32, 3]
    scene.caption       # "a small red circle left of a large blue ring"
    scene.questions     # [Question("what colour is the ring?", "blue"), Question("is there a red ring?", "no"), ...]

`scenes` hold one to three shapes, `shapes` a single one, and its caption says where. Which split a scene belongs to
is decided by what is to be seen in it (in `scenes`, the colours and shapes together; in `shapes`, also size and place),
so what is held out is a combination that training has never shown: the idea of CLEVR (Johnson et al. 2017, arXiv
1612.06890).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from zero2hero.data.worlds.base import BaseWorld, document_rng, split_of
from zero2hero.data.worlds.raster import SHAPES, Pixels, paint

COLOURS = {
    "red": (0.86, 0.15, 0.15), "green": (0.15, 0.65, 0.25), "blue": (0.2, 0.35, 0.95), "yellow": (0.95, 0.85, 0.2),
    "purple": (0.6, 0.25, 0.75), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
SIZES = {"small": 0.09, "large": 0.15}  # radius, as a share of the canvas
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three")
VALIDATION_SHARE = 8  # one combination in this many is for validation


@dataclass(frozen=True)
class Thing:
    """One shape: `row` and `column` are those of a grid of 3 x 3."""

    colour: str
    shape: str
    size: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """As in "at the top left"."""
        row, column = ROWS[self.row], COLUMNS[self.column]
        if row == "middle":
            return "in the centre" if column == "centre" else f"on the {column}"
        return f"at the {row}" if column == "centre" else f"at the {row} {column}"


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """What is to be seen, and the seed of what is left to chance: jitter of places and colours, noise."""

    things: tuple[Thing, ...]
    seed: int
    image_size: int

    @cached_property
    def pixels(self) -> Pixels:
        """[S, S, 3], on a dark ground."""
        rng, side = np.random.default_rng(self.seed), self.image_size
        canvas = np.full((side, side, 3), rng.uniform(0.0, 0.25), np.float32)
        for thing in self.things:
            radius = side * SIZES[thing.size] * rng.uniform(0.9, 1.1)
            x, y = ((at + 0.5) * side / 3 + rng.uniform(-0.03, 0.03) * side for at in (thing.column, thing.row))
            colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-0.06, 0.06, 3), 0.0, 1.0)
            paint(canvas, thing.shape, tuple(colour), x, y, radius)
        noisy = canvas + rng.normal(0.0, 0.02, canvas.shape)
        return np.clip(noisy * 255, 0, 255).astype(np.uint8)

    @property
    def caption(self) -> str:
        """One thing with its place, or things from left to right."""
        first, *others = sorted(self.things, key=lambda thing: (thing.column, thing.row))
        if not others:
            return f"a {first.size} {first.name} {first.place}"
        words, before = f"a {first.size} {first.name}", first
        for thing in others:
            words += " left of " if before.column < thing.column else " above "
            words += f"a {thing.size} {thing.name}"
            before = thing
        return words

    @property
    def questions(self) -> list[Question]:
        """Every question that has one answer; the same ones for the same scene."""
        rng = random.Random(self.seed)
        return [question for ask in _ASKED for question in ask(self.things, rng)]


# --- the kinds of questions -------------------------------------------------------------------------------------


def _unique(things: tuple[Thing, ...], field: str) -> list[Thing]:
    counts = Counter(getattr(thing, field) for thing in things)
    return [thing for thing in things if counts[getattr(thing, field)] == 1]


def what_shape(things: tuple[Thing, ...], rng: random.Random) -> Iterator[Question]:
    for thing in _unique(things, "colour"):
        yield Question(f"what shape is the {thing.colour} thing?", thing.shape)


def what_colour(things: tuple[Thing, ...], rng: random.Random) -> Iterator[Question]:
    for thing in _unique(things, "shape"):
        yield Question(f"what colour is the {thing.shape}?", thing.colour)


def is_there(things: tuple[Thing, ...], rng: random.Random) -> Iterator[Question]:
    """Something that is there; and what is not, but nearly: the shape or the colour of something that is."""
    yield Question(f"is there a {(thing := rng.choice(things)).name}?", "yes")
    names = {thing.name for thing in things}
    near = [f"{thing.colour} {shape}" for shape in SHAPES] + [f"{colour} {thing.shape}" for colour in COLOURS]
    yield Question(f"is there a {rng.choice([name for name in near if name not in names])}?", "no")


def how_many(things: tuple[Thing, ...], rng: random.Random) -> Iterator[Question]:
    yield Question("how many things are there?", NUMBERS[len(things)])
    for kind, values in (("shape", list(SHAPES)), ("colour", list(COLOURS))):
        value = rng.choice([*(getattr(thing, kind) for thing in things), rng.choice(values)])
        count = sum(getattr(thing, kind) == value for thing in things)
        plural = f"{value} things" if kind == "colour" else f"{value}{'es' * (value == 'cross') or 's'}"
        yield Question(f"how many {plural} are there?", NUMBERS[count])


def left_or_right(things: tuple[Thing, ...], rng: random.Random) -> Iterator[Question]:
    pairs = [(a, b) for a, b in itertools.permutations(things, 2) if a.column != b.column]
    if pairs:
        one, other = rng.choice(pairs)
        side = "left" if one.column < other.column else "right"
        yield Question(f"is the {one.name} left or right of the {other.name}?", side)


_ASKED = (what_shape, what_colour, is_there, how_many, left_or_right)


# --- the worlds -------------------------------------------------------------------------------------------------


class Scenes(BaseWorld):
    """Scenes of one to three things, no two of one colour and shape, no two in one place of the grid."""

    name = "scenes"
    most = 3

    def __init__(self, seed: int = 0, image_size: int = 32) -> None:
        super().__init__(seed)
        self.image_size = image_size

    def scene(self, index: int, split: str = "train") -> Scene:
        """Scene number `index` of a split, the same one at every call."""
        rng = document_rng(self.name, self.seed, split, index)
        while True:
            scene = self._draw(rng)
            if split_of(self.combination(scene), VALIDATION_SHARE) == split:
                return scene

    def _draw(self, rng: random.Random) -> Scene:
        count = rng.randint(1, self.most)
        names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
        places = rng.sample([(row, column) for row in range(3) for column in range(3)], count)
        things = tuple(Thing(*name, rng.choice(list(SIZES)), *place) for name, place in zip(names, places))
        return Scene(things, rng.getrandbits(64), self.image_size)

    def combination(self, scene: Scene) -> str:
        """What decides the split."""
        return ", ".join(sorted(thing.name for thing in scene.things))

    def document(self, index: int, split: str = "train") -> str:
        """The caption."""
        return self.scene(index, split).caption

    def record(self, index: int, split: str = "train") -> dict[str, Any]:
        """The picture, its caption, and one of its questions."""
        scene = self.scene(index, split)
        asked = random.Random(scene.seed).choice(scene.questions)
        return {"image": scene.pixels, "caption": scene.caption, "question": asked.text, "answer": asked.answer}


class Shapes(Scenes):
    """Scenes of a single thing; the label is its shape."""

    name = "shapes"
    most = 1

    def combination(self, scene: Scene) -> str:
        return scene.caption

    def record(self, index: int, split: str = "train") -> dict[str, Any]:
        """The picture, its caption, and its shape as a label."""
        scene = self.scene(index, split)
        return {"image": scene.pixels, "caption": scene.caption, "label": scene.things[0].shape}
