"""Llama and its kin: Llama, Mistral, Qwen2, Qwen3 and Arcee (Llama with a ReLU² feed-forward).

Keys and fields were read from files that transformers 4.57 and 5 wrote.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zero2hero.config import DecoderConfig, MoEConfig
from zero2hero.models.decoder import Decoder
from zero2hero.models.families.base import Family, Rule
from zero2hero.models.families.rope import read_qwen_window, read_rope, spell_qwen_window, spell_rope

NAMES = {
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


def _biases(theirs: dict[str, Any]) -> dict[str, Any]:
    bias = bool(theirs.get("attention_bias", False))
    return read_rope(theirs) | {
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bool(theirs.get("mlp_bias", False)),
    }


_ROTARY = {"position": "rotary", "norm": "rmsnorm", "moe": MoEConfig()}
_LLAMA_BIASES = NAMES | {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
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
    spell=spell_rope,
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
    names=NAMES | {"sliding_window": "sliding_window"},
    constants=_ROTARY
    | {"feedforward": "swiglu", "qk_norm": False, "attention_bias": False, "output_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": 8,
              "max_position_embeddings": 131072, "sliding_window": 4096},
    fixed={"hidden_act": ("silu",)},
    written={"hidden_act": "silu", "use_cache": True},
    derive=read_rope,
    matches=lambda c: len(set(c.windows)) == 1,
)  # fmt: skip

QWEN2 = replace(
    MISTRAL,
    model_type="qwen2",
    architectures={"Qwen2ForCausalLM": {}},
    names=NAMES,
    constants=_ROTARY
    | {"feedforward": "swiglu", "qk_norm": False, "attention_bias": True, "output_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768,
              "num_key_value_heads": 32},
    written={"hidden_act": "silu", "use_cache": True},
    spell=lambda c: spell_rope(c) | spell_qwen_window(c),
    derive=lambda theirs: read_rope(theirs) | read_qwen_window(theirs),
    matches=lambda c: c.head_dim * c.num_attention_heads == c.hidden_size,
)  # fmt: skip

QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    architectures={"Qwen3ForCausalLM": {}},
    names=NAMES | {"attention_bias": "attention_bias"},
    constants=_ROTARY | {"feedforward": "swiglu", "qk_norm": True, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768,
              "num_key_value_heads": 32, "head_dim": 128},
    derive=lambda theirs: _biases(theirs) | read_qwen_window(theirs),
    matches=lambda c: c.attention_bias == c.output_bias,
)  # fmt: skip
