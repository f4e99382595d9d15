"""Labels for images: image-classification, and zero-shot-image-classification with labels named at the moment.

A model of texts and images (CLIP, SigLIP) takes any words for labels: "This is a photo of a cat." is one text, "This is
a photo of a dog." another, and the model says which one belongs to the image (Radford et al. 2021, arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zero2hero.language_model import LanguageModel, Parts
from zero2hero.pipelines.base import Pipeline
from zero2hero.pipelines.classify import checked_labels, label_scores


class ImagePipeline(Pipeline):
    """Base of the tasks that label an image: a file, its bytes, or an image of Pillow's."""

    takes = "an image: a file, its bytes, or an image of Pillow's"

    def __init__(self, parts: Parts | LanguageModel, task: str, settings: dict[str, Any]) -> None:
        super().__init__(parts, task, settings)
        assert isinstance(parts, Parts)
        self.processor = parts.image_processor

    def is_one(self, inputs: Any) -> bool:
        return is_image(inputs)

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """[B, C, H, W], as the model wants them."""
        return self.processor(images).to(self.device, next(self.model.parameters()).dtype)


def is_image(value: Any) -> bool:
    """Whether this may be an image: a file, its bytes, or an image of Pillow's."""
    return isinstance(value, (str, Path, bytes)) or hasattr(value, "getpixel")


class ImageClassification(ImagePipeline):
    """[{"label", "score"}] for an image, best first."""

    def run(self, inputs: list[Any], *, top_k: int | None = 5, function_to_apply: str | None = None) -> list[Any]:
        logits = self.model.logits(self.model(self.pixels(inputs))).float()
        return [row[:top_k] for row in label_scores(self.model.config, logits, function_to_apply)]


class ZeroShotImageClassification(ImagePipeline):
    """[{"score", "label"}] for an image, best first."""

    def __call__(self, inputs: Any, candidate_labels: str | Sequence[str] = (), **settings: Any) -> Any:
        """See `Pipeline`; `candidate_labels` are the labels to choose from, a list or one text with commas."""
        if candidate_labels:
            settings["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **settings)

    def run(
        self, inputs: list[Any], *, candidate_labels: str | Sequence[str] = (),
        hypothesis_template: str = "This is a photo of {}.",
    ) -> list[list[dict[str, Any]]]:  # fmt: skip
        """Scores add up to 1 where the model compares texts (CLIP); SigLIP judges each label alone."""
        labels, texts = checked_labels(self.task, candidate_labels, hypothesis_template)
        ids = self.model.pad(self.parts.tokenizer.encode_batch(texts))
        results = []
        for row in self.model.scores(ids, self.pixels(inputs)).float().tolist():
            found = [{"score": score, "label": label} for score, label in zip(row, labels)]
            results.append(sorted(found, key=lambda label: -label["score"]))
        return results
