"""The image models: ViT, and those of CLIP and SigLIP, which are parts of larger models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zero2hero.model_configs import PLAIN_ACTIVATIONS, VisionConfig
from zero2hero.models.families.base import Family, HeadedFamily, Rule, pairs, read_labels, spell_labels
from zero2hero.models.vision import VisionTransformer

_SHAPE = {
    name: name
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "num_channels",
    )
} | {"norm_eps": "layer_norm_eps"}
_STD = {"initializer_range": "initializer_range"}
_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
             "image_size": 224, "num_channels": 3}  # fmt: skip


def _vit_layer(theirs: str, ours: str) -> tuple[Rule, ...]:
    return pairs(f"vit.encoder.layer.{{i}}.{theirs}", f"layers.{{i}}.{ours}")


VIT = HeadedFamily(
    model_type="vit",
    architectures={"ViTForImageClassification": {"task": "image_classification"}, "ViTModel": {"task": "features"}},
    config_class=VisionConfig,
    build=VisionTransformer,
    names=_SHAPE | _STD | {"attention_bias": "qkv_bias", "feedforward": "hidden_act", "dropout": "hidden_dropout_prob"},
    constants={"class_token": True, "patch_bias": True, "first_norm": False},
    required=(),
    defaults=_DEFAULTS | {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True},
    fixed={"hidden_act": PLAIN_ACTIVATIONS, "pooler_act": ("tanh",)},
    written={"pooler_act": "tanh"},
    derive=read_labels,
    spell=spell_labels,
    rules=(
        Rule("vit.embeddings.cls_token", "embed_class", dims=3),
        Rule("vit.embeddings.position_embeddings", "embed_positions.weight", dims=3),
        *pairs("vit.embeddings.patch_embeddings.projection", "embed_patches"),
        *_vit_layer("layernorm_before", "input_layernorm"),
        *_vit_layer("attention.attention.query", "self_attn.q_proj"),
        *_vit_layer("attention.attention.key", "self_attn.k_proj"),
        *_vit_layer("attention.attention.value", "self_attn.v_proj"),
        *_vit_layer("attention.output.dense", "self_attn.o_proj"),
        *_vit_layer("layernorm_after", "post_attention_layernorm"),
        *_vit_layer("intermediate.dense", "mlp.up_proj"),
        *_vit_layer("output.dense", "mlp.down_proj"),
        *pairs("vit.layernorm", "norm"),
        *pairs("vit.pooler.dense", "pooler"),
        *pairs("classifier", "classifier"),
    ),
)


def tower_layers(theirs: str) -> tuple[Rule, ...]:
    """The layers of CLIP's and SigLIP's models, of text or of images."""
    names = {
        "layer_norm1": "input_layernorm",
        **{f"self_attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkv"},
        "self_attn.out_proj": "self_attn.o_proj",
        "layer_norm2": "post_attention_layernorm",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    }
    return tuple(
        rule
        for name, ours in names.items()
        for rule in pairs(f"{theirs}.encoder.layers.{{i}}.{name}", f"layers.{{i}}.{ours}")
    )


# What transformers calls GELU's tanh approximation in SigLIP, and where it gives the name in GPT-2.
_TANH, _OURS = "gelu_pytorch_tanh", "gelu_new"
SIGLIP_ACTIVATIONS = (_TANH, *PLAIN_ACTIVATIONS)


def read_activation(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {"feedforward": _OURS if theirs["hidden_act"] == _TANH else theirs["hidden_act"]}


def spell_activation(config: Any) -> dict[str, Any]:
    return {"hidden_act": _TANH if config.feedforward == _OURS else config.feedforward}


CLIP_VISION = Family(
    model_type="clip_vision_model",
    architectures={"CLIPVisionModel": {}, "CLIPVisionModelWithProjection": {}},
    config_class=VisionConfig,
    build=VisionTransformer,
    names=_SHAPE | _STD | {"feedforward": "hidden_act", "dropout": "attention_dropout"},
    constants={"class_token": True, "patch_bias": False, "first_norm": True, "attention_bias": True, "task": "none"},
    required=(),
    defaults=_DEFAULTS | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    fixed={"hidden_act": PLAIN_ACTIVATIONS},
    rules=(
        Rule("vision_model.embeddings.class_embedding", "embed_class", dims=1),
        Rule("vision_model.embeddings.patch_embedding.weight", "embed_patches.weight"),
        Rule("vision_model.embeddings.position_embedding.weight", "embed_positions.weight"),
        *pairs("vision_model.pre_layrnorm", "first_norm"),  # misspelt in every file
        *tower_layers("vision_model"),
        *pairs("vision_model.post_layernorm", "norm"),
    ),
    ignored=("embeddings.position_ids",),
)

SIGLIP_VISION = Family(
    model_type="siglip_vision_model",
    architectures={"SiglipVisionModel": {}},
    config_class=VisionConfig,
    build=VisionTransformer,
    names=_SHAPE | {"dropout": "attention_dropout"},
    constants={"class_token": False, "patch_bias": True, "first_norm": False, "attention_bias": True},
    required=(),
    defaults=_DEFAULTS | {"patch_size": 16, "hidden_act": _TANH, "layer_norm_eps": 1e-6},
    fixed={"hidden_act": SIGLIP_ACTIVATIONS},
    derive=lambda theirs: read_activation(theirs)
    | {"task": "attention" if theirs.get("vision_use_head", True) else "none"},
    spell=lambda c: spell_activation(c) | {"vision_use_head": c.task == "attention"},
    matches=lambda c: c.task in ("attention", "none"),
    rules=(
        *pairs("vision_model.embeddings.patch_embedding", "embed_patches"),
        Rule("vision_model.embeddings.position_embedding.weight", "embed_positions.weight"),
        *tower_layers("vision_model"),
        *pairs("vision_model.post_layernorm", "norm"),
        Rule("vision_model.head.probe", "pooling.embed_probe", dims=3),
        *(
            Rule(
                f"vision_model.head.attention.in_proj_{kind}",
                tuple(f"pooling.attention.{p}_proj.{kind}" for p in "qkv"),
            )
            for kind in ("weight", "bias")
        ),
        *pairs("vision_model.head.attention.out_proj", "pooling.attention.o_proj"),
        *pairs("vision_model.head.layernorm", "pooling.norm"),
        *pairs("vision_model.head.mlp.fc1", "pooling.mlp.up_proj"),
        *pairs("vision_model.head.mlp.fc2", "pooling.mlp.down_proj"),
    ),
    ignored=("embeddings.position_ids",),
)  # fmt: skip
