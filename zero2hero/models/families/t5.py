"""T5: version 1.0, and 1.1 (FLAN), whose feed-forward is gated and whose head is a matrix of its own.

The files say in two ways whether head and embedding are one. Version 4 of transformers writes tie_word_embeddings; in
version 5 that is always true, and the stored tensors tell. A tied head goes with outputs that are scaled.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from zero2hero.errors import UserError
from zero2hero.model_configs import PLAIN_ACTIVATIONS, EncoderDecoderConfig
from zero2hero.models.encoder_decoder import EncoderDecoder
from zero2hero.models.families.base import Family, Rule

_GATED = {"gated-gelu": "geglu", "gated-silu": "swiglu"}


def _feedforward(theirs: dict[str, Any]) -> dict[str, Any]:
    said = theirs["feed_forward_proj"]
    kind = _GATED.get(said, said)
    if kind not in (*_GATED.values(), *PLAIN_ACTIVATIONS):
        raise UserError(
            f"config.json: feed_forward_proj {said!r} is not supported; supported: "
            f"{', '.join((*_GATED, *PLAIN_ACTIVATIONS))}"
        )
    tied = theirs.get("tie_word_embeddings", True)
    return {
        "feedforward": kind,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": theirs.get("scale_decoder_outputs", tied),
    }


def _spell(c: EncoderDecoderConfig) -> dict[str, Any]:
    said = {ours: theirs for theirs, ours in _GATED.items()}.get(c.feedforward, c.feedforward)
    return {
        "feed_forward_proj": said,
        "tie_word_embeddings": c.tie_word_embeddings,
        "scale_decoder_outputs": c.scale_decoder_outputs,
    }


def _settle(config: EncoderDecoderConfig, stored: Collection[str]) -> EncoderDecoderConfig:
    own_head = "lm_head.weight" in stored and not config.scale_decoder_outputs
    return replace(config, tie_word_embeddings=False) if own_head else config


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{theirs}.{p}.weight", f"{ours}.{p}_proj.weight") for p in "qkvo")


def _stack(side: str, feedforward: int) -> tuple[Rule, ...]:
    """The rules of one side; `feedforward` is the number of that part in a layer."""
    theirs, ours = f"{side}.block.{{i}}.layer", f"{side}.layers.{{i}}"
    mlp = f"{theirs}.{feedforward}.DenseReluDense"
    return (
        *_attention(f"{theirs}.0.SelfAttention", f"{ours}.self_attn"),
        Rule(f"{theirs}.0.layer_norm.weight", f"{ours}.self_attn_norm.weight"),
        Rule(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{side}.embed_distances.weight"),
        Rule(f"{mlp}.wi.weight", f"{ours}.mlp.up_proj.weight"),
        Rule(f"{mlp}.wi_0.weight", f"{ours}.mlp.gate_proj.weight"),
        Rule(f"{mlp}.wi_1.weight", f"{ours}.mlp.up_proj.weight"),
        Rule(f"{mlp}.wo.weight", f"{ours}.mlp.down_proj.weight"),
        Rule(f"{theirs}.{feedforward}.layer_norm.weight", f"{ours}.mlp_norm.weight"),
        Rule(f"{side}.final_layer_norm.weight", f"{side}.norm.weight"),
    )


class T5Family(Family):
    """The plain feed-forward's matrix is `wi`; the gated one's are `wi_0` (the gate) and `wi_1`."""

    def rules_for(self, names: Collection[str]) -> list[Rule]:
        gated = any(".gate_proj." in name for name in names)
        other = ".wi." if gated else ".wi_1."
        return [rule for rule in super().rules_for(names) if other not in rule.theirs]


T5 = T5Family(
    model_type="t5",
    architectures={"T5ForConditionalGeneration": {}, "T5WithLMHeadModel": {}},
    config_class=EncoderDecoderConfig,
    build=EncoderDecoder,
    names={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "num_layers",
        "num_decoder_layers": "num_decoder_layers",
        "num_attention_heads": "num_heads",
        "relative_attention_num_buckets": "relative_attention_num_buckets",
        "relative_attention_max_distance": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "dropout_rate",
        "decoder_start_token_id": "decoder_start_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
    },  # fmt: skip
    constants={"position": "relative", "norm": "rmsnorm", "bias": False, "scale_attention": False,
               "source_vocab_size": 0},
    defaults={"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
              "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
              "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu", "pad_token_id": 0, "eos_token_id": 1,
              "decoder_start_token_id": 0},
    fixed={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    written={"is_encoder_decoder": True},
    derive=_feedforward,
    spell=_spell,
    settle=_settle,
    matches=lambda c: c.tie_word_embeddings or not c.scale_decoder_outputs,
    rules=(
        Rule("shared.weight", "embed_tokens.weight"),
        *_stack("encoder", feedforward=1),
        *_stack("decoder", feedforward=2),
        *_attention("decoder.block.{i}.layer.1.EncDecAttention", "decoder.layers.{i}.cross_attn"),
        Rule("decoder.block.{i}.layer.1.layer_norm.weight", "decoder.layers.{i}.cross_attn_norm.weight"),
        Rule("lm_head.weight", "lm_head.weight"),
    ),
    older=((r"^(encoder|decoder)\.embed_tokens\.weight$", "shared.weight"),),
    ignored=("EncDecAttention.relative_attention_bias.weight",),
)  # fmt: skip
