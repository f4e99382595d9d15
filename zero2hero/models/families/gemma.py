"""Gemma 1, 2 and 3 (text). Llama's names; in Gemma 2 and 3 `post_attention_layernorm` comes after attention indeed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zero2hero.models.families.base import Rule
from zero2hero.models.families.llama import LLAMA, NAMES
from zero2hero.models.families.rope import layer_types, read_rope, spell_rope
from zero2hero.models.gemma import Gemma, GemmaConfig

_SHAPE = {
    "position": "rotary", "norm": "rmsnorm_offset", "feedforward": "geglu", "mlp_bias": False,
}  # fmt: skip
_DEFAULTS = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 8192, "head_dim": 256,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "sliding_window": "sliding_window",
}
_CAUSAL = {"use_bidirectional_attention": (False, None)}


def _derive(theirs: dict[str, Any]) -> dict[str, Any]:
    return read_rope(theirs) | {"output_bias": theirs.get("attention_bias", False)}


GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architectures={"GemmaForCausalLM": {}},
    config_class=GemmaConfig,
    build=Gemma,
    names=NAMES | {"attention_bias": "attention_bias"},
    constants=_SHAPE
    | {"qk_norm": False, "post_norms": False, "sliding_window": None, "attn_logit_softcapping": None,
       "final_logit_softcapping": None, "rope_local_base_freq": None},
    defaults=_DEFAULTS | {"num_key_value_heads": 16},
    # files of the first release say "gelu", and mean its tanh form
    fixed={"hidden_act": ("gelu", "gelu_pytorch_tanh"), "hidden_activation": ("gelu_pytorch_tanh",), **_CAUSAL},
    written={"hidden_act": "gelu_pytorch_tanh", "use_cache": True},
    derive=_derive,
    matches=lambda c: c.attention_bias == c.output_bias and c.query_pre_attn_scalar == c.head_dim,
)  # fmt: skip


def _alternate(theirs: dict[str, Any], every: int) -> dict[str, Any]:
    """All layers have a window but each `every`-th."""
    layers = range(theirs["num_hidden_layers"])
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in layers]
    return {"layer_types": theirs.get("layer_types") or kinds}


GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    architectures={"Gemma2ForCausalLM": {}},
    names=GEMMA.names | _CAPS,
    constants=_SHAPE | {"qk_norm": False, "post_norms": True, "rope_local_base_freq": None},
    defaults=_DEFAULTS
    | {"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256,
       "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    fixed={"hidden_activation": ("gelu_pytorch_tanh",), **_CAUSAL},
    written={"hidden_activation": "gelu_pytorch_tanh", "use_cache": True},
    rules=(
        *LLAMA.rules,
        *(
            Rule(f"model.layers.{{i}}.{when}_feedforward_layernorm.weight",
                 f"layers.{{i}}.{when}_feedforward_layernorm.weight")
            for when in ("pre", "post")
        ),
    ),
    derive=lambda theirs: _derive(theirs) | _alternate(theirs, 2),
    spell=lambda c: spell_rope(c) | {"layer_types": layer_types(c)},
    matches=lambda c: c.attention_bias == c.output_bias,
)  # fmt: skip


def _two_bases(theirs: dict[str, Any]) -> dict[str, Any]:
    """Layers with a window have a base of their own; transformers 5 keeps both under the kinds' names."""
    nested = theirs.get("rope_parameters") or {}
    everywhere, local = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    rope = read_rope({**theirs, "rope_parameters": everywhere}, default_theta=1e6)
    local_rope = read_rope({**theirs, "rope_scaling": None, "rope_theta": 10_000.0, "rope_parameters": local})
    if local_rope["rope_scaling"]:
        raise ValueError("rope_parameters of sliding_attention are scaled")
    base = local.get("rope_theta", theirs.get("rope_local_base_freq", local_rope["rope_theta"]))
    return rope | {"rope_local_base_freq": float(base)}


def _spell_two_bases(c: GemmaConfig) -> dict[str, Any]:
    flat = spell_rope(c)
    local = {"rope_type": "default", "rope_theta": c.rope_local_base_freq}
    nested = {"full_attention": flat["rope_parameters"], "sliding_attention": local}
    return flat | {"rope_parameters": nested, "rope_local_base_freq": c.rope_local_base_freq}


GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architectures={"Gemma3ForCausalLM": {}},
    constants=_SHAPE | {"qk_norm": True, "post_norms": True},
    defaults=GEMMA2.defaults
    | {"max_position_embeddings": 131072, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    derive=lambda theirs: (
        _derive({**theirs, "rope_parameters": None})
        | _two_bases(theirs)
        | _alternate(theirs, theirs.get("sliding_window_pattern") or 6)
    ),
    spell=lambda c: _spell_two_bases(c) | {"layer_types": layer_types(c)},
    matches=lambda c: c.attention_bias == c.output_bias and c.rope_local_base_freq is not None,
)  # fmt: skip
