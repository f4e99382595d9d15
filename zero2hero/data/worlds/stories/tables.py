"""Text as data: the small notations in which the words and sentences of the stories are written down.

    words      separated by blanks
    rows       one record a line, cells separated by `;`
    lines      one template a line
    sections   a heading at the margin, its templates indented below it

A template is a sentence or two. A bracket `[a|b|c]` offers a choice; a brace is filled from the story's cast:
`{h}` the hero, `{h.his}` her or his, `{p}` the helper, `{f}` the friend, `{x}` the thing, `{place}` the place.
Everything is parsed once and kept, so telling a story costs a fraction of a millisecond.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_CHOICE = re.compile(r"\[([^\]]*)\]")
_ROLE = re.compile(r"\{(\w+)")


class Template(NamedTuple):
    """A template taken apart. `parts`: fixed text, or a tuple of alternatives. `roles`: everyone and everything
    it names. `lead`: the role that is its very first word ("" when it starts otherwise)."""

    parts: tuple[str | tuple[str, ...], ...]
    roles: tuple[str, ...]
    lead: str


@functools.cache
def template(text: str) -> Template:
    pieces = _CHOICE.split(text)  # fixed text and choices take turns
    parts = tuple(tuple(piece.split("|")) if i % 2 else piece for i, piece in enumerate(pieces) if piece or i % 2)
    lead = re.match(r"\{(\w)\} ", text)
    return Template(parts, tuple(dict.fromkeys(_ROLE.findall(text))), lead[1] if lead else "")


@functools.cache
def lines(text: str) -> tuple[Template, ...]:
    """The templates of a block of text, one a line."""
    return tuple(template(" ".join(line.split())) for line in text.strip().splitlines())


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def rows(text: str) -> list[list[str]]:
    """The records of a table, one a line, cells separated by `;`."""
    return [[" ".join(cell.split()) for cell in line.split(";")] for line in text.strip().splitlines()]


def sections(text: str) -> dict[str, str]:
    """{heading: its indented lines} in the order of the text."""
    found: dict[str, str] = {}
    heading = ""
    for line in text.strip("\n").splitlines():
        if line[:1].strip():
            heading = line.strip()
            found[heading] = ""
        elif line.strip():
            found[heading] += line.strip() + "\n"
    return found


class Way(NamedTuple):
    """One way through a plot: who helps and how it is told."""

    obstacle: str
    resolution: str
    helpers: tuple[str, ...]
    text: str


def ways(text: str) -> dict[tuple[str, str], Way]:
    """Sections with headings `obstacle > resolution: helper helper`, by (obstacle, resolution)."""
    found = {}
    for heading, body in sections(text).items():
        path, _, helpers = heading.partition(":")
        obstacle, resolution = (part.strip() for part in path.split(">"))
        found[obstacle, resolution] = Way(obstacle, resolution, tuple(helpers.split()), body)
    return found
