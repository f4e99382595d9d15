"""Preference optimization: a model learns from which of two answers people preferred. What `zero2hero dpo` runs.

    preferences  ->  trees: a prompt, two answers  ->  what the reference says of them, once  ->  the loop

No reward model and no sampling: the loss of a pair follows from how likely policy and reference find its answers (see
preference.py). The reference's numbers are computed before the first step, from the very batches of the first epoch, so
the first loss of DPO is ln 2; no second model is in memory while the policy trains. (Where every weight is trained and
answers are sampled for the KL, a frozen copy is.)

Micro-batches of a step are parts of one sum for every loss but three: aot and aot_unpaired sort what is together in a
micro-batch, and kto estimates its KL from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zero2hero.align.kl import k3
from zero2hero.align.pairs import AnswerBatch, Encoded, Tree, answer_batch, answer_logprobs, encode, reference_logprobs
from zero2hero.align.preference import LOSSES, Answers, mismatched_kl, preference_loss
from zero2hero.align.reference import Reference
from zero2hero.align.rollout import Rollout, Sampler, rollout_logprobs
from zero2hero.alignment_configs import UNPAIRED, DpoConfig
from zero2hero.data.labelled import RowsByLength
from zero2hero.data.worlds import preferences
from zero2hero.fetch import find_folder
from zero2hero.language_model import LanguageModel, load
from zero2hero.progress import human_count, track
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template
from zero2hero.train.intervals import wilson
from zero2hero.train.objectives import Loss
from zero2hero.train.run import Place, Sample, Task, micro_batches, run, steps_of
from zero2hero.train.sft import adapt, base_model, planned_memory, save_tuned, split_records
from zero2hero.train.tracking import Units

SHOWN = 3  # samples in the report
AT_A_TIME = 16  # trees, where nothing is learned from them


def dpo(config: DpoConfig) -> LanguageModel:
    """Tune a model by preferences; the adapter, or the model, is left in `config.output_dir`.

    Raises:
        UserError: anything in the data or settings that a person can mend.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    run(config, functools.partial(_begin, config))
    return load(config.output_dir)


def _begin(config: DpoConfig, place: Place) -> Task:
    train, unpaired = config.train, is_unpaired(config)
    folder = find_folder(config.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = base_model(config, folder, place)
    max_length = min(train.max_length, model.config.max_position_embeddings)
    learn, held_out = split_records(config)
    if any(isinstance(record.prompt, list) for record in (*learn, *held_out)):
        set_chat_template(tokenizer, config.chat_template)
    training, validation = (encode(records, tokenizer, max_length, unpaired) for records in (learn, held_out))
    adapted = adapt(model, config).to(place.device)
    data = PreferenceData(training.trees, config, place)
    held = PreferenceData(validation.trees, config, place)
    total_steps = steps_of(config, len(training.trees), place.ranks.data_size)
    kinds = [LOSSES[name] for name in config.loss_types]
    sampling, referred = config.num_samples > 0, any(kind.reference for kind in kinds)
    reference = Reference.of(adapted, place.dtype, place.device) if sampling or referred else None
    if reference is not None and referred:
        data.refer(reference, adapted, data.order(total_steps))
        held.refer(reference, adapted, held.chunks)
    shape = model.config
    talker = functools.partial(
        LanguageModel, tokenizer=tokenizer, generation_config={"eos_token_id": ends(tokenizer, training)}
    )
    sampler = Samples(validation.trees, config, talker, reference) if sampling and reference is not None else None
    evaluate = evaluation(adapted, held, config, place, sampler)
    products = 1 if config.method == "full" else 2 / 3  # a frozen matrix has no gradient
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    what = "answers" if unpaired else "pairs"
    left_out = "".join(f"; {words}" for found in (training, validation) if (words := found.report(max_length)))
    return Task(
        adapted, functools.partial(objective, config=config), total_steps,
        micro_batches(config, place, data.__getitem__),
        save=lambda model: save_tuned(talker(model), config),  # type: ignore[arg-type]
        announce=f"{len(training.trees)} {what} to learn from, {len(validation.trees)} held out; {config.method} "
        f"trains {human_count(trained)} weights; loss {' + '.join(config.loss_types)}{left_out}",
        evaluate=evaluate,
        sample=sampler.shown if sampler else None,
        baseline=evaluate,
        made_with={"tokenizer": tokenizer.fingerprint, "base": str(folder)},
        facts={"vocab_size": shape.vocab_size},
        flops_per_token=lambda _: shape.training_flops_per_token(max_length) * products,
        planned=planned_memory(config, shape, max_length, place),
        units=Units("answer" if unpaired else "pair", "nats" if config.loss_type == "sigmoid" else "loss"),
    )  # fmt: skip


def is_unpaired(config: Any) -> bool:
    """Whether the loss is of single answers."""
    return config.loss_types[0] in UNPAIRED


def ends(tokenizer: Tokenizer, found: Encoded) -> list[int]:
    """The tokens that end an answer: the end-of-text token, and whatever special token the answers end with."""
    last = {int(answer[-1]) for tree in found.trees for answer in tree.answers} & set(tokenizer.all_special_ids)
    return sorted(last | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


# --- data -----------------------------------------------------------------------------------------------------


class PreferenceData:
    """`data[i]`: micro-batch i of the run, with what the reference says of its answers."""

    def __init__(self, trees: Sequence[Tree], config: DpoConfig, place: Place) -> None:
        train = config.train
        self.trees, self.config, self.place = trees, config, place
        self.together = train.gradient_accumulation_steps * place.ranks.data_size
        self.rows = RowsByLength(
            [len(t) for t in trees], train.per_device_train_batch_size, self.together, train.seed
        )  # fmt: skip
        self.reference_N2 = np.full((len(trees), 2), np.nan, np.float32)
        self.imitates = next((i for name in config.loss_types if (i := LOSSES[name].imitates)), "")

    def __getitem__(self, index: int) -> AnswerBatch:
        first = index // self.together * self.together
        step = np.concatenate([self.rows[i] for i in range(first, first + self.together)]) if self.imitates else None
        return self.batch(self.rows[index], step)

    def batch(self, chosen: np.ndarray, step: np.ndarray | None = None) -> AnswerBatch:
        """These trees; `step`: all of the step that they are part of."""
        trees = [self.trees[i] for i in chosen]
        of_step = [self.trees[i] for i in (chosen if step is None else step)]
        imitated = sum(len(t.answers[0]) + (len(t.prompt) - 1) * (self.imitates == "all") for t in of_step)
        return answer_batch(
            trees, prompts=self.imitates == "all", ld_alpha=self.config.ld_alpha,
            reference_N=np.nan_to_num(self.reference_N2[chosen]).reshape(-1),
            liked=np.array([t.liked for t in trees]), nll_share=np.float32(len(of_step) / imitated), numbers=chosen,
        )  # fmt: skip

    @property
    def chunks(self) -> list[np.ndarray]:
        """Every tree once, those of like length together."""
        order = np.argsort([len(tree) for tree in self.trees], kind="stable")
        return np.split(order, range(AT_A_TIME, len(order), AT_A_TIME))

    def order(self, total_steps: int) -> list[np.ndarray]:
        """The trees that a run reads, in the batches in which it first reads them."""
        count = min(total_steps, self.rows.steps_per_epoch) * self.together
        parts = [self.rows[i] for i in range(count)]
        if total_steps > self.rows.steps_per_epoch:
            left = np.setdiff1d(np.arange(len(self.trees)), np.concatenate(parts))
            parts += [part for part in np.split(left, range(AT_A_TIME, len(left), AT_A_TIME)) if len(part)]
        return parts

    def refer(self, reference: Reference, policy: nn.Module, parts: Sequence[np.ndarray]) -> None:
        """Ask the reference about these trees, divided over the ranks."""
        rank, size = self.place.part
        mine = parts[rank::size]
        for part in track(mine, "reference", enabled=None if rank == 0 and len(mine) > 50 else False):
            found = reference_logprobs(reference, policy, self.batch(part).to(self.place.device))
            self.reference_N2[part] = found.view(-1, 2).cpu().numpy()
        for table in self.place.ranks.gather(self.reference_N2) if size > 1 else []:
            self.reference_N2 = np.where(np.isnan(self.reference_N2), table, self.reference_N2)


# --- what is minimized ----------------------------------------------------------------------------------------


def objective(model: nn.Module, batch: AnswerBatch, config: Any) -> Loss:
    """The loss of pairs, or of single answers, and TRL's metrics of it (as sums)."""
    logprobs_N, plain = answer_logprobs(model, batch)
    reference_N = batch.reference_N
    first, second = logprobs_N[0::2], logprobs_N[1::2]
    if is_unpaired(config):
        return _unpaired(first - reference_N[0::2], second - reference_N[1::2], first, batch.liked, config)
    a = Answers(
        first, second, reference_N[0::2], reference_N[1::2], batch.tokens_N[0::2], batch.tokens_N[1::2],
        nll=-(plain[: len(logprobs_N) : 2] + plain[len(logprobs_N) :]), nll_share=batch.nll_share,
    )  # fmt: skip
    losses = preference_loss(a, config)
    return Loss(losses.sum(), _count(losses), {n: v.detach().sum() for n, v in _rewards(a, config).items()})


def _rewards(a: Answers, config: Any) -> dict[str, Tensor]:
    """Rewards as the loss implies them, under TRL's names; [B] each."""
    kind = LOSSES[config.loss_types[0]]
    chosen, rejected = a.chosen, a.rejected
    if kind.per_token:
        chosen, rejected = chosen / a.chosen_tokens, rejected / a.rejected_tokens
    elif kind.reference:
        chosen, rejected = a.chosen_ratio, a.rejected_ratio
    margins = config.beta * (chosen - rejected)
    return {
        "rewards/chosen": config.beta * chosen, "rewards/rejected": config.beta * rejected, "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(), "logps/chosen": a.chosen, "logps/rejected": a.rejected,
    }  # fmt: skip


def _unpaired(ratio: Tensor, mismatched: Tensor, logprobs: Tensor, liked: Tensor, config: Any) -> Loss:
    """KTO and its kin; the mismatched answers give the KL. Metrics are means over all answers, liked or not."""
    kl = mismatched_kl(mismatched)
    losses = LOSSES[config.loss_types[0]].loss(ratio, liked, kl, config)
    rewards, count = config.beta * ratio.detach(), len(ratio)
    metrics: dict[str, Tensor] = {"kl": kl * count}
    for name, some in (("chosen", liked), ("rejected", ~liked)):
        share = count / some.sum().clamp(min=1)
        metrics[f"rewards/{name}"] = (rewards * some).sum() * share
        metrics[f"logps/{name}"] = (logprobs.detach() * some).sum() * share
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/accuracies"] = ((rewards > config.beta * kl) == liked).sum()
    return Loss(losses.sum(), _count(losses), metrics)


def _count(losses: Tensor) -> Tensor:
    return torch.tensor(float(len(losses)), device=losses.device)


# --- evaluation and samples -----------------------------------------------------------------------------------


def evaluation(
    model: nn.Module, held: PreferenceData, config: DpoConfig, place: Place, samples: Samples | None
) -> Callable[[], dict[str, float]]:
    """() -> loss and metrics of the held-out preferences, how sure the accuracy is, and what samples show."""
    chunks = held.chunks

    def evaluate() -> dict[str, float]:
        sums = {"loss": 0.0, "weight": 0.0}
        for index in range(place.ranks.data_rank, len(chunks) + place.ranks.data_rank, place.ranks.data_size):
            part = objective(model, held.batch(chunks[min(index, len(chunks) - 1)]).to(place.device), config)
            if index < len(chunks):
                parts = {"loss": part.sum, "weight": part.weight} | part.metrics
                sums = {name: sums.get(name, 0.0) + float(value) for name, value in parts.items()}
        sums = place.ranks.sum(sums)
        weight = sums.pop("weight")
        found = {f"eval_{name}": value / weight for name, value in sums.items()}
        low, high = wilson(found["eval_rewards/accuracies"], int(weight))
        found |= {"eval_rewards/accuracies_low": low, "eval_rewards/accuracies_high": high}
        return found | (samples.measured(model) if samples else {})

    return evaluate


class Samples:
    """What the model answers to held-out prompts: its KL from the reference and, where the raters' taste is known, how
    much they like it. The reference's own answers, by the same random numbers, are what it is compared with."""

    def __init__(self, trees: Sequence[Tree], config: DpoConfig, talker: Any, reference: Reference) -> None:
        prompts = list(dict.fromkeys(tuple(tree.prompt.tolist()) for tree in trees))
        self.prompts = [list(p) for p in prompts[:: max(1, len(prompts) // config.num_samples)][: config.num_samples]]
        self.config, self.talker, self.reference = config, talker, reference
        self.known_taste = str(config.data).partition(":")[0] == "preferences"
        self.before: list[float] | None = None

    def written_by(self, model: Any, count: int | None = None) -> Rollout:
        """Answers to the first `count` prompts, all by default."""
        lm = self.talker(model)
        longest = model.config.max_position_embeddings - self.config.max_completion_length
        sampler = Sampler(
            model, lm.tokenizer, lm.generation_config["eos_token_id"], seed=self.config.train.seed,
            max_completion_length=self.config.max_completion_length,
        )  # fmt: skip
        return sampler([prompt[-max(1, longest) :] for prompt in self.prompts[:count]])

    def measured(self, model: nn.Module) -> dict[str, float]:
        """eval_kl, in nats per answer; and the share of answers that a rater would prefer to the reference's."""
        written = self.written_by(model)
        with self.reference(model) as before:
            reference_NC = rollout_logprobs(before, written)
            if self.known_taste and self.before is None:
                self.before = [preferences.taste(text) for text in self.written_by(before).texts]
        policy_NC = rollout_logprobs(model, written)
        found = {"eval_kl": float(k3(policy_NC, reference_NC).sum(1).mean()),
                 "eval_completions/mean_length": float(np.mean(written.lengths))}  # fmt: skip
        if self.known_taste:
            assert self.before is not None
            now = [preferences.taste(text) for text in written.texts]
            wins = [(a > b) + 0.5 * (a == b) for a, b in zip(now, self.before)]
            found |= {"eval_taste": float(np.mean(now)), "eval_win_rate": float(np.mean(wins))}
        return found

    def shown(self, model: nn.Module) -> list[Sample]:
        """A few prompts and answers."""
        lm = self.talker(model)
        written = self.written_by(model, SHOWN)
        prompts = [lm.tokenizer.decode(ids) for ids in written.prompt_ids]
        return [{"prompt": p, "text": t} for p, t in zip(prompts, written.texts)]
