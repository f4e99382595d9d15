"""Pretraining of an encoder on raw text: what `zero2hero train fill-mask` runs.

Words are masked and the encoder guesses them from both sides (Devlin et al. 2018, arXiv 1810.04805; data/corrupt.py
says how). Each text stands between [CLS] and [SEP], as it will when the encoder is used; a long one is cut into pieces.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from zero2hero.data.batches import IGNORE, Batch
from zero2hero.data.corrupt import MaskedBatches
from zero2hero.data.labelled import RowsByLength
from zero2hero.data.pairs import padded
from zero2hero.data.sources import open_source
from zero2hero.errors import UserError
from zero2hero.models.encoder import Encoder
from zero2hero.progress import human_count, track
from zero2hero.task_configs import FillMaskConfig
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.objectives import masked_lm
from zero2hero.train.run import Place, Task, micro_batches, steps_of, training
from zero2hero.train.text_tasks import encoder, save_model


def _begin(config: FillMaskConfig, place: Place) -> Task:
    train = config.train
    source = open_source(config.data, text_column=config.text_column, on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
                         seed=train.seed)  # fmt: skip
    texts = list(track(source, "reading text"))
    held = source.validation
    if config.validation_data is not None:
        held = open_source(config.validation_data, text_column=config.text_column, split="validation")
    if held is None and len(texts) < 2:
        raise UserError(f"{source.name} is one text, of which nothing can be held out. Name more in --validation_data.")
    held_texts = list(held) if held is not None else []
    if held is None:
        order = np.random.default_rng(train.seed % 2**64).permutation(len(texts))
        count = min(len(texts) - 1, max(1, round(config.validation_fraction * len(texts))))
        held_texts, texts = [texts[i] for i in order[:count]], [texts[i] for i in sorted(order[count:])]
    with place.ranks.first_on_each_machine():
        model, tokenizer = encoder(config, texts, "masked_lm")
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir, model_max_length=model.config.longest)
    rows, held_rows = (pieces(tokenizer, some, train.max_length) for some in (texts, held_texts))
    size, together = train.per_device_train_batch_size, train.gradient_accumulation_steps * place.ranks.data_size
    chosen = RowsByLength([len(row) for row in rows], size, together, train.seed)
    batches = masked(PaddedRows(rows, chosen.__getitem__, size, tokenizer.pad_token_id or 0), config, tokenizer)
    return Task(
        model, masked_lm, steps_of(config, len(rows), place.ranks.data_size),
        micro_batches(config, place, batches.__getitem__),
        save=functools.partial(save_model, tokenizer=tokenizer, config=config, max_length=model.config.longest),
        announce=f"{human_count(sum(map(len, rows)))} tokens to learn from, {human_count(sum(map(len, held_rows)))} "
        f"held out; vocabulary {model.config.vocab_size}",
        evaluate=evaluation(model, held_rows, config, tokenizer, place),
        made_with={"tokenizer": tokenizer.fingerprint, "data": source.fingerprint},
        facts={"vocab_size": model.config.vocab_size},
    )  # fmt: skip


train = training(_begin)


def pieces(tokenizer: Tokenizer, texts: list[str], max_length: int) -> list[np.ndarray]:
    """Each text's tokens between the special ones, in pieces of `max_length` tokens where it is longer."""
    raw = tokenizer.raw
    raw.enable_truncation(max_length)
    try:
        whole = raw.encode_batch(texts)
    finally:
        raw.no_truncation()
    return [np.array(piece.ids, dtype=np.int64) for text in whole for piece in (text, *text.overflowing)]


@dataclass(frozen=True)
class PaddedRows:
    """`rows[i]`: those of `texts` that `choose(i)` names as a `Batch` without targets; padding is document 1."""

    texts: list[np.ndarray]
    choose: Callable[[int], np.ndarray]
    batch_size: int
    pad_id: int

    def __getitem__(self, index: int) -> Batch:
        ids, mask = padded([self.texts[i] for i in self.choose(index)], self.pad_id)
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return Batch(ids, np.full_like(ids, IGNORE), positions.copy(), 1 - mask)


def masked(rows: PaddedRows, config: FillMaskConfig, tokenizer: Tokenizer) -> MaskedBatches:
    """The rows with masked words."""
    mask_id = tokenizer.special_token_id("mask_token")
    assert mask_id is not None  # `encoder` saw to that
    names = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
    begins = np.array([not name.startswith("##") for name in names]) if any(n.startswith("##") for n in names) else (
        np.array([name.startswith(("Ġ", "▁")) for name in names]))  # fmt: skip
    return MaskedBatches(
        rows, mask_id, tokenizer.vocab_size, config.train.seed, sorted(tokenizer.all_special_ids),
        rate=config.mlm_probability, starts_word_V=begins if config.whole_words else None,
    )  # fmt: skip


def evaluation(
    model: Encoder, texts: list[np.ndarray], config: FillMaskConfig, tokenizer: Tokenizer, place: Place
) -> Callable[[], dict[str, float]]:
    """() -> loss and accuracy at masked words of all held-out texts, the same words at every call."""
    size = 2 * config.train.per_device_train_batch_size
    order = np.argsort([len(text) for text in texts], kind="stable")
    rows = PaddedRows(texts, lambda i: order[i * size : (i + 1) * size], size, tokenizer.pad_token_id or 0)
    batches = masked(rows, config, tokenizer)

    def evaluate() -> dict[str, float]:
        sums: dict[str, Any] = {"nll": 0.0, "count": 0.0}
        for index in range(place.part[0], math.ceil(len(texts) / size), place.part[1]):
            loss = masked_lm(model, batches[index].to(place.device))
            sums = {"nll": sums["nll"] + float(loss.sum), "count": sums["count"] + float(loss.weight)}
        sums = place.ranks.sum(sums)
        mean = sums["nll"] / sums["count"]
        return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 50))}

    return evaluate
