"""A label for an image: what `zero2hero train image-classification` runs.

A multi-layer perceptron (models/mlp.py) or a vision Transformer (models/vision.py), from scratch or from a base model;
the same head, loss and loop. Small sets of images are learned by heart sooner than they are understood, so this is
where dropout, weight decay, augmentation and early stopping can be seen at work.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zero2hero.data.augment import augment
from zero2hero.data.images import ImageProcessor
from zero2hero.data.pictures import LABEL_COLUMNS, fingerprint
from zero2hero.data.tables import Table
from zero2hero.errors import UserError
from zero2hero.language_model import load_parts
from zero2hero.model_configs import VisionConfig
from zero2hero.models.decoder import init_weights
from zero2hero.models.mlp import MLP, init_mlp
from zero2hero.models.vision import VisionTransformer
from zero2hero.progress import human_count
from zero2hero.task_configs import ImageClassificationConfig
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
from zero2hero.train.objectives import classification
from zero2hero.train.run import Place, Task, micro_batches, steps_of, training
from zero2hero.train.tracking import Units


@dataclass(frozen=True)
class ImageBatch:
    """Images and their labels; `tokens` is what the model makes of an image: its patches, or 1."""

    pixels_BCHW: Tensor
    labels: Tensor
    tokens: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.pixels_BCHW,)

    @property
    def num_tokens(self) -> int:
        return len(self.labels) * self.tokens

    def to(self, device: Any) -> ImageBatch:
        return ImageBatch(self.pixels_BCHW.to(device), self.labels.to(device), self.tokens)


def _begin(config: ImageClassificationConfig, place: Place) -> Task:
    base, processor = _base(config)
    sides = open_sides(config, processor)
    (training, pictures), (held_out, held_pictures) = sides
    column = training.find("label_column", config.label_column, LABEL_COLUMNS)
    names = label_names(training, column)
    labels, held_labels = (torch.tensor(_numbers(table, column, names)) for table, _ in sides)
    model = make_model(config, base, names)
    tokens = len(model.embed_positions.weight) if isinstance(model, VisionTransformer) else 1
    pixels, held_pixels = Pixels(pictures, processor), Pixels(held_pictures, processor)
    rows = shuffled_rows(len(labels), config, place)
    size = config.train.per_device_train_batch_size

    def batch(index: int) -> ImageBatch:
        chosen = rows[index]
        change = functools.partial(augment, config=config.augment, seed=config.train.seed, first_row=index * size)
        return ImageBatch(pixels(chosen, change), labels[chosen], tokens)

    def held_batch(chosen: np.ndarray) -> ImageBatch:
        return ImageBatch(held_pixels(chosen), held_labels[chosen], tokens)

    some = chunks(len(held_labels), 2 * size)
    held_batches = [functools.partial(held_batch, chosen) for chosen in some]

    def save(finished: nn.Module) -> None:
        save_model(finished, config, processor)
        guesses = _guesses(finished, held_batches)
        right = (guesses == held_labels).tolist()
        shown = [
            predictions.picture(held_pictures.pixels[held_pictures.of_record[i]], names[held_labels[i]],
                                names[guesses[i]])
            for i in predictions.choose(right)
        ]  # fmt: skip
        matrix = predictions.confusion(held_labels.tolist(), guesses.tolist(), len(names))
        predictions.write(config.output_dir, pictures=shown, labels=names, confusion=matrix)

    objective = functools.partial(classification, label_smoothing=config.train.label_smoothing_factor)
    return Task(
        model, objective, steps_of(config, len(labels), place.ranks.data_size), micro_batches(config, place, batch),
        save=save,
        announce=f"{human_count(len(labels))} images to learn from, {human_count(len(held_labels))} held out; "
        f"{len(names)} labels; {human_count(sum(p.numel() for p in model.parameters()))} weights",
        evaluate=lambda: mean_over(model, classification, held_batches, place),
        made_with={"data": fingerprint(training, pictures)},
        facts={"vocab_size": len(names)},
        flops_per_token=flops_per_token(model, objective, batch(0)),
        units=Units("image"),
    )  # fmt: skip


train = training(_begin)


@torch.no_grad()
def _guesses(model: Any, batches: list[functools.partial]) -> Tensor:
    weight = next(model.parameters())
    found = [model.logits(model(make().pixels_BCHW.to(weight.device, weight.dtype))).argmax(-1) for make in batches]
    return torch.cat(found).cpu()


def _base(config: ImageClassificationConfig) -> tuple[Any, ImageProcessor]:
    """(the base model, if there is one; how images become pixels)."""
    if config.base_model is None:
        shape = config.mlp if config.architecture == "mlp" else config.model
        return None, processor_for(shape.image_size, shape.num_channels)
    parts = load_parts(config.base_model, "cpu", "fp32")
    if not isinstance(parts.model, (VisionTransformer, MLP)):
        kind = type(parts.model).__name__
        raise UserError(f"{config.base_model} is a {kind}, which labels no images: take a ViT or an MLP")
    return parts.model, parts.image_processor


def make_model(config: ImageClassificationConfig, base: Any, names: list[str]) -> nn.Module:
    """From scratch; or the base model, with a new head unless it knows the same labels."""
    labels, seed = dict(enumerate(names)), config.train.seed
    if base is not None and base.config.task == "image_classification" and base.config.id2label == labels:
        return base
    shape: Any = config.mlp if config.architecture == "mlp" else config.model
    if base is not None:
        shape = dataclasses.replace(base.config, task="image_classification") if _is_vit(base.config) else base.config
    shape = dataclasses.replace(shape, id2label=labels)
    model: nn.Module
    if _is_vit(shape):
        model = VisionTransformer(shape)
        init_weights(model, seed)
    else:
        model = MLP(shape)
        init_mlp(model, seed)
    if base is not None:
        heads = ("classifier.", "pooler.")
        model.load_state_dict({n: p for n, p in base.state_dict().items() if not n.startswith(heads)}, strict=False)
    return model


def _is_vit(shape: Any) -> bool:
    return isinstance(shape, VisionConfig)


def label_names(table: Table, column: str) -> list[str]:
    """The different labels, sorted (numbers by size).

    Raises:
        UserError: one label only, or as good as one for each image.
    """
    found = sorted({str(value) for value in table.column(column, (str, int))})
    if len(found) < 2:
        raise UserError(f"{table.name}: every label is {found[0]!r}, so there is nothing to tell apart. A folder needs "
                        "a folder for each label; of a table, name the column with --label_column.")  # fmt: skip
    if len(found) > max(1000, len(table) // 2):
        raise UserError(f"{table.name}: column '{column}' holds {len(found)} different values in {len(table)} records: "
                        "is it the labels'? Name theirs with --label_column.")  # fmt: skip
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else found


def _numbers(table: Table, column: str, names: list[str]) -> list[int]:
    numbers = {name: i for i, name in enumerate(names)}
    for value, where in zip(table.column(column, (str, int)), table.where):
        if str(value) not in numbers:
            raise UserError(f"{where}: the label {value!r} does not occur among those to learn from")
    return [numbers[str(value)] for value in table.column(column)]
