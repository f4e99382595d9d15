"""Environments: what answers the model while it answers, such as a tool, a game, or another speaker.

    class Guess:                                        # in guess.py; --environment guess.py:Guess
        stop = ()                                       # texts that end a turn, beside the end token

        def reset(self, record):                        # the record's columns, before each answer
            self.secret = int(record["secret"])

        def step(self, text):                           # what the model wrote in its turn
            if str(self.secret) in text:
                return None                             # done
            return [{"role": "user", "content": "Higher!" if ... else "Lower!"}]

What `step` returns is put behind the model's words, which then goes on: a text as it stands, or messages as the chat
template puts them. Each answer has an environment of its own. What the model wrote stays the tokens that it sampled,
and the environment's tokens are read and never trained: the model did not choose them (Jin et al. 2025, "Search-R1",
arXiv 2503.09516, section 3.1). All turns together have room for max_completion_length tokens.

`calculator` is an environment for arithmetic: behind `<calc>12 * 7</calc>` it writes `<result>84</result>`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

from zero2hero.align.rewards import named_member
from zero2hero.errors import UserError, did_you_mean
from zero2hero.generate.engine import Sequence as Text
from zero2hero.tokenizer import Tokenizer

LONGEST = 100  # characters of a calculation


class Environment(Protocol):
    """See the top of this file."""

    stop: tuple[str, ...]

    def reset(self, record: Mapping[str, Any]) -> None: ...

    def step(self, text: str) -> str | list[dict[str, Any]] | None: ...


class Calculator:
    """Answers `<calc>...</calc>` at the end of a turn: + - * / and brackets, exactly."""

    stop = ("</calc>",)

    def reset(self, record: Mapping[str, Any]) -> None:
        """It remembers nothing."""

    def step(self, text: str) -> str | None:
        asked = re.search(r"<calc>([^<>]*)</calc>\s*$", text)
        return None if asked is None else f"<result>{calculate(asked[1])}</result>"


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def calculate(words: str) -> str:
    """The value of an arithmetic expression that a model wrote, or what is wrong with it. Nothing of it is run."""
    if len(words) > LONGEST:
        return "error: too long"
    try:
        value = _value(ast.parse(words.strip().replace("×", "*").replace(",", ""), mode="eval").body)
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return "error: not a calculation"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError


# --- in a rollout -----------------------------------------------------------------------------------------------

ENVIRONMENTS: dict[str, Callable[[], Any]] = {"calculator": Calculator}


class Talks:
    """Environments for all samples of a rollout, each made by `make`."""

    def __init__(self, name: str, make: Callable[[], Environment], tokenizer: Tokenizer) -> None:
        self.name, self.make, self.tokenizer = name, make, tokenizer
        self.stop = tuple(getattr(make, "stop", ()))

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> Callable[[int, Text], list[int] | None]:
        """For samples with these records: (number of the sample, its turn) -> tokens to put behind it, None at its end.

        Raises (when called, too):
            UserError: the environment fails; it is named.
        """
        environments = [self._guarded(self.make) for _ in records]
        for environment, record in zip(environments, records):
            self._guarded(environment.reset, record)

        def after_turn(number: int, turn: Text) -> list[int] | None:
            said = self._guarded(environments[number].step, self.tokenizer.decode(turn.output_ids))
            return None if said is None else self._ids(said)

        return after_turn

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            what = getattr(function, "__name__", "it")
            raise UserError(f"environment {self.name}: {what} raised {type(error).__name__}: {error}") from error

    def _ids(self, said: Any) -> list[int]:
        """An observation's tokens. Its text cannot pass for special tokens; those of the template are real ones."""
        if isinstance(said, str):
            return self.tokenizer.encode(said, add_special_tokens=False, split_special_tokens=True)
        if not isinstance(said, list):
            raise UserError(
                f"environment {self.name}: step returned {said!r:.60}; a text, messages or None is expected"
            )
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        spoken = self.tokenizer.apply_chat_template(before)
        whole = self.tokenizer.apply_chat_template([*before, *said], add_generation_prompt=True)
        end = max((i for i, token in enumerate(spoken) if token in self.tokenizer.all_special_ids), default=-1) + 1
        if whole[:end] != spoken[:end]:
            raise UserError(f"environment {self.name}: the chat template writes earlier turns anew when one is added")
        return whole[end:]  # what follows the end of the model's turn, which it wrote itself


def find_environment(spec: str, tokenizer: Tokenizer) -> Talks:
    """The environment that the command line names: calculator, path.py:Class or module:Class.

    Raises:
        UserError: there is none of that name.
    """
    make = ENVIRONMENTS.get(spec) or named_member(spec, "environment")
    if make is None:
        raise UserError(
            f"there is no environment '{spec}'.{did_you_mean(spec, ENVIRONMENTS)} There is {', '.join(ENVIRONMENTS)}, "
            "or a class of yours: path.py:Class"
        )
    return Talks(spec, make, tokenizer)
