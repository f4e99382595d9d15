"""Which modules of a model an adapter changes, by our names or by those of the family's files.

A BERT's `layers.0.self_attn.q_proj` is `bert.encoder.layer.0.attention.self.query` elsewhere, and PEFT's users know it
as `query`. The family's table (models/families) has both names, and either finds the module here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from zero2hero.errors import UserError, did_you_mean
from zero2hero.models.families import Family, family_to_write
from zero2hero.tune.config import LoraConfig
from zero2hero.tune.lora import Adapted

HEADS = (
    "lm_head",
    "head",
    "classifier",
    "score",
    "pooler",
)  # what "all-linear" leaves out, by the first part of the name


def modules_by_name(model: nn.Module) -> dict[str, Any]:
    """Every module of the model as it was before adapters were wrapped around some, under the name that it had."""
    wrappers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Adapted))
    found = {name: module for name, module in model.named_modules() if name and not name.startswith(wrappers)}
    return {name: module.base if isinstance(module, Adapted) else module for name, module in found.items()}


def is_linear(module: nn.Module) -> bool:
    """Whether it has a matrix [out, in] that an adapter can stand beside, quantized or not."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def base_parameters(model: nn.Module) -> list[str]:
    """The names of the model's parameters before anything was wrapped around their modules, or quantized."""
    names = [name for name, _ in model.named_parameters(recurse=False)]
    for name, module in modules_by_name(model).items():
        if is_linear(module):
            names += [f"{name}.weight", *([] if module.bias is None else [f"{name}.bias"])]
        else:
            names += [f"{name}.{kind}" for kind, _ in module.named_parameters(recurse=False)]
    return names


def family_names(model: nn.Module) -> tuple[Family, dict[str, str]]:
    """The model's family, and each module's name in ours -> its name in that family's files.

    Several of ours may have one name there: GPT-2 keeps query, key and value in one matrix.

    Raises:
        UserError: no published architecture fits this model.
    """
    family = family_to_write(model.config)
    rules = family.rules_for(base_parameters(model))
    return family, {
        part.removesuffix(".weight"): rule.theirs.removesuffix(".weight")
        for rule in rules
        for part in rule.parts
        if part.endswith(".weight")
    }


def all_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Each module's name -> every name that it goes by."""
    theirs: Mapping[str, str] = {}
    with suppress(UserError):
        theirs = family_names(model)[1]
    return {name: (name, theirs[name]) if name in theirs else (name,) for name in modules_by_name(model)}


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, tuple[str, ...]]:
    """The modules that `config` asks to adapt: name -> every name that it goes by.

    Raises:
        UserError: a name that no module has, nothing found at all, or a module that is neither linear nor an embedding.
    """
    names, modules, wanted = all_names(model), modules_by_name(model), config.target_modules
    linear = {name: names[name] for name, module in modules.items() if is_linear(module)}
    if wanted == "all-linear":
        candidates = {name: also for name, also in linear.items() if not _is_head(name)}
    else:
        _check_known([] if isinstance(wanted, str) else wanted, names, "target_modules")
        candidates = {name: also for name, also in names.items() if matches(wanted, also)}
    saved = find_saved(model, config)
    found = {name: also for name, also in candidates.items() if name not in saved and is_kept(config, name, also)}
    if not found:
        some = ", ".join(list(linear)[:3])
        raise UserError(
            f"target_modules {wanted!r} finds no module to adapt; this model's are named {some} ... A list holds names "
            "or their ends, a text is a regular expression of whole names."
        )
    for name in found:
        if name not in linear and not isinstance(modules[name], nn.Embedding):
            kind = type(modules[name]).__name__
            raise UserError(f"target_modules: {name} is a {kind}; LoRA stands beside linear modules and embeddings")
    return found


def _is_head(name: str) -> bool:
    """A language model within another has its head further in."""
    return name.split(".")[0] in HEADS or name.endswith(".lm_head")


def is_kept(config: LoraConfig, name: str, also: tuple[str, ...]) -> bool:
    """Whether `exclude_modules` and `layers_to_transform` leave a module in."""
    layers = config.layers_to_transform
    within = layers is None or _layer(name) in ([layers] if isinstance(layers, int) else layers)
    return within and not matches(config.exclude_modules, also)


def find_saved(model: nn.Module, config: LoraConfig) -> dict[str, tuple[str, ...]]:
    """The modules that are trained as a whole: those with parameters of their own, in what `modules_to_save` names."""
    names, modules = all_names(model), modules_by_name(model)
    own = {
        name: also for name, also in names.items() if next(modules[name].parameters(recurse=False), None) is not None
    }
    _check_known(config.modules_to_save, names, "modules_to_save", _is_part)
    wanted = [*config.modules_to_save, *config.heads]
    return {name: also for name, also in own.items() if any(_is_part(target, also) for target in wanted)}


def matches(wanted: str | list[str] | None, names: tuple[str, ...]) -> bool:
    """As PEFT reads `target_modules`: a text is a regular expression, a list holds names or their ends."""
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names for target in wanted or [])


def _is_part(target: str, names: tuple[str, ...]) -> bool:
    """Whether a module is the one named `target`, or lies in it."""
    return any(f".{target}." in f".{name}." for name in names)


def _layer(name: str) -> int | None:
    """The number of the layer in which a module is."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def _check_known(
    wanted: list[str],
    names: dict[str, tuple[str, ...]],
    field: str,
    fits: Callable[[str, tuple[str, ...]], bool] = lambda target, also: matches([target], also),
) -> None:
    for target in wanted:
        if not any(fits(target, also) for also in names.values()):
            ends = {name.rpartition(".")[2]: None for also in names.values() for name in also}
            ends = dict.fromkeys(end for end in ends if not end.isdigit())
            raise UserError(f"{field}: no module is named {target!r}.{did_you_mean(target, ends)}")
