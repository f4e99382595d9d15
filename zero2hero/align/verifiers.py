"""Verifiers: rewards that a program can check, 1 for right and 0 for wrong, such as reasoning is trained on
(Lightman et al. 2023, arXiv 2305.20050, section 2; DeepSeek-R1, arXiv 2501.12948, section 2.2.2).

    number       the last "answer is N", \\boxed{N}, "#### N" or else the last number equals the column `answer`
    choice       the last "answer is (B)", or else the last letter that stands alone, equals it
    regex        the text matches a pattern
    think        <think>...</think> once, at the beginning, and then an answer
    unit_tests   the last block of Python passes the tests (run in sandbox.py, where that is allowed)

What a model writes is hostile input: it is whatever earns the reward. Every check takes time linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from zero2hero.data.messages import text_of

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?"
_VALUE = rf"(?:-\s?)?\$?(?:{_DIGITS}|\.\d{{1,40}})(?:\s?/\s?{_DIGITS})?"
_NUMBER = re.compile(rf"(?<![\w.]){_VALUE}(?!\w)")
_STATED = re.compile(
    rf"(?:answer is\s?:?\s?|####\s?|\\boxed\{{\s?)(?:\$|\*\*|\\\$|\\\(|[a-z]{{1,8}} = )?({_VALUE})", re.I
)


def text(completion: Any) -> str:
    """A completion's text: itself, or what its messages say."""
    return completion if isinstance(completion, str) else "\n".join(text_of(message) for message in completion)


def number_in(written: str) -> Fraction | None:
    """The number that a text gives as its answer: the last one stated as such, or else the last one at all."""
    found = _STATED.findall(written) or _NUMBER.findall(written)
    if not found:
        return None
    above, _, below = re.sub(r"[,$\s]", "", found[-1]).partition("/")
    try:
        return Fraction(above) / Fraction(below or "1")
    except ZeroDivisionError:
        return None


def number(completions: Sequence[Any], answer: Sequence[Any]) -> list[float | None]:
    """Does each completion give the right number? A sample whose answer holds no number is not judged."""
    right = [number_in(str(each)) for each in answer]
    return [None if r is None else float(number_in(text(c)) == r) for c, r in zip(completions, right, strict=True)]


VERIFIERS: dict[str, Callable[..., list[float | None]]] = {"number": number}


def verifier(
    name: str, argument: str | None = None, *, allow_code_execution: bool = False
) -> Callable[..., list[float | None]]:
    """The verifier `name` as a reward function; `argument` is the column to compare with."""
    check, column = VERIFIERS[name], argument or "answer"

    def reward(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        from zero2hero.errors import UserError

        if column not in columns:
            raise UserError(f"the data have no column '{column}' to compare with; there is {', '.join(columns)}")
        return check(completions, columns[column])

    return reward
