"""What all runs share that train a model of texts for a task: tokenizer, model, batches with labels, the end.

encoder(config, texts, task)    from scratch with a tokenizer of its own, or a base model's body and a new head
labelled_task(...)              encoded texts, their labels and an objective as a run's `Task`
save_model(...)                 a directory that pipelines and transformers open
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from zero2hero.data.labelled import LabelledBatch, LabelledTexts, RowsByLength, drop_tokens
from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.language_model import load_parts
from zero2hero.models.checkpoint import save_pretrained
from zero2hero.models.decoder import init_weights
from zero2hero.models.encoder import Encoder, with_head
from zero2hero.progress import human_count
from zero2hero.task_configs import EncoderTaskConfig, Text2TextConfig, TextTaskConfig
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.objectives import Objective, label_logits
from zero2hero.train.pretrain import get_tokenizer
from zero2hero.train.run import Place, Task, micro_batches, steps_of
from zero2hero.train.tracking import Units


def base_parts(config: EncoderTaskConfig | Text2TextConfig, kind: type[nn.Module]) -> tuple[Any, Tokenizer]:
    """The base model, which must be of this kind, and its tokenizer.

    Raises:
        UserError: it is of another kind, or `model` and `tokenizer` ask for something else.
    """
    assert config.base_model is not None
    defaults = type(config)()
    for name in ("model", "tokenizer"):
        if getattr(config, name) != getattr(defaults, name):
            raise UserError(f"with base_model, {name} is the base model's: leave out the --{name} options")
    parts = load_parts(config.base_model, "cpu", "fp32")
    if not isinstance(parts.model, kind):
        raise UserError(f"{config.base_model} is a {type(parts.model).__name__}; this task needs a {kind.__name__}")
    return parts.model, parts.tokenizer


def encoder(
    config: EncoderTaskConfig, texts: Iterable[str], task: str, labels: Sequence[str] | None = None, **extra: Any
) -> tuple[Encoder, Tokenizer]:
    """An encoder with a head for `task`, and its tokenizer, which is trained on `texts` or the base model's.

    `extra`: further fields of its config.json.
    """
    if config.base_model is not None:
        base, tokenizer = base_parts(config, Encoder)
        model = base if task == base.config.task == "masked_lm" else with_head(base, task, labels, config.train.seed)
        model.config = dataclasses.replace(model.config, extra=model.config.extra | extra)
    else:
        tokenizer = get_tokenizer(config, texts)
        shape = dataclasses.replace(
            config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size, task=task,
            pad_token_id=tokenizer.pad_token_id, extra=extra,
            id2label=config.model.id2label if labels is None else dict(enumerate(labels)),
        )  # fmt: skip
        model = Encoder(shape)
        init_weights(model, config.train.seed)
    if tokenizer.special_token_id("cls_token") is None or tokenizer.special_token_id("mask_token") is None:
        raise UserError("an encoder reads texts between [CLS] and [SEP] and guesses at [MASK]: take a tokenizer that "
                        "has them, such as --tokenizer.kind wordpiece")  # fmt: skip
    if config.train.max_length > model.config.longest:
        raise UserError(f"train.max_length {config.train.max_length} is more than the {model.config.longest} tokens "
                        "that the model reads")  # fmt: skip
    return model, tokenizer


def encode(
    tokenizer: Tokenizer, texts: Sequence[Any], max_length: int, truncation: str = "longest_first", **more: Any
) -> list[Any]:
    """Texts, or pairs of texts, as the tokenizers library's records, shortened to `max_length` tokens."""
    raw = tokenizer.raw
    raw.enable_truncation(max_length, strategy=truncation)
    try:
        return raw.encode_batch(list(texts), **more)
    finally:
        raw.no_truncation()


def labelled_texts(records: Sequence[Any], labels: Sequence[Any], model: Encoder, tokenizer: Tokenizer,
                   per_token: bool = False) -> LabelledTexts:  # fmt: skip
    """Encoded texts with a label each; of segments a model has at least one kind."""
    kinds = model.config.type_vocab_size
    return LabelledTexts(
        [np.array(record.ids, dtype=np.int64) for record in records],
        [np.minimum(np.array(record.type_ids, dtype=np.int64), kinds - 1) for record in records],
        list(labels), tokenizer.pad_token_id or 0, per_token,
    )  # fmt: skip


def labelled_task(
    config: EncoderTaskConfig, place: Place, model: Encoder, tokenizer: Tokenizer,
    training: LabelledTexts, held_out: LabelledTexts, objective: Objective,
    *, evaluate_by: Objective | None = None, scores: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None,
    token_dropout: float = 0.0, announce: str = "", made_with: dict[str, str] | None = None, units: Units = Units(),  # noqa: B008
) -> Task:  # fmt: skip
    """A run that trains `model` to say the labels of texts.

    Args:
        objective: of train/objectives.py.
        evaluate_by: the same without what is only for training (label smoothing).
        scores: (all predicted numbers, all true ones) -> measures, for regression.
        token_dropout: see `TextClassificationConfig`.
        units: what has a label.
    """
    train = config.train
    size, together = train.per_device_train_batch_size, train.gradient_accumulation_steps * place.ranks.data_size
    rows = RowsByLength(training.lengths, size, together, train.seed)
    special = sorted(tokenizer.all_special_ids)

    def batch(index: int) -> LabelledBatch:
        found = training.batch(rows[index])
        if not token_dropout:
            return found
        mask = tokenizer.special_token_id("mask_token")
        assert mask is not None
        return drop_tokens(found, token_dropout, mask, special, train.seed, index * size)

    return Task(
        model, objective, steps_of(config, len(training), place.ranks.data_size),
        micro_batches(config, place, batch),
        save=functools.partial(save_model, tokenizer=tokenizer, config=config, max_length=model.config.longest),
        announce=f"{human_count(len(training))} texts to learn from, {human_count(len(held_out))} held out; "
        f"vocabulary {model.config.vocab_size}; {human_count(sum(p.numel() for p in model.parameters()))} "
        f"weights{announce}",
        evaluate=evaluation(model, held_out, evaluate_by or objective, 2 * size, place, scores),
        made_with={"tokenizer": tokenizer.fingerprint, **(made_with or {})},
        units=units,
    )  # fmt: skip


def evaluation(
    model: nn.Module, held_out: LabelledTexts, objective: Objective, batch_size: int, place: Place,
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None,
) -> Callable[[], dict[str, float]]:  # fmt: skip
    """() -> loss and measures over all held-out texts, divided over the ranks."""
    order = np.argsort(held_out.lengths, kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def evaluate() -> dict[str, float]:
        sums, predicted, true = {"loss": 0.0, "weight": 0.0}, [], []
        for rows in batches[place.part[0] :: place.part[1]]:
            batch = held_out.batch(rows).to(place.device)
            loss = objective(model, batch)
            parts = {"loss": loss.sum, "weight": loss.weight} | loss.metrics
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in parts.items()}
            if scores:
                predicted.append(label_logits(model, batch)[:, 0].cpu().numpy())
                true.append(batch.labels.cpu().numpy())
        pairs = [pair for part in place.ranks.gather(list(zip(predicted, true))) for pair in part]
        sums = place.ranks.sum(sums)
        weight = sums.pop("weight")
        measured = {f"eval_{name}": value / weight for name, value in sums.items()}
        if scores:
            measured |= scores(*(np.concatenate(side) for side in zip(*pairs)))
        return measured

    return evaluate


def save_model(model: nn.Module, *, tokenizer: Tokenizer, config: TextTaskConfig, max_length: int | None) -> None:
    """Write model, tokenizer and (where there is none) a model card into the run's directory."""
    directory = Path(config.output_dir)
    tokenizer.save_pretrained(directory, model_max_length=max_length)
    save_pretrained(model, directory)
    if not (directory / "README.md").exists():
        atomic_write(directory / "README.md", model_card(directory.resolve().name, config.task))


def model_card(name: str, task: str) -> str:
    """A minimal README.md with the front matter that the Hugging Face hub reads."""
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags:
- zero2hero
---

# {name}

A model for {task}, made with zero2hero. What it learned from is in run.yaml, how it went in report.html.

```python
import zero2hero as z2h

z2h.pipeline("{task}", model="{name}")
```
"""
