"""Sums: arithmetic and small word problems with worked steps and an answer that can be checked.

    problem(0, level=2).text
    # What is 47 + 38?
    # 7 + 8 = 15, write 5 and carry 1. 4 + 3 + 1 = 8. So 47 + 38 = 85.
    # The answer is 85.

Levels: 1 one-digit addition and subtraction; 2 two-digit, by tens and ones, with carrying; 3 multiplication,
by tens and ones; 4 word problems with one step; 5 word problems with two steps. The steps compute what they
say: a model that learns to write them down learns the algorithm (scratchpads: Nye et al., 2021).

A problem belongs to a split by a hash of its calculation, so no validation problem is ever seen in training, not
even in other words or with its numbers swapped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zero2hero.data.worlds.base import BaseWorld, document_rng, split_of
from zero2hero.errors import UserError

LEVELS = (1, 2, 3, 4, 5)
VALIDATION_SHARE = 8  # one problem in this many is for validation
_ANSWER = re.compile(r"answer is\s*:?\s*\$?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question, the steps that solve it and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: int
    level: int

    @property
    def text(self) -> str:
        """The whole problem as one document."""
        return f"{self.question}\n{' '.join(self.steps)}\nThe answer is {self.answer}."

    @property
    def solution(self) -> str:
        """The steps, a line each, and the answer in the last one: "#### 85"."""
        return "\n".join([*self.steps, f"#### {self.answer}"])

    def check(self, text: str) -> bool:
        """Is this the right answer? What counts is the last "answer is N", else the last number of `text`."""
        stated = _ANSWER.findall(text) or _NUMBER.findall(text)
        return bool(stated) and float(stated[-1].replace(",", "")) == self.answer


# -- one operation, step by step ------------------------------------------------------------------------------
def add_steps(a: int, b: int) -> list[str]:
    """Column addition from the ones up, naming every carry."""
    if a < 10 and b < 10:
        return [f"{a} + {b} = {a + b}."]
    steps, carry, place = [], 0, 1
    while place <= max(a, b):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        said = f"{x} + {y} + {carry} = {total}" if carry else f"{x} + {y} = {total}"
        carry = total // 10
        last = place * 10 > max(a, b)
        steps.append(f"{said}, write {total % 10} and carry 1." if carry and not last else f"{said}.")
        place *= 10
    return [*steps, f"So {a} + {b} = {a + b}."]


def subtract_steps(a: int, b: int) -> list[str]:
    """Take away the tens first, then the ones."""
    tens, ones = b // 10 * 10, b % 10
    if not tens or not ones:
        return [f"{a} - {b} = {a - b}."]
    return [f"{a} - {tens} = {a - tens}.", f"{a - tens} - {ones} = {a - b}.", f"So {a} - {b} = {a - b}."]


def multiply_steps(a: int, b: int) -> list[str]:
    """Split the first factor into tens and ones, multiply each, add."""
    tens, ones = a // 10 * 10, a % 10
    if not tens or not ones:
        return [f"{a} * {b} = {a * b}."]
    return [
        f"{a} is {tens} + {ones}.",
        f"{tens} * {b} = {tens * b} and {ones} * {b} = {ones * b}.",
        f"{tens * b} + {ones * b} = {a * b}.",
        f"So {a} * {b} = {a * b}.",
    ]


_STEPS = {"+": add_steps, "-": subtract_steps, "*": multiply_steps}
_VALUE: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
_ASK = (
    "What is {a} {op} {b}?",
    "Calculate {a} {op} {b}.",
    "How much is {a} {op} {b}?",
    "{a} {op} {b} = ?",
)


def _key(work: list[tuple[int, str, int]]) -> str:
    """What makes two problems the same: the calculation, whatever the words and the order of a sum or product."""
    return "; ".join(f"{a} - {b}" if op == "-" else f"{min(a, b)} {op} {max(a, b)}" for a, op, b in work)


def _bare(rng: random.Random, level: int) -> tuple[str, str, list[tuple[int, str, int]]]:
    """Level 1 to 3: (question, key, the calculations)."""
    op = "*" if level == 3 else rng.choice("+-")
    top = {1: 9, 2: 99, 3: 99}[level]
    a = rng.randint(0 if level == 1 else 10, top)
    b = rng.randint(0 if level == 1 else 2, 9 if level == 3 else top)
    if op == "-" and b > a:
        a, b = b, a
    return rng.choice(_ASK).format(a=a, op=op, b=b), _key([(a, op, b)]), [(a, op, b)]


# -- word problems --------------------------------------------------------------------------------------------
# the operation(s); the question. {n} a name, {a}, {b}, {c} numbers, {x} things
_ONE_STEP = (
    ("+", "{n} has {a} {x} and finds {b} more. How many {x} does {n} have now?"),
    ("+", "There are {a} {x} in a basket and {b} {x} in a box. How many {x} are there in all?"),
    ("+", "In the morning {n} counts {a} {x}, and in the evening {b} {x}. How many {x} does {n} count that day?"),
    ("-", "{n} has {a} {x} and gives away {b} of them. How many {x} does {n} have left?"),
    ("-", "There were {a} {x} on the table. Then {b} of them were taken away. How many {x} are still there?"),
    ("-", "{n} needs {a} {x} and already has {b}. How many {x} are still missing?"),
    ("*", "{n} fills {a} bags with {b} {x} each. How many {x} are there in the bags?"),
    ("*", "There are {a} rows of {b} {x}. How many {x} are there?"),
)
_TWO_STEPS = (
    ("*+", "{n} buys {a} boxes of {b} {x} and finds {c} more. How many {x} does {n} have?"),
    ("*-", "{n} picks {a} baskets of {b} {x} and gives away {c} {x}. How many {x} are left?"),
    ("+-", "{n} has {a} {x}, gets {b} more and loses {c}. How many {x} does {n} have now?"),
    ("-+", "{n} has {a} {x}. {n} gives {b} to a friend and then finds {c} more. How many {x} does {n} have now?"),
    ("+*", "{n} puts {a} red {x} and {b} blue {x} into each of {c} jars. How many {x} are there in the jars?"),
)
_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Hanna", "Ivan", "Lena", "Max", "Nora", "Omar", "Theo")
_THINGS = ("apples", "marbles", "stickers", "shells", "nuts", "buttons", "stamps", "pencils", "plums", "coins")


def _told(rng: random.Random, level: int) -> tuple[str, str, list[tuple[int, str, int]]]:
    """Level 4 and 5: (question, key, the calculations)."""
    ops, words = rng.choice(_ONE_STEP if level == 4 else _TWO_STEPS)
    small = (2, 9)
    a = rng.randint(*(small if ops in ("*", "*+", "*-", "+*") else (10, 60)))
    b = rng.randint(*(small if "*" in ops else (2, a if ops[0] == "-" else 40)))
    first = _VALUE[ops[0]](a, b)
    work = [(a, ops[0], b)]
    c = 0
    if len(ops) == 2:
        c = rng.randint(*{"+": (2, 40), "-": (1, first), "*": small}[ops[1]])
        work.append((first, ops[1], c))
    question = words.format(n=rng.choice(_NAMES), x=rng.choice(_THINGS), a=a, b=b, c=c)
    return question, _key(work), work


def problem(index: int, split: str = "train", seed: int = 0, level: int | None = None) -> Problem:
    """Problem number `index` of a split: a pure function of its arguments. Without `level`, any of them.

    Raises UserError for an unknown split or level, or a negative index.
    """
    if level is not None and level not in LEVELS:
        raise UserError(f"unknown level {level!r} of sums: use one of {', '.join(map(str, LEVELS))}")
    rng = document_rng(f"sums {level}", seed, split, index)
    while True:  # by rejection: a problem of the other split is drawn again
        drawn = level or rng.choice(LEVELS)
        question, key, work = (_bare if drawn <= 3 else _told)(rng, drawn)
        if split_of(key, VALIDATION_SHARE) == split:
            break
    steps = [step for a, op, b in work for step in _STEPS[op](a, b)]
    a, op, b = work[-1]
    return Problem(question, tuple(steps), _VALUE[op](a, b), drawn)


class Sums(BaseWorld):
    """The world of sums: document `index` is the text of `problem(index)`, its record the same in GSM8K's form."""

    name = "sums"
    level: int | None = None  # any

    def document(self, index: int, split: str = "train") -> str:
        return problem(index, split, self.seed, self.level).text

    def record(self, index: int, split: str = "train") -> dict[str, Any]:
        """Question and worked answer, as GSM8K writes them down (Cobbe et al. 2021, arXiv 2110.14168)."""
        found = problem(index, split, self.seed, self.level)
        return {"question": found.question, "answer": found.solution, "level": found.level}


class TwoDigitSums(Sums):
    """Those of level 2 alone, which a small model can learn to the end in minutes."""

    name = "two_digit_sums"
    level = 2
