"""Pretraining, from raw text to a model directory: what `zero2hero pretrain` runs.

    text  ->  tokenizer  ->  tokens on disk  ->  model  ->  the loop  ->  a Hugging Face directory and a report

Each arrow is a function of its own elsewhere; this file only puts them in a row. The objective is the oldest of
language modelling: predict the next token (Shannon 1948; Radford et al. 2018).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zero2hero.config import TOKENIZER_KINDS, DecoderConfig, PretrainConfig, TrainConfig
from zero2hero.data.batches import Batch, Batches, evaluation_windows
from zero2hero.data.cache import Corpus, split_documents, tokenize_to_cache
from zero2hero.data.sources import open_source
from zero2hero.data.streaming import Stream, StreamingBatches
from zero2hero.errors import UserError, did_you_mean
from zero2hero.generate.fast import forget
from zero2hero.language_model import LanguageModel, save
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.models.families import family_to_write
from zero2hero.models.ngram import NGram
from zero2hero.nn.logprobs import nll_sum
from zero2hero.progress import human_count, track
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.memory import planned_run
from zero2hero.train.objectives import Objective, causal_lm, with_balanced_experts
from zero2hero.train.parallel import ALONE, Ranks
from zero2hero.train.run import Place, Sample, Task, run

TOKENIZER_CHARACTERS = 20_000_000  # of text to train a tokenizer on; more changes its merges no further
NGRAM_ORDER = 3
NGRAM_TOKENS = 3_000_000
PROMPT_WORDS = 8
TOKENS_SHOWN = 60  # of each row whose loss is not finite


def pretrain(config: PretrainConfig) -> LanguageModel:
    """Train a model from scratch and leave it in `config.output_dir`, which is this run's alone for that time.

    Raises:
        UserError: anything in the data or settings that a person can mend.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    model = run(config, functools.partial(_begin, config))
    return LanguageModel(model, Tokenizer.from_pretrained(config.output_dir))  # type: ignore[arg-type]


def _begin(config: PretrainConfig, place: Place) -> Task:
    train, device = config.train, place.device
    with place.ranks.first_on_each_machine():
        source = open_source(config.data, text_column=config.text_column, on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
                             seed=train.seed)  # fmt: skip
        tokenizer = get_tokenizer(config, source)
        shape = fit_shape(config.model, tokenizer)
        family_to_write(shape)  # a shape that nobody else could open is refused before hours of work
        made_with = {"tokenizer": tokenizer.fingerprint}
        if config.streaming:  # it knows its shards by itself
            stream = Stream(
                source, tokenizer, config.validation_fraction, train.seed, skip=config.on_bad_record == "skip"
            )
            training, held_out = stream.sample()
        else:
            cache = tokenize_to_cache(source, tokenizer)
            made_with["data"] = cache.folder.name
            training, held_out = split_documents(cache, config.validation_fraction, train.seed)
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir, model_max_length=config.model.max_position_embeddings)
    model = Decoder(shape)
    init_weights(model, train.seed)
    total_steps, data = (
        streamed_data(stream, train, device, *place.part)
        if config.streaming
        else causal_data(training, train, device, *place.part)
    )
    amount = "a stream" if config.streaming else f"{human_count(training.num_tokens)} tokens"
    return Task(
        model, language_objective(shape, train.label_smoothing_factor), total_steps, data,
        save=lambda model: save(LanguageModel(model, tokenizer), config.output_dir),  # type: ignore[arg-type]
        announce=f"{amount} to learn from, {human_count(held_out.num_tokens)} tokens held out; vocabulary "
        f"{shape.vocab_size}; {human_count(shape.num_matrix_parameters)} matrix weights",
        evaluate=evaluation(model, held_out, train, device, tokenizer, place.ranks),
        sample=sampler(tokenizer, config.prompts or held_out_prompts(held_out, tokenizer), train),
        baseline=lambda: ngram_baseline(training, held_out, tokenizer.vocab_size),
        made_with=made_with,
        describe=lambda batch: what_is_in(batch, tokenizer),
        facts={"vocab_size": shape.vocab_size},
        flops_per_token=lambda step: shape.training_flops_per_token(_phase_of(train, total_steps, step)[0]),
        planned=planned_run(shape, train, place.dtype, device),
    )  # fmt: skip


def language_objective(shape: DecoderConfig, label_smoothing: float = 0.0) -> Objective:
    """Next-token prediction, with the balance of experts where there are some."""
    objective: Objective = functools.partial(causal_lm, label_smoothing=label_smoothing)
    if (moe := shape.moe).num_experts:
        return with_balanced_experts(objective, moe.num_experts_per_tok, moe.router_aux_loss_coef)
    return objective


def get_tokenizer(config: Any, source: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, or one trained on the run's own text.

    On resume it is the one that the run started with.
    """
    c, saved = config.tokenizer, Path(config.output_dir) / "tokenizer.json"
    if config.resume and saved.exists():
        return Tokenizer.from_pretrained(config.output_dir)
    if c.kind not in TOKENIZER_KINDS:
        near = did_you_mean(c.kind, TOKENIZER_KINDS)
        if near and "/" not in c.kind and not Path(c.kind).exists():
            raise UserError(f"tokenizer.kind is one of {', '.join(TOKENIZER_KINDS)}, a folder or a hub id.{near}")
        return Tokenizer.from_pretrained(c.kind)
    texts = track(_up_to(source, TOKENIZER_CHARACTERS), "reading text for the tokenizer")
    return Tokenizer.train(texts, vocab_size=c.vocab_size, pattern=c.pattern, kind=c.kind)


def _up_to(texts: Iterable[str], characters: int) -> Iterable[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters < 0:
            return


def fit_shape(shape: DecoderConfig, tokenizer: Tokenizer) -> DecoderConfig:
    """The shape with the tokenizer's vocabulary and special tokens."""
    if shape.vocab_size and shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {shape.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} tokens; "
            "leave it out to take the tokenizer's"
        )
    return dataclasses.replace(
        shape,
        vocab_size=shape.vocab_size or tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).derived()


# --- data ---------------------------------------------------------------------------------------------------


def causal_data(
    corpus: Corpus, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[int, Callable[[int], list[Batch]]]:
    """(number of optimizer steps, step -> this rank's micro-batches of it on `device`).

    The micro-batches of all ranks are numbered through; rank r takes every `world_size`-th from r on. So the windows
    of a step, and their order over the run, depend on how many it has, not on who takes them.
    """
    together = config.gradient_accumulation_steps * world_size  # micro-batches of a step
    rows = config.per_device_train_batch_size * together
    full = Batches(
        corpus, max_length=config.max_length, batch_size=config.per_device_train_batch_size,
        seed=config.seed, document_mask=config.document_mask,
    )  # fmt: skip
    total = config.max_steps or math.ceil(config.num_train_epochs * full.windows_per_epoch / rows)
    phases: dict[int, Batches] = {}

    def micro_batches(step: int) -> list[Batch]:
        length, begin = _phase_of(config, total, step)
        if length not in phases:
            size = config.per_device_train_batch_size * config.max_length // length
            phases[length] = full.with_length(length, size, start=begin * together)
        numbers = range(step * together + rank, (step + 1) * together, world_size)
        return [_on_device(phases[length][number], device) for number in numbers]

    return total, micro_batches


def streamed_data(
    stream: Stream, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[int, StreamingBatches]:
    """The same from a stream, for one rank of several."""
    batches = StreamingBatches(
        stream, max_length=config.max_length, batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps, seed=config.seed, document_mask=config.document_mask,
        rank=rank, world_size=world_size,
        length_of=lambda step: _phase_of(config, config.max_steps, step)[0],
        prepare=lambda batch: _on_device(batch, device),
    )  # fmt: skip
    return config.max_steps, batches


def _phase_of(config: TrainConfig, total: int, step: int) -> tuple[int, int]:
    """(row length, first step) of the phase of the length schedule that `step` lies in."""
    begin, length = 0, config.max_length // 2 ** len(config.length_schedule)
    for end in itertools.accumulate(config.length_schedule):
        if step < round(end * total):
            break
        begin, length = round(end * total), length * 2
    return length, begin


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """As tensors; rows that hold one document each need no document mask."""
    packed = batch.crosses_documents
    moved = batch.to(device)
    return moved if packed else dataclasses.replace(moved, document_ids_BT=None)


def what_is_in(batch: Batch, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """For each row, the documents (their numbers in the training corpus) and how its text begins."""
    records = batch.records if batch.records is not None else [[]] * len(batch.ids_BT)
    documents = [list(dict.fromkeys(np.asarray(row).tolist())) for row in records]
    texts = [tokenizer.decode(row[:TOKENS_SHOWN].tolist()) for row in batch.ids_BT]
    return [{"documents": d, "text": t} for d, t in zip(documents, texts)]


# --- evaluation and samples ---------------------------------------------------------------------------------


def evaluation(
    model: Decoder, corpus: Corpus, config: TrainConfig, device: torch.device, tokenizer: Tokenizer,
    ranks: Ranks = ALONE,
) -> Callable[[], dict[str, float]] | None:  # fmt: skip
    """() -> loss over the whole validation split, by the fixed protocol of `EvaluationWindows`; divided over ranks."""
    if not corpus.num_tokens:
        return None
    windows = evaluation_windows(corpus, config.max_length, 2 * config.per_device_train_batch_size)
    text = (tokenizer.decode(corpus.document(i).tolist()) for i in range(corpus.num_documents))
    num_bytes = sum(len(t.encode("utf-8", "replace")) for t in text)

    def evaluate() -> dict[str, float]:
        total, count = 0.0, 0.0
        for index in range(ranks.data_rank, len(windows) + ranks.data_rank, ranks.data_size):
            # every rank makes as many passes as the others, for they may have to gather weights for each other
            batch = _on_device(windows[min(index, len(windows) - 1)], device)
            positions = batch.positions_BT if batch.document_ids_BT is not None else None
            hidden = model(batch.ids_BT, positions=positions, document_ids=batch.document_ids_BT)
            nll, weight = nll_sum(hidden, model.head_weight, batch.targets_BT)
            if index < len(windows):
                total, count = total + float(nll), count + float(weight)
        sums = ranks.sum({"nll": total, "count": count})
        loss, total = sums["nll"] / sums["count"], sums["nll"]
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 50)),
            "eval_bits_per_byte": total / math.log(2) / max(1, num_bytes),
        }

    return evaluate


def ngram_baseline(training: Corpus, held_out: Corpus, vocab_size: int) -> dict[str, float]:
    """What an n-gram model trained on the same text reaches: the line that a network must beat."""
    if not held_out.num_tokens:
        return {}
    enough = int(training.spans[:, 1].searchsorted(training.spans[0, 0] + NGRAM_TOKENS)) + 1
    spans = training.spans[:enough]
    spans = spans.copy()
    spans[:, 1] = spans[:, 1].clip(max=spans[:, 0] + NGRAM_TOKENS)
    model = NGram(NGRAM_ORDER, vocab_size).fit(training.tokens, spans)
    return {"ngram_nll": model.mean_nll(held_out.tokens, held_out.spans), "ngram_order": NGRAM_ORDER}


def sampler(tokenizer: Tokenizer, prompts: list[str], train: TrainConfig) -> Callable[[nn.Module], list[Sample]]:
    """model -> what it writes behind each of the prompts."""

    def sample(model: nn.Module) -> list[Sample]:
        texts = LanguageModel(model, tokenizer).generate(  # type: ignore[arg-type]
            prompts, max_new_tokens=min(120, train.max_length), temperature=0.7, top_p=0.95,
            seed=train.seed, return_full_text=False,
        )  # fmt: skip
        forget(model)  # type: ignore[arg-type]  # the weights are going to change, and their copy would take memory until then
        return [{"prompt": p, "text": t} for p, t in zip(prompts, texts)]

    return sample


def held_out_prompts(corpus: Corpus, tokenizer: Tokenizer, count: int = 3) -> list[str]:
    """The first words of a few documents that training never sees."""
    prompts = []
    for i in range(min(count, corpus.num_documents)):
        words = tokenizer.decode(corpus.document(i * corpus.num_documents // count).tolist()[:100]).split(" ")
        prompts.append(" ".join(words[:PROMPT_WORDS]))
    return [p for p in prompts if p.strip()] or ["The"]
