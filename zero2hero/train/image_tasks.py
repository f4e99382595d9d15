"""What all runs share that train a model of images: pixels in batches, evaluation, the pictures in the report, the end.

processor_for(size, channels)   how images become pixels, for training and for whoever opens the model
Pixels                          uint8 images -> what the model reads
flops_per_token(...)            FLOPs of training on one batch, counted
save_model(...)                 a directory that pipelines and transformers open
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zero2hero.data.images import ImageProcessor
from zero2hero.data.labelled import RowsByLength
from zero2hero.data.pictures import Pictures, open_pictures
from zero2hero.data.tables import Table
from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.models.checkpoint import save_pretrained
from zero2hero.task_configs import ImageTaskConfig
from zero2hero.train.objectives import Objective
from zero2hero.train.run import Place
from zero2hero.train.text_tasks import model_card


def processor_for(image_size: int, channels: int, kind: str = "ViT", **more: Any) -> ImageProcessor:
    """Images of any size squeezed to a square, pixels from -1 to 1."""
    size, half = {"height": image_size, "width": image_size}, (0.5,) * channels
    return ImageProcessor(
        size, size, image_mean=half, image_std=half, image_processor_type=f"{kind}ImageProcessor", **more
    )


def open_sides(config: ImageTaskConfig, processor: ImageProcessor) -> tuple[tuple[Table, Pictures], ...]:
    """(records, images) to learn from, and the same held out.

    Raises:
        UserError: nothing to read, or a processor that leaves images different sizes.
    """
    if "shortest_edge" in processor.size and not processor.do_center_crop:
        raise UserError("the base model's image processor keeps proportions without a crop: images differ in size")
    tables = open_pictures(
        config.data, config.validation_data, validation_fraction=config.validation_fraction, seed=config.train.seed,
        image_column=config.image_column, on_bad_record=config.on_bad_record,
    )  # fmt: skip
    sides = []
    for table in tables:
        pictures, table = Pictures.read(table, processor, config.on_bad_record)
        sides.append((table, pictures))
    return tuple(sides)


class Pixels:
    """`pixels(rows)`: the images of these records as its processor makes them, [B, C, S, S]."""

    def __init__(self, pictures: Pictures, processor: ImageProcessor) -> None:
        self.pictures, self.processor = pictures, processor

    def __call__(self, rows: Sequence[int] | np.ndarray, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`change`: what is done to them when their values are from 0 to 1."""
        p = self.processor
        x = torch.from_numpy(self.pictures.pixels[self.pictures.of_record[np.asarray(rows)]]).float()
        if p.do_rescale:
            x = x * p.rescale_factor
        if change is not None:
            x = change(x)
        if p.do_normalize:
            mean, std = (torch.tensor(list(v))[:, None, None] for v in (p.image_mean, p.image_std))
            x = (x - mean) / std
        return x


def shuffled_rows(count: int, config: ImageTaskConfig, place: Place) -> RowsByLength:
    """The numbers of the records in each micro-batch of the run."""
    train = config.train
    together = train.gradient_accumulation_steps * place.ranks.data_size
    return RowsByLength([1] * count, train.per_device_train_batch_size, together, train.seed)


def mean_over(
    model: nn.Module, objective: Objective, batches: Sequence[Callable[[], Any]], place: Place
) -> dict[str, float]:
    """{"eval_loss", "eval_accuracy", ...}: an objective over held-out batches, divided over the ranks."""
    sums = {"loss": 0.0, "weight": 0.0}
    for make in batches[place.part[0] :: place.part[1]]:
        loss = objective(model, make().to(place.device))
        parts = {"loss": loss.sum, "weight": loss.weight} | loss.metrics
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in parts.items()}
    sums = place.ranks.sum(sums)
    weight = sums.pop("weight")
    return {f"eval_{name}": value / weight for name, value in sums.items()}


def chunks(count: int, size: int) -> list[np.ndarray]:
    """0 ... count - 1, `size` at a time."""
    return np.split(np.arange(count), range(size, count, size))


def flops_per_token(model: nn.Module, objective: Objective, batch: Any) -> Callable[[int], float]:
    """step -> FLOPs of training on one token of such batches, forward and backward: all products are counted once."""
    from torch.utils.flop_counter import FlopCounterMode

    @functools.cache
    def count() -> float:
        before = torch.get_rng_state()
        with FlopCounterMode(display=False) as counter:
            objective(model, batch).sum.backward()
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(before)
        return counter.get_total_flops() / batch.num_tokens

    found = count()
    return lambda step: found


def save_model(model: nn.Module, config: ImageTaskConfig, processor: ImageProcessor, *others: Any) -> None:
    """Write the model, its image processor, `others` with a `save_pretrained`, and (where there is none) a card."""
    directory = Path(config.output_dir)
    processor.save_pretrained(directory)
    for other in others:
        other.save_pretrained(directory)
    save_pretrained(model, directory)
    if not (directory / "README.md").exists():
        atomic_write(directory / "README.md", model_card(directory.resolve().name, config.task))
