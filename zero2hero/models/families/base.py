"""What a family is: a table that says how its files spell what we call a configuration and a tensor.

Declared once, read in both directions: loading, saving, and the error messages of both. A rule maps one of their
tensors to one or several of ours; `{i}` (and any other name in braces) stands for a number, of a layer, say. Anything
that a table does not name is an error, never a guess: a tensor that is silently ignored gives fluent nonsense.

A model of several models (an image reader and a language model, say) nests their configurations in its own. Its table
names the families that may stand in each place, and their tables do the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zero2hero.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

# Keys where null is an answer of its own (none, or 0: to be derived) and not the same as an absent key.
_NULL = {
    "sliding_window": None, "num_key_value_heads": 0, "head_dim": 0,
    "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Their tensor `theirs` is our tensor `ours`, or several of ours stacked along dimension 0.

    `transpose`: stored [in, out] (GPT-2's Conv1D) where ours is [out, in]. `dims`: stored with so many dimensions,
    leading ones of size 1 added or left out.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transpose: bool = False
    dims: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def spelt_out(self, names: Collection[str]) -> list[Rule]:
        """This rule for each of the parameters `names` that it fits, numbers in place of what is in braces."""
        pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(self.parts[0])))
        found = (match.groupdict() for match in map(pattern.fullmatch, names) if match)
        rules = [
            replace(self, theirs=self.theirs.format(**n), ours=tuple(p.format(**n) for p in self.parts)) for n in found
        ]
        return [rule for rule in rules if all(part in names for part in rule.parts)]

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file (before any transposition) of what has this shape here."""
        if self.dims is None:
            return shape
        return (1,) * (self.dims - len(shape)) + shape[max(0, len(shape) - self.dims) :]


def pairs(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules for a module with a weight and a bias."""
    return tuple(Rule(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias"))


@dataclass(frozen=True)
class Part:
    """A model inside a model: a nested configuration, and tensors under names of their own.

    Attributes:
        families: that may stand here; the first one is meant when the nested configuration has no model_type.
        ours: what our parameters' names begin with.
        theirs: (pattern, replacement) for the names that the part has in files of its own; the first that fits.
    """

    families: tuple[Family, ...]
    ours: str
    theirs: tuple[tuple[str, str], ...] = ()

    def of_file(self, nested: Mapping[str, Any]) -> Part:
        """With the one family that a nested configuration names."""
        known = {family.model_type: family for family in self.families}
        model_type = nested.get("model_type") or self.families[0].model_type
        if model_type not in known:
            raise unknown_family(model_type, list(known))
        return replace(self, families=(known[model_type],))

    def of_config(self, config: Any) -> Part | None:
        """With the family that can write this configuration: the one it was read from, or the first that fits."""
        fitting = [family for family in self.families if family.can_write(config)]
        fitting.sort(key=lambda family: family.model_type != config.model_type)
        return replace(self, families=(fitting[0],)) if fitting else None

    def rules_for(self, names: Collection[str]) -> list[Rule]:
        inner = [name.removeprefix(self.ours) for name in names if name.startswith(self.ours)]
        return [
            replace(rule, theirs=self._name(rule.theirs), ours=tuple(self.ours + part for part in rule.parts))
            for rule in self.families[0].rules_for(inner)
        ]

    def _name(self, theirs: str) -> str:
        for pattern, replacement in self.theirs:
            name, count = re.subn(pattern, replacement, theirs)
            if count:
                return name
        return theirs


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
        parts: our field, which is also their key, of each nested configuration -> what may stand there.
    """

    model_type: str
    architectures: dict[str, dict[str, Any]]
    config_class: type
    build: Callable[[Any], nn.Module]
    names: dict[str, str]
    constants: dict[str, Any]
    rules: tuple[Rule, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    older: tuple[tuple[str, str], ...] = ()
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda theirs: {}
    spell: Callable[[Any], dict[str, Any]] = lambda config: {}
    settle: Callable[[Any, Collection[str]], Any] = lambda config, stored: config
    matches: Callable[[Any], bool] = lambda config: True
    parts: Mapping[str, Part] = field(default_factory=dict)

    def of_file(self, theirs: Mapping[str, Any]) -> Family:
        """This family with the one family of each part that the contents of config.json name."""
        parts = {key: part.of_file(nested_config(theirs, key)) for key, part in self.parts.items()}
        ignored = {ending for part in parts.values() for ending in part.families[0].ignored}
        return replace(self, parts=parts, ignored=(*self.ignored, *sorted(ignored)))

    def of_config(self, config: Any) -> Family | None:
        """This family with the families of the parts under which such a model is written; None where none fits."""
        if not self._fits(config):
            return None
        parts = {key: part.of_config(getattr(config, key)) for key, part in self.parts.items()}
        return replace(self, parts={key: part for key, part in parts.items() if part}) if all(parts.values()) else None

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
        for key, part in self.parts.items():
            ours[key] = part.families[0].read_config(nested_config(theirs, key))
        missing = [self.names.get(name, name) for name in self.required if name not in ours]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}, which {self.model_type} needs")
        ours.update(self.derive(given))
        known = {*self.names.values(), *self.fixed, *self.written, "architectures", "model_type"}
        known |= {spelling for key in self.parts for spelling in (key, f"{key}_dict")}
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
        nested = {key: part.families[0].write_config(getattr(config, key)) for key, part in self.parts.items()}
        for content in nested.values():
            del content["architectures"]
        return {**config.extra, **self.written, **named, **nested, **self.spell(config), **kind}

    def _architecture_to_write(self, config: Any) -> str | None:
        fitting = (name for name, fields in self.architectures.items() if _agrees(config, fields))
        return next(fitting, None)

    def can_write(self, config: Any) -> bool:
        """Whether this family's files can hold such a model."""
        return self.of_config(config) is not None

    def _fits(self, config: Any) -> bool:
        return (
            type(config) is self.config_class
            and _agrees(config, self.constants)
            and self._architecture_to_write(config) is not None
            and self.matches(config)
        )

    def rules_for(self, names: Collection[str]) -> list[Rule]:
        """Every rule of a model with the parameters `names`, numbers spelt out."""
        names = dict.fromkeys(names)  # in order, unlike a set
        rules = [spelt for rule in self.rules for spelt in rule.spelt_out(names)]
        return rules + [rule for part in self.parts.values() for rule in part.rules_for(names)]

    def newer_name(self, stored: str) -> str:
        """The name under which `rules` know a tensor of an older file."""
        for pattern, replacement in self.older:
            stored = re.sub(pattern, replacement, stored)
        return stored


def nested_config(theirs: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested configuration, without the name of a head, for which the whole has no use.

    Old files of CLIP have a second one, under another key, which counts.
    """
    content = theirs.get(f"{key}_dict") or theirs.get(key) or {}
    if not isinstance(content, Mapping):
        raise UserError(f"config.json: {key} should be an object, not {content!r}")
    return {name: value for name, value in content.items() if name != "architectures"}


@dataclass(frozen=True)
class HeadedFamily(Family):
    """A family whose files leave out the prefix when no head stands beside the body."""

    def rules_for(self, names: Collection[str]) -> list[Rule]:
        rules, prefix = super().rules_for(names), f"{self.model_type}."
        bare = all(rule.theirs.startswith(prefix) for rule in rules)
        return [replace(rule, theirs=rule.theirs.removeprefix(prefix)) for rule in rules] if bare else rules


def read_labels(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our `id2label`: numbers to names. Two labels are what an absent key means."""
    names = theirs.get("id2label")
    if names is None:
        names = {i: f"LABEL_{i}" for i in range(theirs.get("num_labels", 2))}
    return {"id2label": {int(i): name for i, name in names.items()}}


def spell_labels(config: Any) -> dict[str, Any]:
    """Its inverse, and the labels' numbers."""
    return {
        "id2label": {str(i): name for i, name in config.id2label.items()},
        "label2id": {name: i for i, name in config.id2label.items()},
    }


def classifying(family: Family) -> Family:
    """A family of decoders with, beside its language model, the one that scores texts (ForSequenceClassification).

    Its head, a matrix without a bias, reads each text's last token. Reward models have one label.
    """
    writes = next(iter(family.architectures))
    name = re.sub("(ForCausalLM|LMHeadModel)$", "", writes)
    scores = f"{name}{'Text' if name == 'Gemma3' else ''}ForSequenceClassification"

    def derive(theirs: dict[str, Any]) -> dict[str, Any]:
        labels = read_labels(theirs) if (theirs.get("architectures") or [writes])[0] == scores else {}
        return family.derive(theirs) | labels

    return replace(
        family,
        architectures={writes: {"task": "causal_lm"}, scores: {"task": "sequence_classification"}},
        rules=(*family.rules, Rule("score.weight", "score.weight")),
        derive=derive,
        spell=lambda c: family.spell(c) | (spell_labels(c) if c.id2label else {}),
    )


def _agrees(config: Any, fields: Mapping[str, Any]) -> bool:
    return all(getattr(config, name) == value for name, value in fields.items())


def unknown_family(model_type: Any, known: list[str]) -> UserError:
    return UserError(
        f"config.json: model_type {model_type!r} is not one that zero2hero knows "
        f"({', '.join(sorted(known))}).{did_you_mean(str(model_type), known)}"
    )
