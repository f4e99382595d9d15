"""Rewards: what says how good a completion is. Functions, verifiers and reward models, all called in one way.

    number                          a verifier (verifiers.py): it checks against a column of the data, or a rule
    number=solution                 ... against the column `solution`;   regex=\\d+ euros   ... or a pattern
    my_package.rewards:politeness   a Python function of an installed package
    rewards.py:politeness           ... or of your own file
    runs/reward                     a reward model's directory (reward_model.py)

A function has the form that TRL's users know (https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function)

    def f(prompts, completions, completion_ids, **columns) -> list[float | None]

with one entry in each list for each completion: texts, or lists of messages where the data are conversations; columns
are those of the data beside the prompt. It is handed those that it has parameters for. None: the function does not
apply to this sample, which then counts by the others alone. Whatever else is wrong with what it returns is an error
that names it: a reward nobody checked is a policy that learned the bug.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zero2hero.align.verifiers import VERIFIERS, verifier
from zero2hero.command_line import named
from zero2hero.errors import UserError, did_you_mean
from zero2hero.fetch import find_folder

RewardFunction = Callable[..., Sequence["float | None"]]


@dataclass(frozen=True)
class Scores:
    """What N completions are worth: total_N, weighted; and of each function, by_function_NF (NaN: did not apply)."""

    total_N: Tensor
    by_function_NF: Tensor


@dataclass(frozen=True)
class Rewards:
    """Several reward functions that count together.

    Attributes:
        functions: name -> function; the names appear in metrics as `rewards/NAME/mean`.
        weights: of each, in order.
        timeout: seconds that a function may take; watched where Python can interrupt it (in the main thread).
    """

    functions: Mapping[str, RewardFunction]
    weights: tuple[float, ...]
    timeout: float = 600.0

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Scores:
        """The rewards of N completions.

        Args:
            prompts, completions: N texts each, or N lists of messages.
            completion_ids: their tokens, where there are such.
            columns: name -> N values.

        Raises:
            UserError: a function raises, takes too long, or returns another number of rewards than N, NaN, an infinite
                number, or something that is no number. It names the function.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **(columns or {})}
        by_function = [
            torch.tensor(
                _checked(name, _call(name, function, given, self.timeout), len(completions)), dtype=torch.float32
            )
            for name, function in self.functions.items()
        ]
        by_function_NF = torch.stack(by_function, dim=-1).float()
        if (unrewarded_N := by_function_NF.isnan().all(-1)).any():
            first = int(unrewarded_N.nonzero()[0])
            warnings.warn(
                f"no reward function applies to {int(unrewarded_N.sum())} of {len(completions)} samples, which count "
                f"as 0; the first is an answer to {prompts[first]!r:.200}",
                stacklevel=2,
            )
        return Scores((by_function_NF * torch.tensor(self.weights)).nansum(-1), by_function_NF)

    def metrics(self, by_function_NF: Tensor) -> dict[str, float]:
        """`rewards/NAME/mean` and `/std` of each function, over the samples that it applies to."""
        found = {}
        for name, column_N in zip(self.functions, by_function_NF.unbind(-1), strict=True):
            known = column_N[~column_N.isnan()].double()
            if len(known):
                found[f"rewards/{name}/mean"] = float(known.mean())
                found[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else 0.0
        return found


def load_rewards(
    names: str | Sequence[str | RewardFunction],
    weights: Sequence[float] | None = None,
    *,
    allow_code_execution: bool = False,
) -> Rewards:
    """The reward functions that the command line names (see the top of this file), or functions themselves.

    Args:
        weights: one for each; by default all count 1.
        allow_code_execution: verifiers may run Python that the model wrote (sandbox.py).

    Raises:
        UserError: none of that name, or another number of weights.
    """
    given = [names] if isinstance(names, str) else list(names)
    if not given:
        raise UserError(f"name what rewards an answer: {', '.join(VERIFIERS)}, path.py:function, or a reward model")
    functions: dict[str, RewardFunction] = {}
    for spec in given:
        name, function = _find(spec, allow_code_execution) if isinstance(spec, str) else (_name(spec, "function"), spec)
        while name in functions:
            name += "_"
        functions[name] = function
    chosen = tuple(float(w) for w in (weights or [1.0] * len(functions)))
    if len(chosen) != len(functions) or not all(map(math.isfinite, chosen)):
        raise UserError(f"{len(functions)} reward functions ({', '.join(functions)}) need as many finite weights")
    return Rewards(functions, chosen)


# --- finding ----------------------------------------------------------------------------------------------------


def _find(spec: str, allow_code_execution: bool) -> tuple[str, RewardFunction]:
    name, _, argument = spec.partition("=")
    if name in VERIFIERS:
        return name, verifier(name, argument, allow_code_execution=allow_code_execution)
    if (found := named_member(spec, "reward")) is not None:
        return spec.rpartition(":")[2], found
    if Path(spec).is_dir() or "/" in spec:
        folder = find_folder(spec)
        return Path(folder).name, named("zero2hero.align.reward_model:reward_function")(folder)
    raise UserError(
        f"there is no reward '{spec}'.{did_you_mean(spec, VERIFIERS)} Name a verifier ({', '.join(VERIFIERS)}), a "
        "function (module:function or path.py:function), or a reward model's directory"
    )


def named_member(spec: str, kind: str) -> Any:
    """What `path.py:name` or `module:name` names; None where `spec` has no such form. `kind`: for the error."""
    place, colon, name = spec.rpartition(":")
    if colon and place.endswith(".py"):
        return _member(_run_file(Path(place).expanduser()), name, place)
    if not colon or not name.isidentifier():
        return None
    try:
        return _member(importlib.import_module(place), name, place)
    except ImportError as error:
        raise UserError(f"{kind} {spec}: cannot import {place} ({error}). Of a file, write path.py:{name}") from error


def _run_file(path: Path) -> ModuleType:
    """The user's own file as a module. It runs: they named it."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if (path.parent / "config.json").exists():
        raise UserError(
            f"{path} lies beside a model, and code that comes with a model is never run. If it is yours, put it "
            "into another folder"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be run: {_first_line(error)}") from error
    return module


def _member(module: ModuleType, name: str, place: str) -> Any:
    found = getattr(module, name, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UserError(f"{place} has no function '{name}'.{did_you_mean(name, known)} It has {', '.join(known)}")
    return found


# --- calling ----------------------------------------------------------------------------------------------------


class _TooLong(BaseException):
    """Not an Exception: the function itself should not catch it."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` in what runs here after so many seconds; only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _call(name: str, function: RewardFunction, given: Mapping[str, Any], timeout: float) -> Any:
    """What `function` returns for the parameters that it has."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of some that are written in C
        raise UserError(f"reward {name} does not say what parameters it has: wrap it in a function that does") from None
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        needed = [p.name for p in parameters if p.default is p.empty and p.name not in given]
        if needed:
            known = ", ".join(column for column in given if column != "completion_ids")
            raise UserError(f"reward {name} needs a column '{needed[0]}' that the data do not have; there is {known}")
        given = {p.name: given[p.name] for p in parameters if p.name in given}
    try:
        with _at_most(timeout):
            return function(**given)
    except _TooLong:
        raise UserError(f"reward {name} was stopped after {timeout:g} seconds: it hangs, or is too slow") from None
    except UserError as error:
        raise UserError(f"reward {name}: {error}") from error
    except Exception as error:
        raise UserError(f"reward {name} raised {_first_line(error)}{_line_of(error)}") from error


def _checked(name: str, rewards: Any, count: int) -> list[float]:
    """The rewards as numbers, NaN where the function does not apply."""
    if inspect.iscoroutine(rewards):
        rewards.close()
        raise UserError(f"reward {name} is an async function: write it as an ordinary one")
    if isinstance(rewards, (str, bytes, Mapping)) or not hasattr(rewards, "__len__"):
        raise UserError(f"reward {name} returned {rewards!r:.60}; expected a list with a number for each completion")
    values = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)  # of arrays and tensors, too
    if len(values) != count:
        raise UserError(f"reward {name} returned {len(values)} rewards for {count} completions")
    for i, value in enumerate(values):
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise UserError(
                f"reward {name} returned {value!r:.60} for completion {i}; expected a finite number, or None"
            )
    return [math.nan if value is None else float(value) for value in values]


def _name(function: RewardFunction, otherwise: str) -> str:
    return getattr(function, "__name__", otherwise)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}" + (f": {lines[0]:.300}" if lines else "")


def _line_of(error: Exception) -> str:
    """Where in the function's own file it went wrong."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
