"""Llama and its kin: Llama, Mistral, Qwen2, Qwen3 and Arcee (Llama with a ReLU² feed-forward).

Keys and fields were read from files that transformers 4.57 and 5 wrote.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zero2hero.config import DecoderConfig
from zero2hero.models.decoder import Decoder
from zero2hero.models.families.base import Family, Rule

_NAMES = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )  # fmt: skip
} | {"norm_eps": "rms_norm_eps", "dropout": "attention_dropout"}

_RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens.weight"),
    *(
        Rule(f"model.layers.{{i}}.{name}", f"layers.{{i}}.{name}")
        for name in (
            "input_layernorm.weight",
            *(f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")),
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            "post_attention_layernorm.weight",
            *(f"mlp.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in ("weight", "bias")),
        )
    ),
    Rule("model.norm.weight", "norm.weight"),
    Rule("lm_head.weight", "lm_head.weight"),
)


def _rope_theta(theirs: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 nests the base under rope_parameters; 4 has it flat beside rope_scaling."""
    from zero2hero.errors import UserError

    rope = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or rope
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise UserError(f"config.json: rotary scaling {kind!r} is not supported yet; only plain rotary positions are")
    for key, value in rope.items():
        if key not in ("rope_type", "type", "rope_theta") and value not in (None, 1.0):
            raise UserError(f"config.json: {key} = {value!r} in rope_parameters is not supported yet")
    return {"rope_theta": float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)))}


def _spell_rope(config: DecoderConfig) -> dict[str, Any]:
    """transformers 4 reads the first spelling, 5 the second."""
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _biases(theirs: dict[str, Any]) -> dict[str, Any]:
    bias = bool(theirs.get("attention_bias", False))
    return _rope_theta(theirs) | {
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(theirs.get("mlp_bias", False)),
    }


def _window(theirs: dict[str, Any]) -> dict[str, Any]:
    """Qwen's window applies only when use_sliding_window says so."""
    return {"sliding_window": theirs.get("sliding_window") if theirs.get("use_sliding_window") else None}


_ROTARY = {"position": "rotary", "norm": "rmsnorm"}
_LLAMA_BIASES = _NAMES | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_IGNORED = ("rotary_emb.inv_freq",)

LLAMA = Family(
    model_type="llama",
    architectures={"LlamaForCausalLM": {}},
    config_class=DecoderConfig,
    build=Decoder,
    names=_LLAMA_BIASES,
    constants=_ROTARY | {"feedforward": "swiglu", "qk_norm": False, "sliding_window": None},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048},
    fixed={"hidden_act": ("silu",), "pretraining_tp": (1,)},
    written={"hidden_act": "silu", "pretraining_tp": 1, "use_cache": True},
    derive=_biases,
    spell=_spell_rope,
    rules=_RULES,
    ignored=_IGNORED,
    matches=lambda c: c.attention_bias == c.output_bias,
)

ARCEE = replace(
    LLAMA,
    model_type="arcee",
    architectures={"ArceeForCausalLM": {}},
    constants=_ROTARY | {"feedforward": "relu2", "qk_norm": False, "sliding_window": None},
    defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 4096},
    fixed={"hidden_act": ("relu2",)},
    written={"hidden_act": "relu2", "use_cache": True},
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architectures={"MistralForCausalLM": {}},
    names=_NAMES | {"sliding_window": "sliding_window"},
    constants=_ROTARY
    | {"feedforward": "swiglu", "qk_norm": False, "attention_bias": False, "output_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": 8,
              "max_position_embeddings": 131072, "sliding_window": 4096},
    fixed={"hidden_act": ("silu",)},
    written={"hidden_act": "silu", "use_cache": True},
    derive=_rope_theta,
)  # fmt: skip

QWEN2 = replace(
    MISTRAL,
    model_type="qwen2",
    architectures={"Qwen2ForCausalLM": {}},
    names=_NAMES,
    constants=_ROTARY
    | {"feedforward": "swiglu", "qk_norm": False, "attention_bias": True, "output_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768,
              "num_key_value_heads": 32},
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    written={"hidden_act": "silu", "use_cache": True, "use_sliding_window": False,
             "sliding_window": None},
    derive=lambda theirs: _rope_theta(theirs) | _window(theirs),
    matches=lambda c: c.sliding_window is None and c.head_dim * c.num_attention_heads == c.hidden_size,
)  # fmt: skip

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architectures={"Qwen3ForCausalLM": {}},
    names=_NAMES | {"attention_bias": "attention_bias"},
    constants=_ROTARY | {"feedforward": "swiglu", "qk_norm": True, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768,
              "num_key_value_heads": 32, "head_dim": 128},
    derive=lambda theirs: _biases(theirs) | _window(theirs),
    matches=lambda c: c.sliding_window is None and c.attention_bias == c.output_bias,
)  # fmt: skip
