"""One table per family of the ecosystem: how its files spell configurations and tensors (see base.py)."""

from __future__ import annotations

from typing import Any

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.models.families.base import Family, Rule, classifying, unknown_family
from zero2hero.models.families.bert import BERT, ROBERTA
from zero2hero.models.families.clip import CLIP, SIGLIP
from zero2hero.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from zero2hero.models.families.gpt2 import GPT2
from zero2hero.models.families.idefics3 import IDEFICS3, SMOLVLM
from zero2hero.models.families.llama import ARCEE, LLAMA, MISTRAL, QWEN2, QWEN3
from zero2hero.models.families.llava import LLAVA
from zero2hero.models.families.mlp import MLP_FAMILY
from zero2hero.models.families.moe import MIXTRAL, QWEN3_MOE
from zero2hero.models.families.t5 import T5
from zero2hero.models.families.vit import VIT

_DECODERS = map(classifying, (LLAMA, MISTRAL, QWEN2, QWEN3, ARCEE, GPT2, MIXTRAL, QWEN3_MOE, GEMMA, GEMMA2, GEMMA3))
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (*_DECODERS, BERT, ROBERTA, T5, VIT, CLIP, SIGLIP, LLAVA, IDEFICS3, SMOLVLM, MLP_FAMILY)
}

# What can be written, for those who put a shape together themselves.
_COMBINATIONS = {
    DecoderConfig: (
        "rotary + rmsnorm + swiglu (Llama; with qk_norm Qwen3; with sliding_window Mistral; with experts Mixtral), "
        "rotary + rmsnorm + relu2 (Arcee), learned + layernorm + gelu_new with all biases (GPT-2)"
    )
}

__all__ = ["FAMILIES", "Family", "Rule", "family_of_config", "family_to_write"]


def family_of_config(theirs: dict[str, Any]) -> Family:
    """The table for the contents of a config.json."""
    model_type = theirs.get("model_type")
    if model_type not in FAMILIES:
        raise unknown_family(model_type, list(FAMILIES))
    return FAMILIES[model_type].of_file(theirs)


def family_to_write(config: Any) -> Family:
    """The family under which this model is written: the one it was read from, else the first that fits."""
    candidates = [FAMILIES[config.model_type]] if config.model_type in FAMILIES else []
    for family in [*candidates, *FAMILIES.values()]:
        if (fitting := family.of_config(config)) is not None:
            return fitting
    kin = [f for f in FAMILIES.values() if f.config_class is type(config)]
    fields = sorted({name for f in kin for name in f.constants})
    raise UserError(
        "no published architecture has this combination, so no other program could open the model: "
        f"{', '.join(f'{name} {getattr(config, name)}' for name in fields)}. "
        f"Combinations that have one: {_COMBINATIONS.get(type(config), ', '.join(f.model_type for f in kin))}."
    )
