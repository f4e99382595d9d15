r"""Verifiers: rewards that a program can check, 1 for right and 0 for wrong, such as reasoning is trained on
(Cobbe et al. 2021, arXiv 2110.14168; DeepSeek-R1, arXiv 2501.12948, section 2.2.2).

    number       the last "answer is N", \boxed{N} or "#### N", or else the last number, equals the column `answer`
    choice       the last "answer is (B)", or else the letter it begins with or is, equals the column `answer`
    regex        the text has a match of the column `pattern`; regex=PATTERN: of this one
    think        <think>...</think> once, at the beginning, and then an answer
    unit_tests   the last block of Python passes the column `tests` (in sandbox.py, and only where that is allowed)

What a model writes is hostile input: it is whatever earns the reward. What stands before `</think>` is not an answer;
reading a text takes time linear in its length; a pattern gets a limited time in a process of its own; code, a sandbox.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from zero2hero.align.sandbox import Limits, run_all, run_python
from zero2hero.data.messages import text_of
from zero2hero.errors import UserError

Verdicts = list[float | None]

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?"
_VALUE = rf"(?:-\s?)?\$?(?:{_DIGITS}|\.\d{{1,40}})(?:\s?/\s?{_DIGITS})?(?![\d\w]|[.,]\d)"
_NUMBER = re.compile(rf"(?<![\w.,]){_VALUE}", re.ASCII)
_SAYS = r"(?:answer is\s?:?|answer:|####|\\boxed\{)"
_STATED = re.compile(rf"{_SAYS}\s?(?:\\\(|\*\*)?(?:[a-z] = )?\\?({_VALUE})", re.ASCII | re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d{1,40})\}\{(\d{1,40})\}")
_LETTER = r"(?:\\text\{)?\(?\*{0,2}([A-Z])(?![A-Za-z0-9'])"
_CHOSEN = re.compile(rf"(?i:{_SAYS})\s?{_LETTER}")
_FIRST = re.compile(r"\s?\(?\*{0,2}([A-Za-z])\*{0,2}(?:[).:]|\s{0,9}$)")
_BLOCK = re.compile(r"```(?:python|py)?[^\S\n]{0,9}\n(.*?)(?:```|\Z)", re.DOTALL)
REGEX_SECONDS, REGEX_BATCH = 2.0, 256


def text(completion: Any) -> str:
    """A completion's text: itself, or what its messages say."""
    return completion if isinstance(completion, str) else "\n".join(text_of(message) for message in completion)


def answer_part(completion: Any) -> str:
    """What a completion says after its thoughts; nothing while it still thinks."""
    thoughts, ended, rest = text(completion).rpartition("</think>")
    return rest if ended or "<think>" not in rest else ""


# --- a number ---------------------------------------------------------------------------------------------------


def number_in(written: str) -> Fraction | None:
    """The number that a text gives as its answer: the last one stated as such, or else the last one at all."""
    written = _FRACTION.sub(r"\1/\2", written.replace("\u2212", "-"))
    found = _STATED.findall(written) or _NUMBER.findall(written)
    if not found:
        return None
    above, _, below = re.sub(r"[,$\s]", "", found[-1]).partition("/")
    return Fraction(above) / Fraction(below or "1") if Fraction(below or "1") else None


def number(completions: Sequence[Any], answer: Sequence[Any]) -> Verdicts:
    """Does each completion give the right number? A sample whose answer holds no number is not judged."""
    right = [number_in(str(each)) for each in answer]
    given = [number_in(answer_part(completion)) for completion in completions]
    return [None if r is None else float(g == r) for g, r in zip(given, right, strict=True)]


# --- a choice ---------------------------------------------------------------------------------------------------


def choice_in(written: str) -> str | None:
    """The letter that a text chooses: the last one stated as the answer, or else the one it begins with."""
    stated = _CHOSEN.findall(written)
    if stated:
        return str(stated[-1]).upper()
    first = _FIRST.match(written)
    return first[1].upper() if first else None


def choice(completions: Sequence[Any], answer: Sequence[Any]) -> Verdicts:
    """Does each completion choose the right letter? The answer: "B", "(B)", or a number that counts from 0."""
    right = [
        chr(ord("A") + each) if isinstance(each, int) and 0 <= each < 26 else choice_in(str(each)) for each in answer
    ]
    given = [choice_in(answer_part(completion)) for completion in completions]
    return [None if r is None else float(g == r) for g, r in zip(given, right, strict=True)]


# --- the form ---------------------------------------------------------------------------------------------------


def think(completions: Sequence[Any]) -> Verdicts:
    """Is there a thought, once and at the beginning, and then an answer?"""
    return [float(_thinks_once(text(completion))) for completion in completions]


def _thinks_once(written: str) -> bool:
    if written.count("<think>") != 1 or written.count("</think>") != 1:
        return False
    before, _, rest = written.partition("<think>")
    thought, ended, answer = rest.partition("</think>")
    return bool(ended and thought.strip() and answer.strip()) and not before.strip()


def regex(completions: Sequence[Any], pattern: Sequence[str]) -> Verdicts:
    """Does each completion have a match of its pattern? One whose search takes too long has none, with a warning.

    Raises:
        UserError: a pattern that is none.
    """
    for each in dict.fromkeys(pattern):
        try:
            re.compile(each)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise UserError(f"{each!r:.80} is no regular expression: {error}") from error
    pairs = [(p, text(c)) for p, c in zip(pattern, completions, strict=True)]
    found: Verdicts = []
    while len(found) < len(pairs):
        batch = pairs[len(found) : len(found) + REGEX_BATCH]
        program = f"import re\nfor pattern, text in {batch!r}: print(int(bool(re.search(pattern, text))), flush=True)"
        outcome = run_python(program, limits=Limits(REGEX_SECONDS, 1024), trusting=True)  # it is our own
        found += [float(line) for line in outcome.output.split()]
        if not outcome.passed:
            slow = pairs[len(found)]
            warnings.warn(f"the pattern {slow[0]!r:.80} ends in a {outcome.reason} on {slow[1]!r:.80}", stacklevel=2)
            found.append(0.0)
    return found


# --- code -------------------------------------------------------------------------------------------------------


def code_in(written: str) -> str:
    """The last block of Python in a text, or the text where there is no block."""
    blocks = _BLOCK.findall(written)
    return str(blocks[-1]) if blocks else written


def unit_tests(completions: Sequence[Any], tests: Sequence[Any]) -> Verdicts:
    """Does each completion's code pass its tests: Python with `assert`, or a list of such lines?"""
    lines = [each if isinstance(each, str) else "\n".join(each) for each in tests]
    outcomes = run_all([(code_in(answer_part(c)), each) for c, each in zip(completions, lines, strict=True)])
    return [float(outcome.passed) for outcome in outcomes]


# --- by name ----------------------------------------------------------------------------------------------------

# name -> (function, the column that it compares with)
VERIFIERS: dict[str, tuple[Callable[..., Verdicts], str]] = {
    "number": (number, "answer"),
    "choice": (choice, "answer"),
    "regex": (regex, "pattern"),
    "think": (think, ""),
    "unit_tests": (unit_tests, "tests"),
}


def verifier(name: str, argument: str = "", *, allow_code_execution: bool = False) -> Callable[..., Verdicts]:
    """A verifier as a reward function.

    Args:
        argument: the column to compare with, in place of the usual one; of regex, a pattern for all samples.

    Raises:
        UserError: code would have to be run, and that is not allowed. From the function: there is no such column.
    """
    check, usual = VERIFIERS[name]
    if name == "unit_tests" and not allow_code_execution:
        raise UserError(
            "unit_tests runs Python that the model writes, confined (see zero2hero/align/sandbox.py for what that is "
            "worth): allow it with --allow_code_execution"
        )
    column = argument if argument and name != "regex" else usual

    def reward(completions: Sequence[Any], **columns: Sequence[Any]) -> Verdicts:
        if not column:
            return check(completions)
        if name == "regex" and argument:
            return check(completions, [argument] * len(completions))
        if column not in columns:
            raise UserError(f"the data have no column '{column}' to compare with; there is {', '.join(columns)}")
        known = [i for i, value in enumerate(columns[column]) if value is not None]  # data may be mixed
        verdicts: Verdicts = [None] * len(completions)
        for i, verdict in zip(known, check([completions[i] for i in known], [columns[column][i] for i in known])):
            verdicts[i] = verdict
        return verdicts

    return reward
