"""What a family is: a table that says how its files spell what we call a configuration and a tensor.

Declared once, read in both directions: loading, saving, and the error messages of both. A rule maps one of their
tensors to one or several of ours; `{i}` (and any other name in braces) stands for a number, of a layer, say. Anything
that a table does not name is an error, never a guess: a tensor that is silently ignored gives fluent nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zero2hero.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

# Keys where null is an answer of its own (none, or 0: to be derived) and not the same as an absent key.
_NULL = {"sliding_window": None, "num_key_value_heads": 0, "head_dim": 0}


@dataclass(frozen=True)
class Rule:
    """Their tensor `theirs` is our tensor `ours`, or several of ours stacked along dimension 0.

    `transpose`: stored [in, out] (GPT-2's Conv1D) where ours is [out, in].
    """

    theirs: str
    ours: str | tuple[str, ...]
    transpose: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def spelt_out(self, names: Collection[str]) -> list[Rule]:
        """This rule for each of the parameters `names` that it fits, numbers in place of what is in braces."""
        pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(self.parts[0])))
        found = (match.groupdict() for match in map(pattern.fullmatch, names) if match)
        rules = [Rule(self.theirs.format(**n), tuple(p.format(**n) for p in self.parts), self.transpose) for n in found]
        return [rule for rule in rules if all(part in names for part in rule.parts)]


@dataclass(frozen=True)
class Family:
    """One `model_type` of the ecosystem.

    Attributes:
        architectures: the names under "architectures" in config.json -> what each says of our fields (which head,
            say). The first one is meant when the key is absent.
        config_class: our configuration: a frozen dataclass with `model_type`, `extra` and `derived()`.
        build: makes the model of a configuration. It is called on the meta device, so constant tables (buffers)
            are made with an explicit device.
        names: our configuration field -> their key in config.json.
        constants: our field -> the value that this family always has.
        rules: tensors. Those whose parts a given model lacks (a bias, an untied head) do not apply.
        defaults: their key -> the value that an absent key means.
        required: our fields without which there is no model.
        fixed: their key -> values under which our mathematics is theirs; any other value is refused.
        written: further keys to write into config.json.
        ignored: endings of tensors in old files that carry no information (buffers).
        older: (pattern, replacement) pairs that turn names of older files into those of `rules`.
        derive: fields of ours that several of their keys decide.
        spell: its inverse, which writes every key that `derive` reads.
        settle: the last word on a configuration, by the names of the stored tensors.
        matches: whether a configuration can be written as this family, when `constants` agree.
    """

    model_type: str
    architectures: Mapping[str, Mapping[str, Any]]
    config_class: type
    build: Callable[[Any], nn.Module]
    names: Mapping[str, str]
    constants: Mapping[str, Any]
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ("vocab_size", "hidden_size")
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    older: tuple[tuple[str, str], ...] = ()
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda theirs: {}
    spell: Callable[[Any], dict[str, Any]] = lambda config: {}
    settle: Callable[[Any, Collection[str]], Any] = lambda config, stored: config
    matches: Callable[[Any], bool] = lambda config: True

    def read_config(self, theirs: Mapping[str, Any]) -> Any:
        """Our configuration (of `config_class`) from the contents of config.json."""
        said = {k: _NULL.get(k) if v is None else v for k, v in theirs.items() if v is not None or k in _NULL}
        given = {**self.defaults, **said}
        for key, allowed in self.fixed.items():
            if key in given and given[key] not in allowed:
                raise UserError(
                    f"config.json: {key} = {given[key]!r} changes the mathematics of {self.model_type} in a way that "
                    f"is not supported; supported: {', '.join(map(repr, allowed))}"
                )
        ours = {**self.constants, **self._architecture(given)}
        for name, key in self.names.items():
            if key in given:
                ours[name] = given[key]
        ours.update(self.derive(given))
        missing = [self.names.get(name, name) for name in self.required if name not in ours]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}, which {self.model_type} needs")
        known = {*self.names.values(), *self.fixed, *self.written, "architectures", "model_type"}
        extra = {k: v for k, v in theirs.items() if k not in known}
        return self.config_class(**ours, model_type=self.model_type, extra=extra).derived()

    def _architecture(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the architecture's name says of our configuration."""
        name = (given.get("architectures") or list(self.architectures))[0]
        if name not in self.architectures:
            raise UserError(
                f"config.json: the architecture {name!r} is not one of {self.model_type} that zero2hero knows "
                f"({', '.join(self.architectures)}).{did_you_mean(str(name), self.architectures)}"
            )
        return self.architectures[name]

    def write_config(self, config: Any) -> dict[str, Any]:
        """The contents of config.json, in spellings that transformers 4 and 5 both read."""
        named = {key: getattr(config, name) for name, key in self.names.items()}
        kind = {"architectures": [self._architecture_to_write(config)], "model_type": self.model_type}
        return {**config.extra, **self.written, **named, **self.spell(config), **kind}

    def _architecture_to_write(self, config: Any) -> str | None:
        fitting = (name for name, fields in self.architectures.items() if _agrees(config, fields))
        return next(fitting, None)

    def can_write(self, config: Any) -> bool:
        """Whether this family's files can hold such a model."""
        return (
            type(config) is self.config_class
            and _agrees(config, self.constants)
            and self._architecture_to_write(config) is not None
            and self.matches(config)
        )

    def rules_for(self, names: Collection[str]) -> list[Rule]:
        """Every rule of a model with the parameters `names`, numbers spelt out."""
        names = dict.fromkeys(names)  # in order, unlike a set
        return [spelt for rule in self.rules for spelt in rule.spelt_out(names)]

    def newer_name(self, stored: str) -> str:
        """The name under which `rules` know a tensor of an older file."""
        for pattern, replacement in self.older:
            stored = re.sub(pattern, replacement, stored)
        return stored


def _agrees(config: Any, fields: Mapping[str, Any]) -> bool:
    return all(getattr(config, name) == value for name, value in fields.items())


def unknown_family(model_type: Any, known: list[str]) -> UserError:
    return UserError(
        f"config.json: model_type {model_type!r} is not one that zero2hero knows "
        f"({', '.join(sorted(known))}).{did_you_mean(str(model_type), known)}"
    )
