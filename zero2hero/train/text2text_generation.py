"""From a text to another: what `zero2hero train text2text-generation` runs.

An encoder-decoder (T5; Raffel et al. 2019, arXiv 1910.10683) reads the one and writes the other: translation, summary,
answer. It learns from pairs, or is pretrained on plain text by writing the spans that were cut out of it. How good
it is shows in what it writes: exact matches, or BLEU (Papineni et al. 2002) as sacrebleu computes it (Post 2018,
arXiv 1804.08771).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from zero2hero.data.batches import Batches
from zero2hero.data.cache import split_documents, tokenize_to_cache
from zero2hero.data.corrupt import SpanBatches, tokens_for
from zero2hero.data.labelled import RowsByLength
from zero2hero.data.pairs import Seq2SeqBatch, seq2seq_batch
from zero2hero.data.sources import open_source
from zero2hero.data.tables import open_tables
from zero2hero.errors import UserError
from zero2hero.generate.beam import beam_search
from zero2hero.models.decoder import init_weights
from zero2hero.models.encoder_decoder import EncoderDecoder
from zero2hero.progress import human_count
from zero2hero.task_configs import Text2TextConfig
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.tokenizer import SENTINELS
from zero2hero.train.objectives import seq2seq_lm
from zero2hero.train.pretrain import get_tokenizer
from zero2hero.train.run import Place, Sample, Task, micro_batches, steps_of, training
from zero2hero.train.text_tasks import base_parts, encode, save_model

SOURCE_COLUMNS = ("source", "input", "question", "en", "document", "article", "text")
TARGET_COLUMNS = ("target", "output", "answer", "de", "summary", "highlights", "label")
SHOWN = 3  # held-out records that are written out for a person to see


def _begin(config: Text2TextConfig, place: Place) -> Task:
    if config.metric == "bleu":
        bleu(["a"], ["a"])  # say that a library is missing before the work, not after it
    return (_pretrain if config.span_corruption else _translate)(config, place)


train = training(_begin)


def _translate(config: Text2TextConfig, place: Place) -> Task:
    train = config.train
    training, held_out = open_tables(
        config.data, config.validation_data, validation_fraction=config.validation_fraction, seed=train.seed,
        header=not (config.source_column or "").isdecimal(), on_bad_record=config.on_bad_record,
    )  # fmt: skip
    source = training.find("source_column", config.source_column, SOURCE_COLUMNS)
    target = training.find("target_column", config.target_column, TARGET_COLUMNS)
    if source == target:
        raise UserError(f"source_column and target_column are both '{source}': name the two texts of a pair")
    sides = [(table.column(source, str), table.column(target, str)) for table in (training, held_out)]
    model, tokenizer = _model(config, place, [*sides[0][0], *sides[0][1]])
    rows, held_rows = (
        [_ids(tokenizer, texts, train.max_length) for texts in side] for side in sides
    )  # fmt: skip
    size, together = train.per_device_train_batch_size, train.gradient_accumulation_steps * place.ranks.data_size
    lengths = [len(one) + len(other) for one, other in zip(*rows)]
    chosen = RowsByLength(lengths, size, together, train.seed)

    def batch(index: int) -> Seq2SeqBatch:
        return _batch(rows, chosen[index], model)

    order = np.argsort([len(one) + len(other) for one, other in zip(*held_rows)], kind="stable")
    held_batches = [order[i : i + 2 * size] for i in range(0, len(order), 2 * size)]
    samples = list(zip(*(side[: max(SHOWN, config.eval_samples)] for side in sides[1])))
    return Task(
        model, functools.partial(seq2seq_lm, label_smoothing=train.label_smoothing_factor),
        steps_of(config, len(training), place.ranks.data_size), micro_batches(config, place, batch),
        save=functools.partial(save_model, tokenizer=tokenizer, config=config, max_length=train.max_length),
        announce=f"{human_count(len(training))} pairs to learn from, {human_count(len(held_out))} held out; vocabulary "
        f"{model.config.vocab_size}; {human_count(sum(p.numel() for p in model.parameters()))} weights",
        evaluate=_evaluation(model, lambda i: _batch(held_rows, held_batches[i], model), len(held_batches), place,
                             lambda: _measure(config, model, tokenizer, samples)),
        sample=lambda model: _samples(model, tokenizer, samples[:SHOWN], config),
        made_with={"tokenizer": tokenizer.fingerprint, "data": training.fingerprint},
        facts={"vocab_size": model.config.vocab_size},
    )  # fmt: skip


def _pretrain(config: Text2TextConfig, place: Place) -> Task:
    train = config.train
    source = open_source(config.data, text_column=config.text_column, on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
                         seed=train.seed)  # fmt: skip
    model, tokenizer = _model(config, place, source)
    first = tokenizer.token_to_id("<extra_id_0>")
    if first is None:
        raise UserError("spans give way to <extra_id_0>, <extra_id_1>, ...: take a tokenizer that has them, such as "
                        "--tokenizer.kind unigram")  # fmt: skip
    with place.ranks.first_on_each_machine():
        cache = tokenize_to_cache(source, tokenizer)
    parts = split_documents(cache, config.validation_fraction, train.seed)
    length, size = tokens_for(train.max_length), train.per_device_train_batch_size
    spoilt = [
        SpanBatches(Batches(corpus, max_length=length, batch_size=size, seed=train.seed, document_mask=False), first,
                    _eos(model), model.config.decoder_start_token_id, train.seed, num_sentinels=SENTINELS)
        for corpus in parts
    ]  # fmt: skip
    count = spoilt[1].rows.windows_per_epoch // size  # type: ignore[attr-defined]
    if not count:
        raise UserError(f"{source.name}: too little text is held out for a batch of {size} rows of {length} tokens; "
                        "raise validation_fraction, or lower the batch size")  # fmt: skip
    return Task(
        model, functools.partial(seq2seq_lm, label_smoothing=train.label_smoothing_factor),
        steps_of(config, spoilt[0].rows.windows_per_epoch, place.ranks.data_size),  # type: ignore[attr-defined]
        micro_batches(config, place, spoilt[0].__getitem__),
        save=functools.partial(save_model, tokenizer=tokenizer, config=config, max_length=train.max_length),
        announce=f"{human_count(parts[0].num_tokens)} tokens to learn from, {human_count(parts[1].num_tokens)} held "
        f"out; vocabulary {model.config.vocab_size}",
        evaluate=_evaluation(model, spoilt[1].__getitem__, count, place, dict),
        made_with={"tokenizer": tokenizer.fingerprint, "data": cache.folder.name},
        facts={"vocab_size": model.config.vocab_size},
    )  # fmt: skip


def _model(config: Text2TextConfig, place: Place, texts: Any) -> tuple[EncoderDecoder, Tokenizer]:
    """From scratch, with a tokenizer of the texts' own, or the base model."""
    with place.ranks.first_on_each_machine():
        if config.base_model is not None:
            return base_parts(config, EncoderDecoder)
        tokenizer = get_tokenizer(config, texts)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if eos is None or pad is None:
            raise UserError("a written text ends with an end token, and begins behind a padding token: take a "
                            "tokenizer that has both, such as --tokenizer.kind unigram")  # fmt: skip
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir, model_max_length=config.train.max_length)
    model = EncoderDecoder(
        dataclasses.replace(
            config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size, eos_token_id=eos,
            pad_token_id=pad, decoder_start_token_id=pad,
        )
    )  # fmt: skip
    init_weights(model, config.train.seed)
    return model, tokenizer


def _eos(model: EncoderDecoder) -> int:
    eos = model.config.eos_token_id
    found = eos[0] if isinstance(eos, list) else eos
    if found is None:
        raise UserError("the base model has no eos_token_id: nothing says where a written text ends")
    return found


def _ids(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
    return [np.array(record.ids, dtype=np.int64) for record in encode(tokenizer, texts, max_length)]


def _batch(rows: Sequence[list[np.ndarray]], numbers: np.ndarray, model: EncoderDecoder) -> Seq2SeqBatch:
    sources, targets = ([side[i] for i in numbers] for side in rows)
    c = model.config
    return seq2seq_batch(sources, targets, start_id=c.decoder_start_token_id, pad_id=c.pad_token_id or 0)


# --- evaluation and samples ---------------------------------------------------------------------------------


def _evaluation(
    model: nn.Module, batch: Callable[[int], Seq2SeqBatch], count: int, place: Place,
    measure: Callable[[], dict[str, float]],
) -> Callable[[], dict[str, float]]:  # fmt: skip
    """() -> loss over all held-out batches, divided over the ranks, and what `measure` finds."""

    def evaluate() -> dict[str, float]:
        sums = {"nll": 0.0, "count": 0.0}
        for index in range(place.part[0], count, place.part[1]):
            loss = seq2seq_lm(model, batch(index).to(place.device))
            sums = {"nll": sums["nll"] + float(loss.sum), "count": sums["count"] + float(loss.weight)}
        sums = place.ranks.sum(sums)
        return {"eval_loss": sums["nll"] / sums["count"]} | measure()

    return evaluate


def _measure(
    config: Text2TextConfig, model: EncoderDecoder, tokenizer: Tokenizer, samples: list[tuple[str, str]]
) -> dict[str, float]:
    """The metric over what the model writes (without beams) for the first held-out sources."""
    samples = samples[: config.eval_samples]
    if not samples:
        return {}
    sources, targets = (list(side) for side in zip(*samples))
    written = write(model, tokenizer, sources, config.train.max_length)
    measure = bleu if config.metric == "bleu" else exact_match
    return {f"eval_{config.metric}": measure(written, targets)}


def _samples(model: Any, tokenizer: Tokenizer, samples: list[tuple[str, str]], config: Text2TextConfig) -> list[Sample]:
    written = write(model, tokenizer, [source for source, _ in samples], config.train.max_length)
    return [{"prompt": source, "text": f" -> {text}"} for (source, _), text in zip(samples, written)]


@torch.no_grad()
def write(
    model: EncoderDecoder, tokenizer: Tokenizer, sources: Sequence[str], max_length: int, *, num_beams: int = 1,
    batch_size: int = 64,
) -> list[str]:  # fmt: skip
    """What the model writes for each source; those of like length together."""
    ids = _ids(tokenizer, sources, max_length)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        found = beam_search(model, [ids[i].tolist() for i in rows], num_beams=num_beams, max_new_tokens=max_length,
                            eos_ids=[_eos(model)])  # fmt: skip
        for i, best in zip(rows, found):
            texts[i] = tokenizer.decode(best[0].ids)
    return texts


def exact_match(written: Sequence[str], targets: Sequence[str]) -> float:
    """The share of texts that are the wanted ones, spaces at the ends aside."""
    return sum(one.strip() == other.strip() for one, other in zip(written, targets)) / len(targets)


def bleu(written: Sequence[str], targets: Sequence[str]) -> float:
    """BLEU of a corpus, from 0 to 100."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError("the metric bleu needs sacrebleu: pip install 'zero2hero[eval]'") from None
    return float(BLEU().corpus_score(list(written), [list(targets)]).score)
