"""Adapters on a model: put them there, choose among them, do without them for a while.

    model = add_lora(model, LoraConfig(r=16, lora_alpha=32))     # everything but the adapter is frozen now
    add_lora(model, LoraConfig(target_modules=["q_proj"]), "other")
    set_adapter(model, "default")                                 # one of several, at run time
    with disable_adapter(model):                                  # the base model: a reference without a second copy
        reference = model(ids)

A wrapped module keeps its place, and the model's file knows nothing of it. Adapters work in the model's precision and
are kept in fp32 until the trainer casts them: it holds fp32 masters of what is trained, and only of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zero2hero.errors import UserError, did_you_mean
from zero2hero.tune.config import LoraConfig
from zero2hero.tune.lora import Adapted, LoraEmbedding, LoraLinear
from zero2hero.tune.targets import find_saved, find_targets


class SavedModule(Adapted):
    """A module of which an adapter has a copy of its own: a head that learns as a whole (`modules_to_save`)."""

    def add(self, name: str) -> None:
        self.adapters[name] = copy.deepcopy(self.base)

    @property
    def chosen(self) -> nn.Module:
        return self.base if self.current is None else self.current

    @property
    def weight(self) -> Any:
        return self.chosen.weight

    @property
    def bias(self) -> Any:
        return getattr(self.chosen, "bias", None)

    def forward(self, *inputs: Any) -> Any:
        return self.chosen(*inputs)


def add_lora(model: nn.Module, config: LoraConfig, adapter_name: str = "default", seed: int = 0) -> nn.Module:
    """Add an adapter, make it the active one, and freeze everything else. The same model, changed in place.

    Args:
        model: of any kind; its linear modules may be quantized.
        config: which modules, what rank and so on.
        adapter_name: there may be several.
        seed: of the first random numbers.

    Raises:
        UserError: the name is taken, no such modules, or a rank above a matrix's smaller side. Nothing is changed then.
    """
    targets = find_targets(model, config)
    sizes = {name: (config.rank_of(*also), config.alpha_of(*also)) for name, also in targets.items()}
    return install(model, config, adapter_name, sizes, list(find_saved(model, config)), seed)


def install(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    sizes: dict[str, tuple[int, float]],
    saved: list[str],
    seed: int = 0,
) -> nn.Module:
    """`add_lora` for known modules: `sizes` gives rank and alpha of each, `saved` those that are trained as a whole."""
    fine = re.fullmatch(r"\w[\w-]*", adapter_name) and not hasattr(nn.ModuleDict, adapter_name)
    if not fine or adapter_name in adapter_names(model):
        fault = "is taken by another adapter" if fine else "is not a name of letters, digits, _ and -"
        raise UserError(f"adapter_name {adapter_name!r} {fault}")
    wrappers = {name: _wrapper(model, name, LoraLinear) for name in sizes}
    for name, wrapper in wrappers.items():
        if config.use_dora and isinstance(wrapper, LoraEmbedding):
            raise UserError(f"use_dora: DoRA of an embedding ({name}) is not supported; exclude it")
        smaller = min(wrapper.in_features, wrapper.out_features)
        if sizes[name][0] > smaller:
            raise UserError(
                f"r {sizes[name][0]} is more than {smaller}, the smaller side of {name}: its rank cannot be higher"
            )
    wrappers |= {name: _wrapper(model, name, SavedModule) for name in saved}
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, wrapper in wrappers.items():
        if name in sizes:
            wrapper.add(adapter_name, *sizes[name], config, generator)
        else:
            wrapper.add(adapter_name)
        wrapper.train(model.training)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, wrapper)
    set_adapter(model, adapter_name)
    return model


def _wrapper(model: nn.Module, name: str, kind: type[Adapted]) -> Any:
    """The wrapper around a module: the one that is there, or a new one (not yet in the model)."""
    module = model.get_submodule(name)
    if isinstance(module, Adapted):
        if isinstance(module, SavedModule) != (kind is SavedModule):
            raise UserError(f"{name} is trained as a whole by one adapter, so another cannot add LoRA to it")
        return module
    if isinstance(module, nn.Embedding) and kind is LoraLinear:
        return LoraEmbedding(module)
    return kind(module)


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The wrappers in a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters."""
    return list(dict.fromkeys(name for module in adapted_modules(model).values() for name in module.adapters))


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Let this adapter work and be trained, and no other; None: the base model alone.

    Raises:
        UserError: there is no such adapter.
    """
    known = adapter_names(model)
    if adapter_name is not None and adapter_name not in known:
        raise UserError(
            f"the model has no adapter {adapter_name!r}, only {', '.join(known) or 'none at all'}."
            f"{did_you_mean(adapter_name, known)}"
        )
    for module in adapted_modules(model).values():
        module.active = adapter_name
        for name, adapter in module.adapters.items():
            adapter.requires_grad_(name == adapter_name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base, bit for bit; what is trained does not change."""
    before = {module: module.active for module in adapted_modules(model).values()}
    for module in before:
        module.active = None
    try:
        yield
    finally:
        for module, active in before.items():
            module.active = active


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's parameters, by their names in the model."""
    return {name: p for name, p in model.named_parameters() if f".adapters.{adapter_name}." in name}
