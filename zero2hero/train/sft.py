"""Supervised fine-tuning: a model learns to do what demonstrations show. What `zero2hero sft` runs.

    records  ->  rendered by the chat template, masked  ->  packed rows  ->  an adapter (or every weight)  ->  the loop

The objective is pretraining's, next-token prediction; what differs is which tokens count (data/examples.py): those of
the assistant, its end-of-turn token included (Ouyang et al. 2022, arXiv 2203.02155, section 3). What is trained is an
adapter beside a model that stands still (LoRA: Hu et al. 2021, arXiv 2106.09685; QLoRA, with the model in 4 bits:
Dettmers et al. 2023, arXiv 2305.14314), or every weight.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zero2hero.config import DecoderConfig
from zero2hero.data.cache import split_documents, tokenize_to_cache
from zero2hero.data.conversations import Record, read_records
from zero2hero.data.examples import Encoded, encode_records
from zero2hero.data.packed import PackedBatches, evaluation_batches
from zero2hero.data.sources import open_source
from zero2hero.data.worlds.dialogues import same_answer
from zero2hero.errors import UserError
from zero2hero.fetch import find_folder
from zero2hero.io import atomic_write
from zero2hero.language_model import LanguageModel, generation_config, load, save
from zero2hero.models.checkpoint import from_pretrained
from zero2hero.models.decoder import Decoder
from zero2hero.progress import human_count
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template
from zero2hero.train.memory import planned_run
from zero2hero.train.memory_plan import Run as PlannedRun
from zero2hero.train.objectives import causal_lm
from zero2hero.train.pretrain import evaluation, language_objective
from zero2hero.train.run import Place, Sample, Task, micro_batches, run, steps_of
from zero2hero.tune import add_lora, base_folder, is_adapter, load_adapter, merge, save_adapter
from zero2hero.tuning_configs import SftConfig, TuneConfig

Talker = Callable[[Any], LanguageModel]  # model -> it with its tokenizer, ready to answer

SAMPLES = 3
RETAINED_DOCUMENTS = 100  # of text, whose loss shows what is forgotten
ANSWER_TOKENS = 128  # at most, of an answer that is shown


def sft(config: SftConfig) -> LanguageModel:
    """Fine-tune a model; the adapter, or the model, is left in `config.output_dir`.

    Raises:
        UserError: anything in the data or settings that a person can mend.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    run(config, functools.partial(_begin, config))
    return load(config.output_dir)


def _begin(config: SftConfig, place: Place) -> Task:
    train, ranks = config.train, place.ranks
    folder = find_folder(config.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    set_chat_template(tokenizer, config.chat_template)
    model = base_model(config, folder, place)
    max_length = min(train.max_length, model.config.max_position_embeddings)
    learn, held_out = split_records(config)
    encode = functools.partial(
        encode_records, tokenizer=tokenizer, max_length=max_length, assistant_only_loss=config.assistant_only_loss,
        completion_only_loss=config.completion_only_loss,
    )  # fmt: skip
    training, validation = encode(learn), encode(held_out)
    shape = model.config
    adapted = adapt(model, config)
    batches = PackedBatches(
        training.examples, max_length, train.per_device_train_batch_size, train.seed, packing=config.packing
    )
    total_steps = steps_of(config, batches.rows_per_epoch, ranks.data_size)
    talker = functools.partial(
        LanguageModel, tokenizer=tokenizer, generation_config={"eos_token_id": end_ids(tokenizer, training)}
    )
    evaluate = tuned_evaluation(adapted, config, talker, validation, held_out, max_length, place)
    products = 1 if config.method == "full" else 2 / 3  # a frozen matrix has no gradient
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Task(
        adapted, language_objective(shape, train.label_smoothing_factor), total_steps,
        micro_batches(config, place, batches.__getitem__),
        save=lambda model: save_tuned(talker(model), config),  # type: ignore[arg-type]
        announce=announce(config, training, len(validation.examples), trained, max_length),
        evaluate=evaluate,
        sample=chat_sampler(talker, held_out, train.seed),
        baseline=evaluate,
        made_with={"tokenizer": tokenizer.fingerprint, "base": str(folder)},
        facts={"vocab_size": shape.vocab_size},
        flops_per_token=lambda _: shape.training_flops_per_token(max_length) * products,
        planned=planned_memory(config, shape, max_length, place),
    )  # fmt: skip


def planned_memory(config: TuneConfig, shape: DecoderConfig, max_length: int, place: Place) -> PlannedRun | None:
    """The run as its memory is predicted; None where it is not one of those that `plan finetune` knows."""
    lora, train = config.lora, dataclasses.replace(config.train, max_length=max_length, length_schedule=[])
    usual = lora.target_modules == "all-linear" and not (lora.rank_pattern or lora.exclude_modules or lora.use_dora)
    known = (not config.freeze) if config.method == "full" else usual
    if shape.moe.num_experts or not known:
        return None
    return planned_run(shape, train, place.dtype, place.device, config.method, lora.r)


# --- the model ----------------------------------------------------------------------------------------------


def base_model(config: TuneConfig, folder: Any, place: Place) -> Decoder:
    """The model to tune: in fp32 to train every weight; else as it computes, in 4 bits where asked for.

    What an earlier tuning left as an adapter becomes part of the weights, where these are trained.
    """
    dtype = torch.float32 if config.method == "full" else place.dtype
    if is_adapter(folder) and config.method != "full":
        raise UserError(
            f"{config.model} is an adapter, and an adapter on it could not be loaded without it. Train every weight "
            f"(--method full), or make a model of it first: zero2hero merge {config.model} --output_dir runs/merged"
        )
    base = base_folder(folder) if is_adapter(folder) else folder
    model: Any = from_pretrained(base, dtype=dtype, load_in_4bit=config.method == "qlora")
    if is_adapter(folder):
        model = merge(load_adapter(model, folder))
    if not isinstance(model, Decoder):
        raise UserError(
            f"{config.model} is a {type(model).__name__}, and what is tuned here are decoders. `zero2hero --help` "
            "lists what trains others: train text-classification, train text2text-generation, ..."
        )
    return model


def adapt(model: Decoder, config: TuneConfig) -> nn.Module:
    """The model as it is trained: with an adapter, or with some of its weights frozen."""
    if config.method != "full":
        return add_lora(model, config.lora, seed=config.train.seed)
    for prefix in config.freeze:
        found = [p for name, p in model.named_parameters() if name == prefix or name.startswith(f"{prefix}.")]
        if not found:
            names = sorted({name.rpartition(".")[0] for name, _ in model.named_parameters()})
            raise UserError(f"freeze: no weights begin with '{prefix}'. There are {', '.join(names[:12])}, ...")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("freeze leaves nothing to train")
    return model


def save_tuned(lm: LanguageModel, config: TuneConfig) -> None:
    """The whole model; or the adapter in PEFT's format, with the tokenizer and what ends an answer beside it."""
    if config.method == "full":
        return save(lm, config.output_dir)
    save_adapter(lm.model, config.output_dir, base_model_name_or_path=str(config.model))
    lm.tokenizer.save_pretrained(config.output_dir, model_max_length=lm.model.config.max_position_embeddings)
    settings = json.dumps(generation_config(lm), indent=2) + "\n"
    return atomic_write(Path(config.output_dir) / "generation_config.json", settings)


# --- data ---------------------------------------------------------------------------------------------------


def split_records(config: Any) -> tuple[list[Record], list[Record]]:
    """(records to learn, records held out): other data, the built-in data's own validation, or a random part.

    `config` has data, eval_data, validation_fraction, on_bad_record and train.seed.
    """
    read = functools.partial(read_records, on_bad_record=config.on_bad_record)
    records = list(read(config.data))
    if config.eval_data:
        return records, list(read(config.eval_data))
    if (made := open_source(config.data).validation) is not None:
        return records, list(read(made))
    order = np.random.default_rng(config.train.seed).permutation(len(records))
    count = max(1, round(config.validation_fraction * len(records)))
    if count >= len(records):
        raise UserError(f"the data holds {len(records)} record: too few to hold one out. Give more, or --eval_data")
    return [records[i] for i in sorted(order[count:])], [records[i] for i in sorted(order[:count])]


def announce(config: SftConfig, training: Encoded, held_out: int, trained: int, max_length: int) -> str:
    """What is learned from what, in one line, and what was cut."""
    examples = training.examples
    tokens = sum(int((e.weights[1:] > 0).sum()) for e in examples)
    cut = training.report(max_length)
    return (
        f"{len(examples)} examples with {human_count(tokens)} tokens to learn, {held_out} held out; {config.method} "
        f"trains {human_count(trained)} weights" + (f"; {cut}" if cut else "")
    )


def end_ids(tokenizer: Tokenizer, training: Encoded) -> list[int]:
    """The tokens that end an answer: the end-of-text token, and the end-of-turn token that the examples teach."""
    last = {int(e.ids[np.flatnonzero(e.weights)[-1]]) for e in training.examples} & set(tokenizer.all_special_ids)
    return sorted(last | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


# --- evaluation and samples ---------------------------------------------------------------------------------


def tuned_evaluation(
    model: nn.Module, config: SftConfig, talker: Talker, validation: Encoded, held_out: Sequence[Record],
    max_length: int, place: Place,
) -> Callable[[], dict[str, float]]:  # fmt: skip
    """() -> loss over the held-out records' trained tokens; how many answers are right; what else is forgotten."""
    batches = evaluation_batches(validation.examples, max_length, config.train.per_device_train_batch_size)
    retained = retained_loss(model, config, talker(model).tokenizer, place)
    asked = [r for r in held_out if r.kind == "conversation" and r.messages[-1]["role"] == "assistant"]
    asked = asked[: config.exact_match]

    def evaluate() -> dict[str, float]:
        total = weight = 0.0
        for index in range(place.ranks.data_rank, len(batches) + place.ranks.data_rank, place.ranks.data_size):
            # every rank makes as many passes as the others, for they may have to gather weights for each other
            part = causal_lm(model, batches[min(index, len(batches) - 1)].to(place.device))
            if index < len(batches):
                total, weight = total + float(part.sum), weight + float(part.weight)
        sums = place.ranks.sum({"loss": total, "weight": weight})
        loss = sums["loss"] / sums["weight"]
        found = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 50))}
        if asked:
            found["eval_exact_match"] = exact_match(talker(model), asked)
        return found | (retained() if retained else {})

    return evaluate


def retained_loss(
    model: nn.Module, config: SftConfig, tokenizer: Tokenizer, place: Place
) -> Callable[[], dict[str, float]] | None:
    """() -> loss on the text of `retain_data`, for which the model is not trained here."""
    if not config.retain_data:
        return None
    source = open_source(config.retain_data)
    corpus = tokenize_to_cache(source.validation or source, tokenizer)
    _, held_out = split_documents(corpus, RETAINED_DOCUMENTS / max(RETAINED_DOCUMENTS + 1, corpus.num_documents), 0)
    loss = evaluation(model, held_out, config.train, place.device, tokenizer, place.ranks)  # type: ignore[arg-type]
    return (lambda: {"eval_retain_loss": loss()["eval_loss"]}) if loss else None


def exact_match(lm: LanguageModel, records: Sequence[Record]) -> float:
    """The share of records whose last answer the model gives word for word; case and a full stop do not matter."""
    prompts, right = (
        [lm.prompt_ids(r.messages[:-1]) for r in records],
        [str(r.messages[-1]["content"]) for r in records],
    )
    longest = max(len(lm.tokenizer.encode(text)) for text in right) + 4  # what is longer than every answer is none
    answers = lm.continuations(prompts, max_new_tokens=longest, temperature=0.0)
    return float(np.mean([same_answer(answer, text) for answer, text in zip(answers, right)]))


def chat_sampler(talker: Talker, held_out: Sequence[Record], seed: int) -> Callable[[nn.Module], list[Sample]]:
    """model -> its answers to the first questions of a few held-out records."""
    chosen = [held_out[i * len(held_out) // SAMPLES] for i in range(min(SAMPLES, len(held_out)))]
    prompts = [prompt for record in chosen if (prompt := _question(record))]

    def sample(model: nn.Module) -> list[Sample]:
        lm = talker(model)
        ids = [lm.prompt_ids(prompt) for prompt in prompts]
        texts = lm.continuations(ids, max_new_tokens=ANSWER_TOKENS, temperature=0.7, top_p=0.95, seed=seed)
        shown = [p if isinstance(p, str) else str(p[-1]["content"]) for p in prompts]
        return [{"prompt": f"{p}\n", "text": t} for p, t in zip(shown, texts)]

    return sample


def _question(record: Record) -> Any:
    """What comes before the first answer: messages, or a text."""
    if record.kind == "conversation":
        first = next(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        return record.messages[:first]
    return record.prompt or " ".join(record.text.split()[:8])
