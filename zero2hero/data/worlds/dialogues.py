"""Questions and answers: conversations about a story or its beginning, and sums worked step by step.

    dialogue(0)[0].question    # a story, and a question about it
    dialogue(0)[1].question    # the next question about the same story
    dialogue(0)[1].check("By the river.")

Each answer is known exactly. Instruction tuning on built-in data learns from these, and what the tuned model answers is
checked by them. A dialogue's split is that of its story or sum, so held-out dialogues are about plots and calculations
that are never trained on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from zero2hero.data.worlds.base import BaseWorld, document_rng
from zero2hero.data.worlds.stories import Question, Story, story
from zero2hero.data.worlds.stories.questions import questions_of
from zero2hero.data.worlds.sums import Problem, problem

QUESTIONS_PER_STORY = 8
SHORTEST = 60  # characters of a story's beginning
SUMS = 3  # one dialogue in this many is of sums
SUMS_TOGETHER = 4
SUM_LEVELS = (1, 2)  # see worlds/sums.py


@dataclass(frozen=True)
class Turn:
    """A question as the user writes it, the answer to it, and what kind it is: who, where, yesno, ..., sum."""

    question: str
    answer: str
    kind: str
    problem: Problem | None = None  # of a sum

    def check(self, text: str) -> bool:
        """Is `text` the right answer? Of a sum, the number counts; else all words, in whatever case."""
        if self.problem is not None:
            return self.problem.check(text)
        return same_answer(text, self.answer)


def same_answer(one: str, other: str) -> bool:
    """Word for word the same; case and a full stop do not matter."""
    return one.strip().rstrip(".!").lower() == other.strip().rstrip(".!").lower()


def dialogue(index: int, split: str = "train", seed: int = 0) -> list[Turn]:
    """Dialogue number `index` of a split, a pure function of its arguments.

    Raises UserError for an unknown split or a negative index.
    """
    rng = document_rng("dialogues", seed, split, index)
    if index % SUMS == SUMS - 1:
        numbers = range(SUMS_TOGETHER * index, SUMS_TOGETHER * (index + 1))
        sums = [problem(number, split, seed, level=rng.choice(SUM_LEVELS)) for number in numbers]
        return [Turn(one.question, one.text.partition("\n")[2], "sum", one) for one in sums]
    told = story(index, split, seed)
    text, asked = _beginning(told, rng)
    turns: list[Turn] = []
    for question in _some(asked, QUESTIONS_PER_STORY, rng):
        begin = "" if turns else f"{text}\n\n"
        turns.append(Turn(begin + question.question, question.answer, question.kind))
    return turns


def _some(asked: list[Question], count: int, rng: random.Random) -> list[Question]:
    """So many of the questions, in any order; each kind is as likely as another, though yes and no abound."""
    rng.shuffle(asked)
    earlier = [sum(other.kind == question.kind for other in asked[:i]) for i, question in enumerate(asked)]
    chosen = sorted(range(len(asked)), key=lambda i: earlier[i])[:count]
    rng.shuffle(chosen)
    return [asked[i] for i in chosen]


def _beginning(told: Story, rng: random.Random) -> tuple[str, list[Question]]:
    """A story up to some point, rather early than late, and what can be asked about so much of it."""
    ends = sorted({fact.at for fact in told.facts if fact.at >= SHORTEST} | {len(told.text)})
    end = min(rng.choice(ends), rng.choice(ends))
    asked = questions_of([fact for fact in told.facts if fact.at < end], told.text[:end])
    whole = end == len(told.text)
    return told.text[:end].rstrip(), [q for q in asked if whole or not q.question.endswith("at the end?")]


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    """The dialogue as chat messages."""
    pairs = [(("user", turn.question), ("assistant", turn.answer)) for turn in turns]
    return [{"role": role, "content": content} for pair in pairs for role, content in pair]


class Dialogues(BaseWorld):
    """The world of dialogues: a document is one as plain text, a record the same as messages."""

    name = "dialogues"

    def document(self, index: int, split: str = "train") -> str:
        return "\n".join(message["content"] for message in messages(dialogue(index, split, self.seed)))

    def record(self, index: int, split: str = "train") -> dict[str, Any]:
        """Dialogue number `index` in the form that fine-tuning reads."""
        return {"messages": messages(dialogue(index, split, self.seed))}
