"""CLIP and SigLIP: a table for each text model, and one for the pair; the image models' are in vit.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zero2hero.config import DecoderConfig
from zero2hero.model_configs import PLAIN_ACTIVATIONS, VisionTextConfig
from zero2hero.models.decoder import Decoder
from zero2hero.models.families.base import Family, Part, Rule, nested_config, pairs
from zero2hero.models.families.vit import (
    CLIP_VISION,
    SIGLIP_ACTIVATIONS,
    SIGLIP_VISION,
    read_activation,
    spell_activation,
    tower_layers,
)
from zero2hero.models.vision_text import VisionText

CLIP_TEXT = Family(
    model_type="clip_text_model",
    architectures={"CLIPTextModel": {}, "CLIPTextModelWithProjection": {}},
    config_class=DecoderConfig,
    build=Decoder,
    names={
        name: name
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "initializer_range",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
    }
    | {"norm_eps": "layer_norm_eps", "feedforward": "hidden_act", "dropout": "attention_dropout"},
    constants={"position": "learned", "norm": "layernorm", "attention_bias": True, "output_bias": True,
               "mlp_bias": True, "qk_norm": False, "sliding_window": None},
    required=(),
    defaults={"vocab_size": 49408, "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
              "intermediate_size": 2048, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
              "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407},
    fixed={"hidden_act": PLAIN_ACTIVATIONS},
    rules=(
        Rule("text_model.embeddings.token_embedding.weight", "embed_tokens.weight"),
        Rule("text_model.embeddings.position_embedding.weight", "embed_positions.weight"),
        *tower_layers("text_model"),
        *pairs("text_model.final_layer_norm", "norm"),
    ),
    ignored=("embeddings.position_ids",),
)  # fmt: skip

SIGLIP_TEXT = replace(
    CLIP_TEXT,
    model_type="siglip_text_model",
    architectures={"SiglipTextModel": {}},
    names={name: key for name, key in CLIP_TEXT.names.items() if name not in ("feedforward", "initializer_range")},
    defaults={**CLIP_TEXT.defaults, "vocab_size": 32000, "hidden_size": 768, "num_attention_heads": 12,
              "intermediate_size": 3072, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
              "layer_norm_eps": 1e-6},
    fixed={"hidden_act": SIGLIP_ACTIVATIONS},
    derive=read_activation,
    spell=spell_activation,
)  # fmt: skip

CLIP = Family(
    model_type="clip",
    architectures={"CLIPModel": {}},
    config_class=VisionTextConfig,
    build=VisionText,
    names={"projection_dim": "projection_dim"},
    constants={"loss": "softmax"},
    required=(),
    defaults={"projection_dim": 512},
    parts={
        "text_config": Part((CLIP_TEXT,), "text_model."),
        "vision_config": Part((CLIP_VISION,), "vision_model."),
    },
    rules=(
        Rule("logit_scale", "logit_scale"),
        Rule("text_projection.weight", "text_projection.weight"),
        Rule("visual_projection.weight", "vision_projection.weight"),
    ),
)


class SiglipFamily(Family):
    """The vectors' width stands in the text model's configuration, and must be the width of the image model."""

    def read_config(self, theirs: Mapping[str, Any]) -> Any:
        text = {**SIGLIP_TEXT.defaults, **nested_config(theirs, "text_config")}
        return super().read_config({**theirs, "projection_dim": text.get("projection_size") or text["hidden_size"]})

    def write_config(self, config: Any) -> dict[str, Any]:
        content = super().write_config(config)
        content["text_config"]["projection_size"] = content.pop("projection_dim")
        return content


SIGLIP = SiglipFamily(
    model_type="siglip",
    architectures={"SiglipModel": {}},
    config_class=VisionTextConfig,
    build=VisionText,
    names={"projection_dim": "projection_dim"},
    constants={"loss": "sigmoid"},
    required=(),
    parts={
        "text_config": Part((SIGLIP_TEXT,), "text_model."),
        "vision_config": Part((SIGLIP_VISION,), "vision_model."),
    },
    rules=(
        Rule("logit_scale", "logit_scale"),
        Rule("logit_bias", "logit_bias"),
        *pairs("text_model.head", "text_projection"),
    ),
    matches=lambda c: c.vision_config.task == "attention",
)
