"""Short children's stories, told from a simulated world, with questions that have exact answers.

    story(0).text                       # a story; the same one for ever
    story(0, "validation").questions()  # what one can ask about it

In the manner of TinyStories (Eldan and Li, 2023: simple words, so that a very small model can learn to write
well), but every sentence comes from a world state that says who is where, who holds what and how they feel.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from zero2hero.data.worlds.base import BaseWorld, document_rng
from zero2hero.data.worlds.stories import plots_brave, plots_doing, plots_friends, plots_lost, plots_town
from zero2hero.data.worlds.stories.questions import Question, questions_of
from zero2hero.data.worlds.stories.skeleton import PLOTS, Skeleton
from zero2hero.data.worlds.stories.telling import Fact, Teller

__all__ = ["Fact", "Question", "Skeleton", "Stories", "Story", "story", "story_of"]

# Importing these registers their plots.
_PLOT_MODULES = (plots_lost, plots_friends, plots_brave, plots_doing, plots_town)
_FAMILIES = tuple(sorted(PLOTS))


@dataclass(frozen=True)
class Story:
    """A story, the plot it follows and everything that is true in it, in the order in which it is told."""

    title: str
    text: str
    skeleton: Skeleton
    facts: tuple[Fact, ...]

    def questions(self) -> list[Question]:
        """Every question that this story answers, always in the same order."""
        return questions_of(self.facts, self.text)


def _title_case(title: str) -> str:
    small = ("a", "an", "and", "for", "in", "of", "on", "the", "to")
    words = title.split()
    return " ".join(w if w in small and i else w[0].upper() + w[1:] for i, w in enumerate(words))


def story(index: int, split: str = "train", seed: int = 0) -> Story:
    """Story number `index` of a split: a pure function of its arguments.

    Raises UserError for a split that is not "train" or "validation", or a negative index.
    """
    return story_of(document_rng("stories", seed, split, index), split)


def story_of(rng: random.Random, split: str) -> Story:
    """The story that these chances make, of the split's plots. Nothing but `rng.random()` is asked."""
    plot = PLOTS[_FAMILIES[int(rng.random() * len(_FAMILIES))]]
    choices = plot.skeletons[split]
    skeleton = choices[int(rng.random() * len(choices))]
    teller = Teller(rng, animals="a" in plot.worlds and (plot.worlds == "a" or rng.random() < 0.4))
    title = plot.tell(teller, skeleton)
    return Story(_title_case(title), teller.text, skeleton, tuple(teller.facts))


class Stories(BaseWorld):
    """The world of stories: document `index` is the text of `story(index)`."""

    name = "stories"

    def document(self, index: int, split: str = "train") -> str:
        return story(index, split, self.seed).text
