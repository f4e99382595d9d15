"""A run that trains an adapter (LoRA) in the place of a base model's weights, whatever the task.

The base stands still; beside its matrices learn small products (tune/lora.py), and what is new or small learns as a
whole: a head, a projector. At the end the adapter is merged into the base, so that what is saved is an ordinary model
of the task. Of a base that is partly frozen, such as a vision tower, the frozen part gets no adapter either.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from zero2hero.progress import human_count
from zero2hero.tune import LoraConfig, add_lora, merge

if TYPE_CHECKING:
    from zero2hero.train.run import Task

WHOLE = ("head", "classifier", "score", "pooler", "projector")  # parts that learn as a whole


def with_adapter(task: Task, lora: LoraConfig, seed: int) -> Task:
    """The same run, but an adapter learns.

    Raises:
        UserError: as `add_lora`: no such modules, or a rank above a matrix's smaller side.
    """
    model = task.model
    learning = [part for name, part in model.named_children() if name in WHOLE and _learns(part)]
    add_lora(model, without(lora, _left_out(model)), seed=seed)
    for part in learning:
        part.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def save(finished: nn.Module) -> None:
        task.save(merge(finished.float()))

    return dataclasses.replace(task, save=save, announce=f"{task.announce}; LoRA trains {human_count(trained)}")


def without(lora: LoraConfig, names: Iterable[str]) -> LoraConfig:
    """The same settings, but these modules are excluded as well."""
    excluded = lora.exclude_modules or []
    patterns = [excluded] if isinstance(excluded, str) else [rf"(.*\.)?{re.escape(name)}" for name in excluded]
    patterns += map(re.escape, names)
    return dataclasses.replace(lora, exclude_modules="|".join(f"({pattern})" for pattern in patterns) or None)


def _left_out(model: nn.Module) -> list[str]:
    """The modules that get no adapter: those that learn as a whole, and those that are frozen."""
    return [
        name for name, module in model.named_modules() if name and (name.split(".")[0] in WHOLE or not _learns(module))
    ]


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
