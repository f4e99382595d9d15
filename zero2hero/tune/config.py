"""The settings of adapters, under PEFT's names. This module imports no torch, so that `--help` is instant."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from zero2hero.config import NO_OPTION
from zero2hero.errors import UserError, did_you_mean

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter (see tune/lora.py). Modules go by our names or by those that their family's files have."""

    r: int = 8  # rank of each update
    lora_alpha: float = 8  # the update is multiplied by lora_alpha / r
    lora_dropout: float = 0.0  # of the update's input
    target_modules: str | list[str] = "all-linear"
    """Which matrices: a list of names or ends of names, a regular expression of whole names, or "all-linear": every
    linear module but those of the heads."""
    exclude_modules: str | list[str] | None = None  # of these, which not: names, or a regular expression
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained as a whole, in a copy; a classifier is one by itself when task_type says so."""
    use_rslora: bool = False  # multiply by lora_alpha / sqrt(r) instead: larger ranks then learn more
    use_dora: bool = False  # train the length of each row of the matrix apart from its direction
    bias: str = "none"  # the only choice here: no bias is trained
    layers_to_transform: int | list[int] | None = None  # numbers of the layers; all by default
    rank_pattern: dict[str, int] = field(default_factory=dict)  # end of a name, as a regular expression -> its r
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # the same for lora_alpha
    init_lora_weights: bool | str = True
    """true: the update begins as zero; gaussian: the same, from other random numbers; false: it begins as noise."""
    task_type: str | None = None  # CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION
    base_model_name_or_path: str | None = field(default=None, metadata=NO_OPTION)  # of the model that is adapted

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(f"{name}: a rank is a whole number from 1 on, not {rank!r}")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise UserError(f"{name}: lora_alpha is a number above 0, not {alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")
        if self.bias != "none":
            raise UserError(f"bias {self.bias!r}: biases belong to the base model and are not trained; use none")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UserError(
                f"init_lora_weights {self.init_lora_weights!r} is not known here; use true, false or gaussian. (An "
                "adapter that began as pissa, olora or loftq changed its base: convert it with PEFT first.)"
            )
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            near = did_you_mean(str(self.task_type).upper(), TASK_TYPES)
            raise UserError(f"unknown task_type {self.task_type!r}; use {', '.join(TASK_TYPES)}.{near}")
        if not self.target_modules or not isinstance(self.target_modules, (str, list)):
            raise UserError(f"target_modules is a text or a list of names, not {self.target_modules!r}")
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        patterns += [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression: {error}") from None

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that the task's adapters train as a whole, where a model has them."""
        return _HEADS.get(self.task_type or "", ())

    def rank_of(self, *names: str) -> int:
        """The rank for a module that goes by these names."""
        return _by_pattern(self.rank_pattern, names, self.r)

    def alpha_of(self, *names: str) -> float:
        """lora_alpha for a module that goes by these names."""
        return _by_pattern(self.alpha_pattern, names, self.lora_alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """What the update is multiplied by."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(patterns: dict[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default
