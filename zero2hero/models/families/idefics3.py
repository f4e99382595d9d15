"""Idefics3 and SmolVLM: an image model of SigLIP's kind, pixel shuffle, and a Llama (or one of its kin)."""

from __future__ import annotations

from dataclasses import replace

from zero2hero.model_configs import Idefics3Config
from zero2hero.models.families.base import Part, Rule
from zero2hero.models.families.llava import LANGUAGE_MODELS, SeeingFamily
from zero2hero.models.families.vit import SIGLIP_VISION, read_activation, spell_activation
from zero2hero.models.idefics3 import AnySizeVision, Idefics3

_VISION = replace(
    SIGLIP_VISION,
    build=AnySizeVision,
    names=SIGLIP_VISION.names | {"initializer_range": "initializer_range"},
    constants=SIGLIP_VISION.constants | {"task": "none"},
    defaults=SIGLIP_VISION.defaults | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
    derive=read_activation,
    spell=spell_activation,
)


def _parts(*vision_names: str) -> dict[str, Part]:
    """The image model goes by several names; the first one is written."""
    return {
        "text_config": Part(LANGUAGE_MODELS, "language_model.", ((r"^model\.", "model.text_model."),)),
        "vision_config": Part(
            tuple(replace(_VISION, model_type=name) for name in vision_names), "vision_tower.", ((r"^", "model."),)
        ),
    }


IDEFICS3 = SeeingFamily(
    model_type="idefics3",
    architectures={"Idefics3ForConditionalGeneration": {}},
    config_class=Idefics3Config,
    build=Idefics3,
    names={"image_token_index": "image_token_id", "scale_factor": "scale_factor"},
    constants={},
    required=(),
    defaults={"image_token_id": 128257, "scale_factor": 2},
    spell=lambda c: {"tie_word_embeddings": c.text_config.tie_word_embeddings},
    parts=_parts("idefics3_vision", "idefics3"),
    rules=(Rule("model.connector.modality_projection.proj.weight", "projector.proj.weight"),),
)

SMOLVLM = replace(
    IDEFICS3,
    model_type="smolvlm",
    architectures={"SmolVLMForConditionalGeneration": {}},
    parts=_parts("smolvlm_vision", "smolvlm", "idefics3_vision", "idefics3"),
)
