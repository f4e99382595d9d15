"""pipeline(task, model): a model at work in one line, for every task of the road.

answer = z2h.pipeline("fill-mask", model="runs/bert")("the capital of france is [MASK]")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from zero2hero.errors import UserError, did_you_mean
from zero2hero.language_model import LanguageModel, load_parts
from zero2hero.models.decoder import Decoder
from zero2hero.models.encoder import Encoder
from zero2hero.models.encoder_decoder import EncoderDecoder
from zero2hero.models.vision_language import VisionLanguage
from zero2hero.models.vision_text import VisionText
from zero2hero.pipelines.answer import QuestionAnswering
from zero2hero.pipelines.base import Pipeline
from zero2hero.pipelines.classify import TextClassification, ZeroShotClassification
from zero2hero.pipelines.look import ImageClassification, ZeroShotImageClassification
from zero2hero.pipelines.see import ImageTextToText, VisualQuestionAnswering
from zero2hero.pipelines.tokens import FeatureExtraction, FillMask, TokenClassification
from zero2hero.pipelines.write import Text2Text, TextGeneration

# Task -> what does it, and the kinds of models (see `_kind`) that can. A kind's first task is what it does unasked.
TASKS: dict[str, tuple[type[Pipeline], set[str]]] = {
    "text-generation": (TextGeneration, {"decoder"}),
    "text2text-generation": (Text2Text, {"encoder-decoder"}),
    "summarization": (Text2Text, {"encoder-decoder"}),
    "translation": (Text2Text, {"encoder-decoder"}),
    "fill-mask": (FillMask, {"masked_lm"}),
    "text-classification": (TextClassification, {"sequence_classification"}),
    "zero-shot-classification": (ZeroShotClassification, {"sequence_classification", "decoder"}),
    "token-classification": (TokenClassification, {"token_classification"}),
    "question-answering": (QuestionAnswering, {"question_answering"}),
    "feature-extraction": (
        FeatureExtraction,
        {"features", "masked_lm", "sequence_classification", "token_classification", "question_answering", "decoder"},
    ),
    "image-classification": (ImageClassification, {"image_classification"}),
    "zero-shot-image-classification": (ZeroShotImageClassification, {"vision-text"}),
    "image-text-to-text": (ImageTextToText, {"vision-language"}),
    "visual-question-answering": (VisualQuestionAnswering, {"vision-language"}),
}
ALIASES = {
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "vqa": "visual-question-answering",
}
_KINDS: dict[type, str] = {
    Decoder: "decoder",
    EncoderDecoder: "encoder-decoder",
    VisionText: "vision-text",
    VisionLanguage: "vision-language",
}


def pipeline(
    task: str | None = None,
    model: str | Path | LanguageModel | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    **settings: Any,
) -> Pipeline:
    """A model made ready for a task: `pipeline("ner", model="runs/ner")("Ada Lovelace lived in London")`.

    Args:
        task: text-generation, fill-mask, ... (see `TASKS`), or its short name; translation_en_to_de also names the
            languages. None: what the model is made for.
        model: a run, a Hugging Face directory, a hub id, or what `load` gave.
        device: "auto" takes a GPU when there is one.
        dtype: of the weights; as stored by default.
        **settings: defaults of the task's settings, aggregation_strategy="simple" say.

    Raises:
        UserError: an unknown task or setting, no model, or a model that cannot do the task.
    """
    known = [*TASKS, *ALIASES]
    name = ALIASES.get(task or "", task)
    base = "translation" if re.fullmatch(r"translation_\w+_to_\w+", name or "") else name
    if base is not None and base not in TASKS:
        raise UserError(f"there is no task {task!r}.{did_you_mean(str(task), known)} The tasks are {', '.join(known)}")
    if model is None:
        raise UserError("pipeline needs a model: model= a run, a Hugging Face directory or a hub id")
    given = isinstance(model, LanguageModel)
    parts = model if isinstance(model, LanguageModel) else load_parts(model, device, dtype)
    kind, where = _kind(parts.model), "the model" if given else str(model)
    able = [task for task, (_, kinds) in TASKS.items() if kind in kinds]
    if not able:
        raise UserError(f"{where} ({kind}) is for none of the tasks: {', '.join(TASKS)}")
    base, name = base or able[0], name or able[0]
    if base not in able:
        raise UserError(f"{where} ({kind}) cannot do {name}; it can do {', '.join(able)}")
    return TASKS[base][0](parts, name, settings)


def _kind(model: Any) -> str:
    """What sort of model this is, by its class or by the task of its head."""
    for kind, name in _KINDS.items():
        if isinstance(model, kind) and not _classifies(model):
            return name
    headed = (
        isinstance(model, Encoder)
        or _classifies(model)
        or getattr(model.config, "task", None) == "image_classification"
    )
    return model.config.task if headed else type(model).__name__


def _classifies(model: Any) -> bool:
    return isinstance(model, Decoder) and model.classifies
