"""Floor 2, the wholes: models assembled from the parts of floor 1, loaded from and saved as Hugging Face files."""

from __future__ import annotations

from zero2hero.config import DecoderConfig
from zero2hero.model_configs import (
    EncoderConfig,
    EncoderDecoderConfig,
    Idefics3Config,
    MLPConfig,
    VisionConfig,
    VisionLanguageConfig,
    VisionTextConfig,
)
from zero2hero.models.checkpoint import from_pretrained, save_pretrained
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.models.encoder import Encoder, with_head
from zero2hero.models.encoder_decoder import EncoderDecoder
from zero2hero.models.idefics3 import Idefics3
from zero2hero.models.mlp import MLP, init_mlp
from zero2hero.models.vision import VisionTransformer
from zero2hero.models.vision_language import VisionLanguage
from zero2hero.models.vision_text import VisionText

__all__ = [
    "MLP",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Idefics3",
    "Idefics3Config",
    "MLPConfig",
    "VisionConfig",
    "VisionLanguage",
    "VisionLanguageConfig",
    "VisionText",
    "VisionTextConfig",
    "VisionTransformer",
    "from_pretrained",
    "init_mlp",
    "init_weights",
    "save_pretrained",
    "with_head",
]
