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
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero2hero import machine
from zero2hero.config import (
    MAY_CHANGE,
    TOKENIZER_KINDS,
    DecoderConfig,
    PretrainConfig,
    TrainConfig,
    differences,
    fingerprint,
    to_dict,
    to_yaml,
)
from zero2hero.data.batches import Batch, Batches, evaluation_windows
from zero2hero.data.cache import Corpus, split_documents, tokenize_to_cache
from zero2hero.data.sources import Source, open_source
from zero2hero.data.streaming import Stream, StreamingBatches
from zero2hero.device import pick_device
from zero2hero.errors import UserError
from zero2hero.generate.fast import forget
from zero2hero.io import atomic_write, locked
from zero2hero.language_model import LanguageModel, save
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.models.families import family_to_write
from zero2hero.models.ngram import NGram
from zero2hero.nn.logprobs import nll_sum
from zero2hero.progress import TrainingProgress, track
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.activation_checkpointing import checkpoint_blocks
from zero2hero.train.diagnosis import Diagnosis, diagnose, verdict
from zero2hero.train.ema import WeightAverage
from zero2hero.train.loop import Trainer
from zero2hero.train.memory import PeakMemory, memory_explained, planned_run, warning
from zero2hero.train.memory_advice import free_memory
from zero2hero.train.memory_plan import predict
from zero2hero.train.noise_scale import NoiseScale
from zero2hero.train.objectives import Objective, causal_lm, with_balanced_experts
from zero2hero.train.parallel import ALONE, Ranks, join
from zero2hero.train.report import write_report
from zero2hero.train.sharding import parallelize, whole_model
from zero2hero.train.tracking import Tracker, describe_machine, read_metrics
from zero2hero.train.vitals import Vitals

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
    train = config.train
    with (
        join(pick_device(config.device), train.tp_size, train.ddp_timeout) as (ranks, device),
        locked(config.output_dir) if ranks.is_main else nullcontext(),
    ):
        return _pretrain(config, ranks, device)


def _pretrain(config: PretrainConfig, ranks: Ranks, device: torch.device) -> LanguageModel:
    output_dir = Path(config.output_dir)
    with ranks.first_on_each_machine():
        dtype, peak = choose_precision(config.precision, device)
        if ranks.is_main:
            _check_directory(output_dir, config)
        source = open_source(config.data, text_column=config.text_column, on_bad_record=config.on_bad_record,  # type: ignore[arg-type]
                             seed=config.train.seed)  # fmt: skip
        tokenizer = get_tokenizer(config, source)
        shape = fit_shape(config.model, tokenizer)
        family_to_write(shape)  # a shape that nobody else could open is refused before hours of work
        rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * ranks.data_size
        made_with = {"settings": fingerprint(config), "tokenizer": tokenizer.fingerprint, "rows per step": str(rows)}
        if config.streaming:  # it knows its shards by itself
            stream = Stream(
                source, tokenizer, config.validation_fraction, config.train.seed, skip=config.on_bad_record == "skip"
            )
            training, held_out = stream.sample()
        else:
            cache = tokenize_to_cache(source, tokenizer)
            made_with["data"] = cache.folder.name
            training, held_out = split_documents(cache, config.validation_fraction, config.train.seed)
        if ranks.is_main:
            _start_directory(output_dir, config, tokenizer)
    planned, free = planned_run(shape, config.train, dtype, device), free_memory(str(device))
    model = Decoder(shape)
    init_weights(model, config.train.seed)
    ranks.copy_from_main(model.parameters())
    if config.train.gradient_checkpointing:
        checkpoint_blocks(model, config.train.activation_offload)
        machine.keep_memory(False)
    parallelize(model, ranks, config.train, dtype).to(device)
    part = (ranks.data_rank, ranks.data_size)
    total_steps, data = (
        streamed_data(stream, config.train, device, *part)
        if config.streaming
        else causal_data(training, config.train, device, *part)
    )
    average = WeightAverage(config.train.ema_decay)
    objective: Objective = functools.partial(causal_lm, label_smoothing=config.train.label_smoothing_factor)
    if (moe := config.model.moe).num_experts:
        objective = with_balanced_experts(objective, moe.num_experts_per_tok, moe.router_aux_loss_coef)
    with TrainingProgress(total_steps) as progress:
        evaluate = evaluation(model, held_out, config.train, device, tokenizer, ranks)
        peak_memory = PeakMemory(device)
        trainer = Trainer(
            model, objective, data, config.train, total_steps, output_dir, dtype=dtype, evaluate=evaluate,
            progress=progress, peak_flops=peak * ranks.size, ranks=ranks,
            flops_per_token=lambda step: shape.training_flops_per_token(_phase_of(config.train, total_steps, step)[0]),
            watchers=[
                Vitals(), Diagnosis(output_dir, {"vocab_size": shape.vocab_size}, progress.print), peak_memory,
                *([average] if config.train.ema_decay else []),
                NoiseScale(),
            ],
            made_with=made_with, describe=lambda batch: what_is_in(batch, tokenizer),
        )  # fmt: skip
        resumed = trainer.resume() if config.resume else 0
        lm = LanguageModel(model, tokenizer, shape)
        _announce(progress, config, shape, training, held_out, dtype, resumed, total_steps, ranks)
        with _record(config, trainer, resumed) as tracker:
            trainer.tracker = tracker
            trainer.sample = average.around(trainer, sampler(lm, config, held_out, trainer, progress))
            trainer.evaluate = evaluate and average.around(trainer, evaluate)
            if tracker is not None and not resumed:
                tracker.record(0, machine=describe_machine())
                tracker.log(0, ngram_baseline(training, held_out, tokenizer.vocab_size))
            divided = trainer.masters.divided  # the plan is for one device
            if not divided and (words := warning(planned, free)):
                progress.print(words)
            peak_memory.begin(trainer.masters)
            with memory_explained(planned, free):
                trainer.train()
    if not divided:
        progress.print(peak_memory.verdict(predict(planned).peak))
    if ranks.is_main:
        progress.print(verdict(diagnose(read_metrics(output_dir), {"vocab_size": shape.vocab_size})))
    average.keep(trainer)
    lm = _whole(lm, trainer)
    if ranks.is_main:
        save(lm, output_dir)
        write_report(output_dir)
    return lm


def _record(config: PretrainConfig, trainer: Trainer, resumed: int) -> AbstractContextManager[Tracker | None]:
    """The run's tracker, on the main rank."""
    if not trainer.ranks.is_main:
        return nullcontext()
    others = [name for name in config.report_to if name != "tensorboard"]
    return Tracker(
        config.output_dir, "tensorboard" in config.report_to, resumed or None, others, trainer.tracker_state
    )  # fmt: skip


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, float]:
    """The dtype to compute in, and this machine's measured matmul peak in it (FLOP/s; 0 when not measured)."""
    if device.type != "cpu":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        chosen = name if name != "auto" else "bf16" if bf16 else "fp32"
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen], 0.0
    found = machine.prepare()
    if name == "fp16":
        return torch.float16, 0.0
    bf16 = name == "bf16" or (name == "auto" and found.bf16_pays)
    return (torch.bfloat16, found.bf16_flops) if bf16 else (torch.float32, found.fp32_flops)


def get_tokenizer(config: PretrainConfig, source: Source) -> Tokenizer:
    """The tokenizer that the configuration names, or one trained on the run's own text.

    On resume it is the one that the run started with.
    """
    c, saved = config.tokenizer, Path(config.output_dir) / "tokenizer.json"
    if config.resume and saved.exists():
        return Tokenizer.from_pretrained(config.output_dir)
    if c.kind not in TOKENIZER_KINDS:
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
        return {"eval_loss": loss, "eval_bits_per_byte": total / math.log(2) / max(1, num_bytes)}

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


def sampler(
    lm: LanguageModel, config: PretrainConfig, held_out: Corpus, trainer: Trainer, progress: TrainingProgress
) -> Callable[[int], None]:
    """step -> let the model write from the run's prompts, for the record and for the person who watches."""
    prompts = config.prompts or held_out_prompts(held_out, lm.tokenizer)

    def sample(step: int) -> None:
        writer = _whole(lm, trainer) if trainer.masters.divided else lm
        tracker = trainer.tracker
        if tracker is None:
            return
        texts = writer.generate(
            prompts, max_new_tokens=min(120, config.train.max_length), temperature=0.7, top_p=0.95,
            seed=config.train.seed, return_full_text=False,
        )  # fmt: skip
        tracker.samples(step, [{"prompt": p, "text": t} for p, t in zip(prompts, texts)])
        progress.print(f"\nstep {step} writes:  {prompts[0]}{texts[0]}\n")
        forget(lm.model)  # the weights are going to change, and their copy would take memory until then

    return sample


def held_out_prompts(corpus: Corpus, tokenizer: Tokenizer, count: int = 3) -> list[str]:
    """The first words of a few documents that training never sees."""
    prompts = []
    for i in range(min(count, corpus.num_documents)):
        words = tokenizer.decode(corpus.document(i * corpus.num_documents // count).tolist()[:100]).split(" ")
        prompts.append(" ".join(words[:PROMPT_WORDS]))
    return [p for p in prompts if p.strip()] or ["The"]


# --- the run's directory ------------------------------------------------------------------------------------


def _check_directory(output_dir: Path, config: PretrainConfig) -> None:
    """Refuse to overwrite a finished run in silence, and to resume with other settings."""
    saved = output_dir / "run.yaml"
    if not config.resume:
        if (output_dir / "checkpoints").is_dir() and any((output_dir / "checkpoints").iterdir()):
            raise UserError(
                f"{output_dir} already holds a run. Add --resume to continue it, choose another --output_dir, "
                f"or delete the folder."
            )
        return
    if not saved.exists():
        raise UserError(f"nothing to resume: {saved} does not exist. Start the run without --resume.")
    import yaml

    try:
        before, after = yaml.safe_load(saved.read_text()), to_dict(config)
        changed = [d for d in differences(before, after) if d.split(":")[0].split(".")[-1] not in MAY_CHANGE]
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{saved} is damaged ({why}): put a copy back, or start a new run elsewhere") from None
    if changed:
        raise UserError(
            "--resume continues a run with the settings it began with, but these have changed: "
            + "; ".join(changed)
            + f". Set them back, or start a new run in another --output_dir. ({saved})"  # fmt: skip
        )


def _start_directory(output_dir: Path, config: PretrainConfig, tokenizer: Tokenizer) -> None:
    atomic_write(output_dir / "run.yaml", to_yaml(dataclasses.replace(config, resume=False)))
    tokenizer.save_pretrained(output_dir, model_max_length=config.model.max_position_embeddings)


def _announce(progress, config, shape, training, held_out, dtype, resumed: int, total_steps: int, ranks: Ranks) -> None:
    from zero2hero.progress import human_count

    weights = shape.num_matrix_parameters
    words = f"resuming at step {resumed} of {total_steps}" if resumed else f"{total_steps} steps"
    amount = "a stream" if config.streaming else f"{human_count(training.num_tokens)} tokens"
    progress.print(
        f"{amount} to learn from, {human_count(held_out.num_tokens)} tokens held out; "
        f"vocabulary {shape.vocab_size}; {human_count(weights)} matrix weights; "
        f"{str(dtype).removeprefix('torch.')}; {words}" + (f"; {ranks.size} ranks" if ranks.size > 1 else "")
    )


def _whole(lm: LanguageModel, trainer: Trainer) -> LanguageModel:
    """The model with its fp32 weights, gathered from all ranks, which must all call this."""
    return LanguageModel(whole_model(lm.model.config, trainer.masters.gathered()), lm.tokenizer)
