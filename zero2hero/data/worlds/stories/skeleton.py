"""Plot skeletons: what a story is about, before a word of it is told, and which split may tell it.

A skeleton is a tuple (family, goal, obstacle, helper, resolution, moral). A stable hash of it decides whether
it belongs to training or to validation (about one in sixteen), so a validation story never has the plot of a
training story: a low validation loss means that the model can tell new plots, not that it remembers old ones.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zero2hero.data.worlds.base import SPLITS, split_of
from zero2hero.data.worlds.stories.tables import Way
from zero2hero.data.worlds.stories.telling import Teller

VALIDATION_SHARE = 16  # one skeleton in this many is for validation


class Skeleton(NamedTuple):
    family: str
    goal: str
    obstacle: str
    helper: str
    resolution: str
    moral: str

    @property
    def split(self) -> str:
        return split_of("|".join(self), VALIDATION_SHARE)


Tell = Callable[[Teller, Skeleton], str]  # tells the story, returns its title


@dataclass(frozen=True)
class Plot:
    """A family of stories: how one is told, the plots there are, and who may play in them ("h" people, "a" animals)."""

    tell: Tell
    every: Callable[[], list[Skeleton]]
    worlds: str

    @functools.cached_property
    def skeletons(self) -> dict[str, tuple[Skeleton, ...]]:
        """The family's skeletons by split."""
        every = self.every()
        return {split: tuple(s for s in every if s.split == split) for split in SPLITS}


PLOTS: dict[str, Plot] = {}


def plot(
    family: str,
    goals: Iterable[str],
    ways: Iterable[Way],
    morals: Sequence[str],
    worlds: str = "ha",
    fits: Callable[[Skeleton], bool] = lambda skeleton: True,
) -> Callable[[Tell], Tell]:
    """Register a plot family: every goal with every way and every moral, where they fit together."""

    def every() -> list[Skeleton]:
        return [
            skeleton
            for goal, way, moral in itertools.product(goals, ways, morals)
            for helper in way.helpers
            if fits(skeleton := Skeleton(family, goal, way.obstacle, helper, way.resolution, moral))
        ]

    def register(tell: Tell) -> Tell:
        PLOTS[family] = Plot(tell, every, worlds)
        return tell

    return register
