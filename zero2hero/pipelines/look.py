"""Tasks about images: image-classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zero2hero.language_model import LanguageModel, Parts
from zero2hero.pipelines.base import Pipeline
from zero2hero.pipelines.classify import label_scores


class ImageClassification(Pipeline):
    """[{"label", "score"}] for an image, best first. An image is a file, its bytes, or an image of Pillow's."""

    takes = "an image: a file, its bytes, or an image of Pillow's"

    def __init__(self, parts: Parts | LanguageModel, task: str, settings: dict[str, Any]) -> None:
        super().__init__(parts, task, settings)
        assert isinstance(parts, Parts)
        self.processor = parts.image_processor

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, (str, Path, bytes)) or hasattr(inputs, "getpixel")

    def run(self, inputs: list[Any], *, top_k: int | None = 5, function_to_apply: str | None = None) -> list[Any]:
        pixels = self.processor(inputs).to(self.device, next(self.model.parameters()).dtype)
        logits = self.model.logits(self.model(pixels)).float()
        return [row[:top_k] for row in label_scores(self.model.config, logits, function_to_apply)]
