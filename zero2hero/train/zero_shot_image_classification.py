"""Images and texts that belong together: what `zero2hero train zero-shot-image-classification` runs.

CLIP's way or SigLIP's, by `model.loss` (models/vision_text.py): from images and their captions alone. How good the
model is shows in choosing: of all different captions of the data (at most CANDIDATES, the held-out ones first), which
one belongs to a held-out image?
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zero2hero.data.images import ImageProcessor
from zero2hero.data.pictures import CAPTION_COLUMNS, fingerprint
from zero2hero.errors import UserError
from zero2hero.language_model import load_parts
from zero2hero.model_configs import SIGLIP_TOWER, VisionConfig
from zero2hero.models.decoder import init_weights
from zero2hero.models.vision_text import VisionText
from zero2hero.progress import human_count
from zero2hero.task_configs import ZeroShotImageConfig
from zero2hero.tokenizer import Tokenizer
from zero2hero.train import predictions
from zero2hero.train.image_tasks import (
    Pixels,
    chunks,
    flops_per_token,
    mean_over,
    open_sides,
    processor_for,
    save_model,
    shuffled_rows,
)
from zero2hero.train.objectives import sigmoid_contrastive, softmax_contrastive
from zero2hero.train.pretrain import get_tokenizer
from zero2hero.train.run import Place, Task, micro_batches, steps_of, training
from zero2hero.train.tracking import Units

CANDIDATES = 1000


@dataclass(frozen=True)
class PairBatch:
    """Row by row a text and its image."""

    ids_BT: Tensor
    pixels_BCHW: Tensor
    patches: int  # of an image

    @property
    def num_tokens(self) -> int:
        """Of texts, padding included, and patches."""
        return self.ids_BT.numel() + len(self.pixels_BCHW) * self.patches

    def to(self, device: Any) -> PairBatch:
        return PairBatch(self.ids_BT.to(device), self.pixels_BCHW.to(device), self.patches)


def _begin(config: ZeroShotImageConfig, place: Place) -> Task:
    parts = load_parts(config.base_model, "cpu", "fp32") if config.base_model else None
    if parts and not isinstance(parts.model, VisionText):
        kind = type(parts.model).__name__
        raise UserError(f"{config.base_model} is a {kind}; this task needs a model of images and texts (CLIP, SigLIP)")
    vision = config.model.vision_config
    processor = parts.image_processor if parts else _processor(config, vision)
    sides = open_sides(config, processor)
    (training, pictures), (held_out, held_pictures) = sides
    column = training.find("caption_column", config.caption_column, CAPTION_COLUMNS)
    captions, held_captions = (table.column(column, str) for table, _ in sides)
    with place.ranks.first_on_each_machine():
        tokenizer = parts.tokenizer if parts else get_tokenizer(config, captions)
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir)
    model: Any = parts.model if parts else make_model(config, tokenizer)
    longest = model.config.text_config.max_position_embeddings
    texts, held_texts = ([ids[:longest - 1] + ids[-1:] if len(ids) > longest else ids
                          for ids in tokenizer.encode_batch(some)] for some in (captions, held_captions))  # fmt: skip
    pixels, held_pixels = Pixels(pictures, processor), Pixels(held_pictures, processor)
    patches = model.config.vision_config.num_patches
    rows = shuffled_rows(len(texts), config, place)

    def batch(index: int) -> PairBatch:
        chosen = rows[index]
        return PairBatch(model.pad([texts[i] for i in chosen]), pixels(chosen), patches)

    def held_batch(chosen: np.ndarray) -> PairBatch:
        return PairBatch(model.pad([held_texts[i] for i in chosen]), held_pixels(chosen), patches)

    candidates = list(dict.fromkeys([*held_captions, *captions]))[:CANDIDATES]
    wanted = torch.tensor([candidates.index(text) if text in candidates else -1 for text in held_captions])
    candidate_ids = [texts_ids for texts_ids in tokenizer.encode_batch(candidates)]
    some = chunks(len(held_texts), config.train.per_device_train_batch_size)
    held_batches = [functools.partial(held_batch, chosen) for chosen in some]
    objective = softmax_contrastive if model.softmax else sigmoid_contrastive

    @torch.no_grad()
    def guesses(model: Any) -> Tensor:
        weight = next(model.parameters())
        words = model.text_features(model.pad([ids[:longest] for ids in candidate_ids]))
        seen = [model.image_features(held_pixels(chosen).to(weight.device, weight.dtype)) for chosen in some]
        return model.logits(words, torch.cat(seen)).argmax(-1).cpu()

    def evaluate() -> dict[str, float]:
        found = mean_over(model, objective, held_batches, place)
        found["eval_batch_accuracy"] = found.pop("eval_accuracy")
        return found | {"eval_accuracy": float((guesses(model) == wanted).float().mean())}

    def save(finished: nn.Module) -> None:
        save_model(finished, config, processor, tokenizer)
        guessed = guesses(finished)
        shown = [
            predictions.picture(held_pictures.pixels[held_pictures.of_record[i]], held_captions[i],
                                candidates[guessed[i]])
            for i in predictions.choose((guessed == wanted).tolist())
        ]  # fmt: skip
        predictions.write(config.output_dir, pictures=shown)

    return Task(
        model, objective, steps_of(config, len(texts), place.ranks.data_size), micro_batches(config, place, batch),
        save=save,
        announce=f"{human_count(len(texts))} pairs to learn from, {human_count(len(held_texts))} held out, to be told "
        f"among {len(candidates)} captions; {human_count(sum(p.numel() for p in model.parameters()))} weights",
        evaluate=evaluate,
        made_with={"data": fingerprint(training, pictures), "tokenizer": tokenizer.fingerprint},
        flops_per_token=flops_per_token(model, objective, batch(0)),
        units=Units("image"),
    )  # fmt: skip


train = training(_begin)


def _processor(config: ZeroShotImageConfig, vision: VisionConfig) -> ImageProcessor:
    kind = "CLIP" if config.model.loss == "softmax" else "Siglip"
    return processor_for(vision.image_size, vision.num_channels, kind, resample=3)


def make_model(config: ZeroShotImageConfig, tokenizer: Tokenizer) -> VisionText:
    """From scratch."""
    c = config.model
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.special_token_id("sep_token")
    if c.loss == "softmax" and (end is None or tokenizer.encode("a")[-1] != end or end == 2):
        raise UserError("CLIP reads a text's vector from its end token: take a tokenizer that ends each text with one, "
                        "such as --tokenizer.kind wordpiece")  # fmt: skip
    text = dataclasses.replace(
        c.text_config, vocab_size=tokenizer.vocab_size, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.special_token_id("cls_token"),
    )  # fmt: skip
    vision = c.vision_config
    if c.loss == "sigmoid":
        vision = dataclasses.replace(vision, first_norm=False, patch_bias=True, **SIGLIP_TOWER)
    model = VisionText(dataclasses.replace(c, text_config=text, vision_config=vision))
    init_weights(model, config.train.seed)
    return model
