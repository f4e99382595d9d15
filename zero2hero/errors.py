"""The exception that users are meant to read, and those that end a run which fell short or was asked to stop.

Anything a person can mend (a wrong path, a misspelt option, a model that does not fit) is raised as
`UserError` with a message that says what was wrong, where, and what to do next. The command line prints
it as one line and exits with code 2; in Python it is an ordinary `ValueError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input or environment that the user can put right."""


class FellShort(Exception):
    """A run came to its end and did not do what it is for. The command line prints why and exits with code 1."""


class Stopped(Exception):
    """The run was asked to stop; it saved first. `signal_number`: SIGINT or SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
