"""What a family is: a table that says how its files spell what we call a configuration and a tensor.

Declared once, read in both directions: loading, saving, and the error messages of both. A rule maps one of
their tensors to one or several of ours; `{i}` stands for the layer. Anything that a table does not name is
an error, never a guess: a tensor that is silently ignored gives fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError, did_you_mean

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


@dataclass(frozen=True)
class Family:
    """One `model_type` of the ecosystem.

    Attributes:
        names: our configuration field -> their key in config.json.
        defaults: their key -> the value that an absent key means.
        constants: our field -> the value that this family always has.
        fixed: their key -> values under which our mathematics is theirs; any other value is refused.
        written: further keys to write into config.json.
        rules: tensors. Those whose parts a given model lacks (a bias, an untied head) do not apply.
        ignored: tensors of old files that carry no information (buffers).
        matches: whether a configuration can be written as this family, when `constants` agree.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    constants: Mapping[str, Any]
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    optional_prefix: str = ""
    derive: Callable[[dict[str, Any]], dict[str, Any]] = lambda theirs: {}
    matches: Callable[[DecoderConfig], bool] = lambda config: True

    def read_config(self, theirs: Mapping[str, Any]) -> DecoderConfig:
        """Our configuration from the contents of config.json."""
        said = {k: _NULL.get(k) if v is None else v for k, v in theirs.items() if v is not None or k in _NULL}
        given = {**self.defaults, **said}
        for key, allowed in self.fixed.items():
            if key in given and given[key] not in allowed:
                raise UserError(
                    f"config.json: {key} = {given[key]!r} changes the mathematics of {self.model_type} in a way that "
                    f"is not supported; supported: {', '.join(map(repr, allowed))}"
                )
        ours = dict(self.constants)
        for name, key in self.names.items():
            if key in given:
                ours[name] = given[key]
        ours.update(self.derive(given))
        missing = [self.names[f] for f in ("vocab_size", "hidden_size") if f not in ours]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}, which {self.model_type} needs")
        known = set(self.names.values()) | set(self.fixed) | set(self.written)
        extra = {k: v for k, v in theirs.items() if k not in known}
        return DecoderConfig(**ours, model_type=self.model_type, extra=extra).derived()

    def write_config(self, config: DecoderConfig) -> dict[str, Any]:
        """The contents of config.json, in spellings that transformers 4 and 5 both read."""
        theirs: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        theirs |= {k: v for k, v in config.extra.items() if k not in ("architectures", "model_type")}
        theirs |= self.written
        theirs |= {key: getattr(config, name) for name, key in self.names.items()}
        if "rope_theta" in theirs:  # version 4 reads the first spelling, version 5 the second
            theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        return theirs

    def can_write(self, config: DecoderConfig) -> bool:
        return all(getattr(config, k) == v for k, v in self.constants.items()) and self.matches(config)

    def rules_for(self, config: DecoderConfig, ours: set[str]) -> list[Rule]:
        """Every rule of this model, layers spelt out; `ours` are the names of the model's parameters."""
        spelt = []
        for rule in self.rules:
            for i in range(config.num_hidden_layers if "{i}" in rule.theirs else 1):
                parts = tuple(p.format(i=i) for p in rule.parts)
                if all(p in ours for p in parts):
                    spelt.append(Rule(rule.theirs.format(i=i), parts, rule.transpose))
        return spelt


def unknown_family(model_type: Any, known: list[str]) -> UserError:
    return UserError(
        f"config.json: model_type {model_type!r} is not one that zero2hero knows "
        f"({', '.join(sorted(known))}).{did_you_mean(str(model_type), known)}"
    )
