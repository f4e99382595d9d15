"""LLaVA: an image model of CLIP or SigLIP, a projector, and a language model of Llama's kin.

Three spellings of the tensors' names are about: `language_model.model.` with `vision_tower.vision_model.`, which all
versions read and which is written here; with `model.` before everything; and without `vision_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zero2hero.model_configs import PLAIN_ACTIVATIONS, VisionLanguageConfig
from zero2hero.models.families.base import Family, Part, nested_config, pairs
from zero2hero.models.families.llama import ARCEE, LLAMA, MISTRAL, QWEN2, QWEN3
from zero2hero.models.families.vit import CLIP_VISION, SIGLIP_VISION
from zero2hero.models.vision_language import VisionLanguage

# Nested in another's file, a Llama leaves out whatever is as in the first Llama.
_LLAMA = replace(
    LLAMA,
    required=(),
    defaults={**LLAMA.defaults, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32, "bos_token_id": 1, "eos_token_id": 2},
)  # fmt: skip
LANGUAGE_MODELS = (_LLAMA, MISTRAL, QWEN2, QWEN3, ARCEE)


class SeeingFamily(Family):
    """Head and embedding are one matrix when the whole says so, or its language model."""

    def read_config(self, theirs: Mapping[str, Any]) -> Any:
        text = nested_config(theirs, "text_config")
        tied = bool(theirs.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        return super().read_config({**theirs, "text_config": {**text, "tie_word_embeddings": tied}})


class LlavaFamily(SeeingFamily):
    """The image token has two names."""

    def read_config(self, theirs: Mapping[str, Any]) -> Any:
        mark = theirs.get("image_token_index", theirs.get("image_token_id", 32000))
        return super().read_config({**theirs, "image_token_index": mark})


LLAVA = LlavaFamily(
    model_type="llava",
    architectures={"LlavaForConditionalGeneration": {}},
    config_class=VisionLanguageConfig,
    build=VisionLanguage,
    names={
        "image_token_index": "image_token_index",
        "projector_hidden_act": "projector_hidden_act",
        "multimodal_projector_bias": "multimodal_projector_bias",
        "vision_feature_layer": "vision_feature_layer",
        "vision_feature_select_strategy": "vision_feature_select_strategy",
    },  # fmt: skip
    constants={},
    required=(),
    fixed={"projector_hidden_act": PLAIN_ACTIVATIONS},
    spell=lambda c: {
        "image_seq_length": c.num_image_tokens,
        "tie_word_embeddings": c.text_config.tie_word_embeddings,
    },
    parts={
        "text_config": Part(LANGUAGE_MODELS, "language_model.", ((r"^", "language_model."),)),
        "vision_config": Part((CLIP_VISION, SIGLIP_VISION), "vision_tower.", ((r"^", "vision_tower."),)),
    },
    rules=(
        *pairs("multi_modal_projector.linear_1", "projector.linear_1"),
        *pairs("multi_modal_projector.linear_2", "projector.linear_2"),
    ),
    older=(
        (r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
)
