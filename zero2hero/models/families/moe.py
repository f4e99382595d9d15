"""Mixtral and Qwen3-MoE: Llama and Qwen3 with experts. Files hold each expert's matrices apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zero2hero.config import DecoderConfig, MoEConfig
from zero2hero.models.families.base import Rule
from zero2hero.models.families.llama import MISTRAL, QWEN3
from zero2hero.models.families.rope import read_rope, spell_rope


def _mixtral(theirs: dict[str, Any]) -> dict[str, Any]:
    moe = MoEConfig(
        num_experts=theirs["num_local_experts"],
        num_experts_per_tok=theirs["num_experts_per_tok"],
        router_aux_loss_coef=theirs.get("router_aux_loss_coef", 0.001),
    )
    return read_rope(theirs, default_theta=1e6) | {"moe": moe}


def _spell_mixtral(c: DecoderConfig) -> dict[str, Any]:
    return spell_rope(c) | {
        "num_local_experts": c.moe.num_experts, "num_experts_per_tok": c.moe.num_experts_per_tok,
        "router_aux_loss_coef": c.moe.router_aux_loss_coef,
    }  # fmt: skip


def _without(constants: Any, *names: str) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name not in names}


_EXPERT = "model.layers.{i}.block_sparse_moe"

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    architectures={"MixtralForCausalLM": {}},
    constants=_without(MISTRAL.constants, "moe"),
    defaults=MISTRAL.defaults
    | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    fixed={"hidden_act": ("silu",)},
    written={"hidden_act": "silu", "use_cache": True},
    rules=(
        *MISTRAL.rules,
        Rule(f"{_EXPERT}.gate.weight", "layers.{i}.mlp.gate.weight"),
        *(
            Rule(f"{_EXPERT}.experts.{{e}}.{theirs}.weight", f"layers.{{i}}.mlp.experts.{{e}}.{ours}_proj.weight")
            for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        ),
    ),
    derive=_mixtral,
    spell=_spell_mixtral,
    matches=lambda c: (
        c.moe.num_experts > 0
        and len(set(c.windows)) == 1
        and c.moe.norm_topk_prob
        and not c.moe.dense_layers
        and c.moe.intermediate_size == c.intermediate_size
    ),
)


def _qwen3_moe(theirs: dict[str, Any]) -> dict[str, Any]:
    step, dense = theirs["decoder_sparse_step"], set(theirs.get("mlp_only_layers") or [])
    dense |= {i for i in range(theirs["num_hidden_layers"]) if (i + 1) % step}
    moe = MoEConfig(
        num_experts=theirs.get("num_local_experts", theirs["num_experts"]),  # transformers 5, and 4
        num_experts_per_tok=theirs["num_experts_per_tok"],
        intermediate_size=theirs["moe_intermediate_size"],
        norm_topk_prob=bool(theirs["norm_topk_prob"]),
        router_aux_loss_coef=theirs.get("router_aux_loss_coef", 0.001),
        dense_layers=sorted(dense),
    )
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window") else None
    bias = bool(theirs.get("attention_bias", False))
    return read_rope(theirs) | {
        "moe": moe, "sliding_window": window, "attention_bias": bias, "output_bias": bias,
    }  # fmt: skip


def _spell_qwen3_moe(c: DecoderConfig) -> dict[str, Any]:
    return spell_rope(c) | {
        "num_experts": c.moe.num_experts,
        "num_local_experts": c.moe.num_experts,
        "num_experts_per_tok": c.moe.num_experts_per_tok,
        "moe_intermediate_size": c.moe.intermediate_size,
        "norm_topk_prob": c.moe.norm_topk_prob,
        "router_aux_loss_coef": c.moe.router_aux_loss_coef,
        "mlp_only_layers": c.moe.dense_layers,
        "decoder_sparse_step": 1,
        "use_sliding_window": c.sliding_window is not None,
        "sliding_window": c.sliding_window,
    }


QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    architectures={"Qwen3MoeForCausalLM": {}},
    constants=_without(QWEN3.constants, "moe"),
    defaults=_without(QWEN3.defaults, "head_dim")
    | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
       "norm_topk_prob": False, "decoder_sparse_step": 1},
    rules=(
        *QWEN3.rules,
        Rule("model.layers.{i}.mlp.gate.weight", "layers.{i}.mlp.gate.weight"),
        *(
            Rule(f"model.{name}", name)
            for name in (f"layers.{{i}}.mlp.experts.{{e}}.{p}_proj.weight" for p in ("gate", "up", "down"))
        ),
    ),
    derive=_qwen3_moe,
    spell=_spell_qwen3_moe,
    matches=lambda c: c.moe.num_experts > 0 and c.attention_bias == c.output_bias and c.layer_types is None,
)  # fmt: skip
