"""What a language model sees with: images of a conversation become vectors among those of its words.

    lm = seeing_model(load_parts("runs/llava", "auto", None))
    text = lm.eyes.placed(text, images)              # where the text has a mark, what stands for the image there
    ids = lm.eyes.expand(lm.tokenizer.encode(text))
    vectors = lm.eyes.vectors([ids], lm.eyes.pixels(images))
    lm.continuations([ids], embeddings=vectors)

Pipelines and the server are made of this; the model itself is in models/vision_language.py.

T time, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.language_model import LanguageModel, Parts
from zero2hero.models.vision_language import VisionLanguage

if TYPE_CHECKING:
    from PIL.Image import Image


class Eyes:
    """The part of a model that sees, and what prepares images for it."""

    def __init__(self, parts: Parts) -> None:
        assert isinstance(parts.model, VisionLanguage)
        self.model, self.processor = parts.model, parts.image_processor
        index = self.model.config.image_token_index
        self.mark = parts.tokenizer.id_to_token(index) or ""  # the token that stands for an image in a text
        if not self.mark:
            raise UserError(f"{parts.directory}: the tokenizer has no token {index}, which stands for an image")

    def placed(self, text: str, images: Sequence[Image]) -> str:
        """The text with all that stands for each image, where it had the mark.

        Raises:
            UserError: another number of images than the text has places for.
        """
        between = text.split(self.mark)
        if len(between) != len(images) + 1:
            raise UserError(
                f"the text has {len(between) - 1} places for images ({self.mark}), and {len(images)} images were given"
            )
        stand_ins = [self.processor.in_text(image, self.mark) for image in images]
        return "".join(piece for pair in zip(between, [*stand_ins, ""]) for piece in pair)

    def expand(self, ids: Sequence[int]) -> list[int]:
        """A text's ids as the model reads them, with a token for each vector of an image."""
        return self.model.expand(ids)

    def pixels(self, images: Sequence[Image]) -> Tensor | None:
        """The images as the model wants them, where there are some."""
        return self.processor(images) if images else None

    def vectors(self, prompts: Sequence[Sequence[int]], pixels: Tensor | None) -> list[Tensor]:
        """The vectors [T, D] of each prompt (expanded), for the pixels of the images of all of them."""
        if pixels is not None:
            first: Any = next(self.model.vision_tower.parameters())
            pixels = pixels.to(first.device, first.dtype)
        return self.model.embed_prompts(prompts, pixels)


def seeing_model(parts: Parts) -> LanguageModel:
    """The language model of one that sees, with its eyes."""
    model: Any = parts.model
    return LanguageModel(
        model.language_model, parts.tokenizer, generation_config=parts.generation_config, eyes=Eyes(parts)
    )


def joined_pixels(pixels: Sequence[Tensor | None]) -> Tensor | None:
    """Those of several prompts, in order."""
    found = [one for one in pixels if one is not None]
    return torch.cat(found) if found else None
