"""Distillation: a small model learns to predict what a large one predicts. What `zero2hero distill` runs.

    records -> packed rows -> the teacher's and the student's predictions at each token of the answers -> their distance

A label says which token came; a teacher says how likely each one was, which is much more to learn from (Hinton et al.
2015, arXiv 1503.02531). On texts of others the student never learns to get out of its own mistakes. So with `lmbda`
above 0 that share of the batches are answers that it wrote itself to the same prompts, and the teacher says what would
have been better at each token (on-policy distillation, GKD: Agarwal et al. 2023, arXiv 2306.13649). The distances are
in nn/divergence.py; no tensor of all logits is ever made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from zero2hero.align.rollout import Sampler, training_batch
from zero2hero.alignment_configs import DistillConfig
from zero2hero.data.batches import IGNORE
from zero2hero.data.examples import Example, encode_records
from zero2hero.data.packed import PackedBatches, evaluation_batches
from zero2hero.errors import UserError
from zero2hero.fetch import find_folder
from zero2hero.language_model import LanguageModel, load
from zero2hero.nn.divergence import divergence_sum
from zero2hero.nn.logprobs import token_logprobs
from zero2hero.progress import human_count
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template
from zero2hero.train.objectives import Loss, Objective
from zero2hero.train.run import Place, Task, micro_batches, run, steps_of
from zero2hero.train.sft import adapt, base_model, chat_sampler, end_ids, save_tuned, split_records


def distill(config: DistillConfig) -> LanguageModel:
    """Distil a model; the adapter, or the model, is left in `config.output_dir`.

    Raises:
        UserError: anything in the data or settings that a person can mend.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    run(config, functools.partial(_begin, config))
    return load(config.output_dir)


def _begin(config: DistillConfig, place: Place) -> Task:
    train = config.train
    folder = find_folder(config.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    set_chat_template(tokenizer, config.chat_template)
    student = base_model(config, folder, place)
    teacher = load(config.teacher, place.device, place.dtype)
    check_vocabulary(tokenizer, teacher.tokenizer)
    contexts = [model.config.max_position_embeddings for model in (student, teacher.model)]
    max_length = min(train.max_length, *contexts)
    learn, held_out = split_records(config)
    training, validation = (encode_records(records, tokenizer, max_length=max_length) for records in (learn, held_out))
    shape, adapted = student.config, adapt(student, config).to(place.device)
    batches = PackedBatches(training.examples, max_length, train.per_device_train_batch_size, train.seed)
    ends = end_ids(tokenizer, training)
    talker = functools.partial(LanguageModel, tokenizer=tokenizer, generation_config={"eos_token_id": ends})
    objective = distillation(teacher.model.requires_grad_(False), config)
    data = micro_batches(config, place, batches.__getitem__)
    if config.lmbda:
        if place.ranks.size > 1:
            raise UserError("with lmbda the student samples and learns in one process: start it without torchrun")
        data = on_policy(adapted, training.examples, tokenizer, ends, max_length, config, data)
    held = evaluation_batches(validation.examples, max_length, train.per_device_train_batch_size)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    cut, size = training.report(max_length), sum(p.numel() for p in teacher.model.parameters())
    evaluate = functools.partial(evaluation, adapted, objective, held, place)
    return Task(
        adapted, objective, steps_of(config, batches.rows_per_epoch, place.ranks.data_size), data,
        save=lambda model: save_tuned(talker(model), config),  # type: ignore[arg-type]
        announce=f"{len(training.examples)} examples, {len(validation.examples)} held out; {config.method} trains "
        f"{human_count(trained)} weights after a teacher of {human_count(size)}" + (f"; {cut}" if cut else ""),
        evaluate=evaluate,
        sample=chat_sampler(talker, held_out, train.seed),
        baseline=evaluate,
        made_with={"tokenizer": tokenizer.fingerprint, "base": str(folder), "teacher": str(config.teacher)},
        flops_per_token=lambda _: shape.training_flops_per_token(max_length),
    )  # fmt: skip


def check_vocabulary(student: Tokenizer, teacher: Tokenizer) -> None:
    """A number must stand for the same token in both, or their predictions cannot be compared.

    Raises:
        UserError: it names the first that does not.
    """
    ours, others = student.raw.get_vocab(), teacher.raw.get_vocab()
    if ours == others:
        return
    strange = sorted((t for t in ours if others.get(t) != ours[t]), key=ours.__getitem__)
    what = f"the teacher has {len(others) - len(ours)} tokens more"
    if strange:
        there = others.get(strange[0], "none")
        what = f"'{strange[0]}' is token {ours[strange[0]]} of the student and {there} of the teacher"
    raise UserError(
        f"teacher and student must share their tokenizer, and {what}. Distil by texts instead: let the teacher write "
        "them (zero2hero best-of-n --n 1) and learn them (zero2hero sft)"
    )


def distillation(teacher: Any, config: DistillConfig) -> Objective:
    """The distance between student and teacher at each token that has a target; nats per token.

    `batch`: as `causal_lm`'s. Metrics: `nll` of the targets, for the student.
    """

    def objective(model: nn.Module, batch: Any) -> Loss:
        positions = batch.positions_BT if batch.document_ids_BT is not None else None
        chosen = batch.targets_BT != IGNORE
        with torch.no_grad():
            theirs = teacher(batch.ids_BT, positions=positions, document_ids=batch.document_ids_BT)[chosen]
        ours = model(batch.ids_BT, positions=positions, document_ids=batch.document_ids_BT)[chosen]
        weight: Any = model.head_weight
        known = min(len(weight), len(teacher.head_weight))  # rows beyond the tokenizer's may pad one of them
        total = divergence_sum(
            ours, weight[:known], theirs, teacher.head_weight[:known], beta=config.beta, temperature=config.temperature
        )
        with torch.no_grad():
            nll = -token_logprobs(ours, weight, batch.targets_BT[chosen]).sum()
        return Loss(total, chosen.sum().float(), {"nll": nll})

    return objective


def on_policy(
    model: Any, examples: Sequence[Example], tokenizer: Tokenizer, ends: Sequence[int], max_length: int,
    config: DistillConfig, data: Callable[[int], list[Any]],
) -> Callable[[int], list[Any]]:  # fmt: skip
    """step -> its micro-batches, of which a share of `lmbda` are the student's own answers to the data's prompts.

    They are functions of the step and of the weights at that step, so a run that is resumed makes the same.
    """
    sampler = Sampler(
        model, tokenizer, ends, max_completion_length=config.max_completion_length, seed=config.train.seed
    )
    prompts = [e.ids[: int(np.flatnonzero(e.weights[1:])[0]) + 1].tolist() for e in examples]
    prompts = [prompt for prompt in prompts if len(prompt) < max_length]
    device = next(model.parameters()).device

    def of_step(step: int) -> list[Any]:
        batches = data(step)
        for i in range(len(batches)):
            rng = np.random.default_rng([config.train.seed % 2**64, step, i])
            if rng.random() < config.lmbda:
                chosen = rng.integers(len(prompts), size=config.train.per_device_train_batch_size)
                rollout = sampler([prompts[j] for j in chosen], step=step * len(batches) + i)
                batches[i] = training_batch(rollout, range(len(rollout))).to(device)
        return batches

    return of_step


def evaluation(model: nn.Module, objective: Objective, batches: Sequence[Any], place: Place) -> dict[str, float]:
    """The distance from the teacher over all held-out answers, and the student's own loss there."""
    sums = {"loss": 0.0, "nll": 0.0, "weight": 0.0}
    for index in range(place.ranks.data_rank, len(batches) + place.ranks.data_rank, place.ranks.data_size):
        # every rank makes as many passes as the others, for they may have to gather weights for each other
        part = objective(model, batches[min(index, len(batches) - 1)].to(place.device))
        if index < len(batches):
            parts = {"loss": part.sum, "nll": part.metrics["nll"], "weight": part.weight}
            sums = {name: sums[name] + float(value) for name, value in parts.items()}
    sums = place.ranks.sum(sums)
    return {"eval_loss": sums["loss"] / sums["weight"], "eval_nll": sums["nll"] / sums["weight"]}
