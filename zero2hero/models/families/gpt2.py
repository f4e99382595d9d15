"""GPT-2. Its files keep weights as [in, out] (TensorFlow's Conv1D), and query, key and value as one matrix."""

from __future__ import annotations

from typing import Any

from zero2hero.config import DecoderConfig, MoEConfig
from zero2hero.models.decoder import Decoder
from zero2hero.models.families.base import Family, Rule


def _layer(name: str, ours: str | tuple[str, ...], transpose: bool = False) -> Rule:
    parts = (ours,) if isinstance(ours, str) else ours
    return Rule(f"transformer.h.{{i}}.{name}", tuple(f"layers.{{i}}.{p}" for p in parts), transpose)


def _derive(theirs: dict[str, Any]) -> dict[str, Any]:
    return {"intermediate_size": theirs.get("n_inner") or 4 * theirs["n_embd"]}


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

GPT2 = Family(
    model_type="gpt2",
    architectures={"GPT2LMHeadModel": {}},
    config_class=DecoderConfig,
    build=Decoder,
    names={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "feedforward": "activation_function",
        "dropout": "resid_pdrop",
        "tie_word_embeddings": "tie_word_embeddings",
        "initializer_range": "initializer_range",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    },  # fmt: skip
    constants={
        "position": "learned",
        "norm": "layernorm",
        "qk_norm": False,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "sliding_window": None,
        "moe": MoEConfig(),
    },  # fmt: skip
    defaults={
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "vocab_size": 50257,
        "resid_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },  # fmt: skip
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),
        "add_cross_attention": (False,),
        "activation_function": ("gelu_new", "gelu", "quick_gelu", "relu", "relu2", "silu"),
    },  # fmt: skip
    written={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "use_cache": True},
    derive=_derive,
    rules=(
        Rule("transformer.wte.weight", "embed_tokens.weight"),
        Rule("transformer.wpe.weight", "embed_positions.weight"),
        *(_layer(f"ln_1.{k}", f"input_layernorm.{k}") for k in ("weight", "bias")),
        _layer("attn.c_attn.weight", tuple(f"{p}.weight" for p in _QKV), transpose=True),
        _layer("attn.c_attn.bias", tuple(f"{p}.bias" for p in _QKV)),
        _layer("attn.c_proj.weight", "self_attn.o_proj.weight", transpose=True),
        _layer("attn.c_proj.bias", "self_attn.o_proj.bias"),
        *(_layer(f"ln_2.{k}", f"post_attention_layernorm.{k}") for k in ("weight", "bias")),
        _layer("mlp.c_fc.weight", "mlp.up_proj.weight", transpose=True),
        _layer("mlp.c_fc.bias", "mlp.up_proj.bias"),
        _layer("mlp.c_proj.weight", "mlp.down_proj.weight", transpose=True),
        _layer("mlp.c_proj.bias", "mlp.down_proj.bias"),
        *(Rule(f"transformer.ln_f.{k}", f"norm.{k}") for k in ("weight", "bias")),
        Rule("lm_head.weight", "lm_head.weight"),
    ),
    ignored=(".attn.bias", ".attn.masked_bias"),
    older=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
    matches=lambda c: (
        c.num_key_value_heads == c.num_attention_heads
        and c.head_dim * c.num_attention_heads == c.hidden_size
        and not c.gated
    ),
)
