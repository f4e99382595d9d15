"""From the words of a command line to a configuration, and its help: one mechanism for every verb.

A verb's options are the fields of its dataclass, read by jsonargparse from YAML (`--config`) and from the command line,
which overrides. Help texts are the comments beside the fields, so no option is described twice.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zero2hero.config import NO_OPTION, default_of, from_dict
from zero2hero.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Verb:
    """One verb: what it is for, and where its configuration and its function stand ("module:name", imported late)."""

    what: str
    config: str
    run: str
    examples: tuple[str, ...]
    positional: tuple[str, ...] = ()  # options that may stand without their names, in this order


def named(place: str) -> Any:
    """What "module:name" stands for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def parse(name: str, verb: Verb, words: Sequence[str]) -> Any:
    """The configuration of a verb from its words. Prints help and exits when asked for it.

    Raises:
        UserError: an unknown option (with the nearest known one), a missing or wrong value, a broken YAML file.
    """
    kind, positional = named(verb.config), verb.positional
    options = {o.name: o for o in describe(kind)}
    if "-h" in words or "--help" in words:
        print(_help(name, verb, list(options.values())))
        raise SystemExit(0)
    words = _as_options(name, words, options, positional)
    given = {word.partition("=")[0].removeprefix("--") for word in words}
    missing = [n.upper() for n in positional if options[n].default == "required" and not given & {n, "config"}]
    if missing:
        raise UserError(f"{name} needs {' and '.join(missing)}, as in: {verb.examples[0]}")
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False, default_env=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(kind, as_group=False)
    try:
        values = parser.parse_args(words, defaults=False).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        file = next((word.partition("=")[2] for word in words if word.startswith("--config=")), "")
        raise UserError(_explain(str(error).replace('"<unicode string>"', file))) from None
    values.pop("config", None)
    return from_dict(kind, values)


def _as_options(verb: str, words: Sequence[str], options: dict[str, Option], positional: tuple[str, ...]) -> list[str]:
    """Every word as `--name=value`: positional words named, bare flags (`--resume`) true, names checked."""
    out: list[str] = []
    waiting = list(positional)
    i = 0
    while i < len(words):
        word = words[i]
        if not word.startswith("--"):
            if not waiting:
                raise UserError(f"'{word}' is one word too many. Quote a text of several words.")
            out.append(f"--{waiting.pop(0)}={word}")
            i += 1
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in options and name != "config":
            near = did_you_mean(f"--{name}", [f"--{known}" for known in options])
            raise UserError(f"{verb} has no option --{name}.{near} `zero2hero {verb} --help` lists them.")
        following = words[i + 1] if i + 1 < len(words) else None
        if not equals and name in options and options[name].flag and following not in ("true", "false"):
            value = "true"
        elif not equals:
            if following is None:
                raise UserError(f"the option --{name} needs a value")
            value = following
            i += 1
        out.append(f"--{name}={value}")
        i += 1
    return out


def _explain(message: str) -> str:
    """jsonargparse's message in our words: the option, what it takes, what was given."""
    found = re.search(r'key "([^"]+)".*?Expected an? (.+?)\. Got value: ([^\n]*)', message, re.S)
    if found:
        expected = found[2].replace("<class '", "").replace("'>", "")
        given = found[3].strip()
        hint = f". As a list of one: --{found[1]} '[{given}]'" if expected == "list" else ""
        return f"--{found[1]} takes {expected}, not {given!r}{hint}"
    if message.startswith("Unexpected config"):  # and then all that is in the file
        return "--config takes a YAML file of options, `name: value` on each line; this one holds something else"
    return " ".join(line.strip() for line in message.splitlines()[:3] if line.strip())


def _help(name: str, verb: Verb, options: list[Option]) -> str:
    """What a verb does, examples, then its options by group."""
    usage = " ".join(["zero2hero", name, *(word.upper() for word in verb.positional), "[--option value ...]"])
    lines = [verb.what, "", f"usage: {usage}", "", "examples:", *(f"  {e}" for e in verb.examples)]
    group = None
    for option in options:
        prefix = option.name.rpartition(".")[0]
        if prefix != group:
            lines += ["", f"{prefix or 'options'}:"]
            group = prefix
        head = f"  --{option.name} {option.kind}"
        text = f"{option.help} " * bool(option.help) + f"({option.default})"
        wrapped = textwrap.wrap(text, 70)
        lines.append(f"{head:<46}  {wrapped[0]}" if len(head) <= 46 else head)
        lines += [" " * 48 + line for line in (wrapped[1:] if len(head) <= 46 else wrapped)]
    lines += [
        "",
        "  --config FILE                                 a YAML file with any of these; the command line overrides it",
    ]
    return "\n".join(lines)


# --- what is shown of a configuration ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option: its dotted name, type and default for people, and the comment beside the field above."""

    name: str
    kind: str
    default: str
    help: str
    flag: bool


def describe(kind: Any, prefix: str = "", within: Any = None) -> list[Option]:
    """Every option of a configuration class. Help texts are the comments and docstrings of its fields.

    `within`: the value of the class that is the default here, where it is a part of another.
    """
    hints, notes, options = typing.get_type_hints(kind), _notes(kind), []
    for f in sorted(dataclasses.fields(kind), key=lambda f: dataclasses.is_dataclass(hints[f.name])):
        if f.metadata == NO_OPTION:
            continue
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            options += describe(hint, f"{prefix}{f.name}.", getattr(within, f.name, None) or default_of(f))
            continue
        default = getattr(within, f.name) if within is not None else default_of(f)
        required = default is dataclasses.MISSING
        shown = "required" if required else f"default {'none' if default in (None, [], '') else default}"
        kind_name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        options.append(Option(prefix + f.name, kind_name, shown, notes.get(f.name, ""), hint is bool))
    return options


def _notes(kind: Any) -> dict[str, str]:
    """The comment at the end of each field's line, or the docstring below it."""
    source = "".join(
        inspect.getsource(each) for each in reversed(inspect.getmro(kind)) if dataclasses.is_dataclass(each)
    )
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    for name, text in re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.M | re.S):
        notes[name] = " ".join(text.split())
    return notes
