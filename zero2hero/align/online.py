"""What all share who learn from their own samples: prompts, what their answers are worth, and how it is shown.

    prompts = read_prompts(config, lm)                     # records of any shape; what is not the prompt is a column
    asked = PromptOrder(prompts, seed)(number, count)      # those of rollout `number`
    scores = judged(asked, rollout, rewards)               # one column of numbers for each reward function

Prompts are texts, or messages to be answered. Columns (an `answer`, tests, ...) are handed to the reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from zero2hero.align.reference import Reference
from zero2hero.align.rewards import Rewards, Scores, load_rewards
from zero2hero.align.rollout import Rollout, Sampler, rollout_logprobs
from zero2hero.alignment_configs import OnlineConfig
from zero2hero.data.conversations import Record, Turns, question_of
from zero2hero.data.files import BadRecords
from zero2hero.errors import UserError
from zero2hero.fetch import find_folder
from zero2hero.language_model import LanguageModel
from zero2hero.models.checkpoint import read_json
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template
from zero2hero.train.run import Place, Sample
from zero2hero.train.sft import adapt, base_model, split_records

HELD_OUT = 1 << 30  # the number of the rollout that held-out prompts are answered in, always the same
SHOWN = 3


@dataclass(frozen=True)
class Prompt:
    """Something to answer: its tokens, what people wrote, and the record's other columns."""

    ids: list[int]
    turns: Turns
    columns: dict[str, Any]


def read_prompts(config: OnlineConfig, lm: LanguageModel) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to learn from, prompts held out).

    Raises:
        UserError: with the record's place: it has nothing to answer, or is too long for the model's context.
    """
    learn, held_out = split_records(config)
    if any(record.messages or isinstance(record.prompt, list) for record in (*learn, *held_out)):
        set_chat_template(lm.tokenizer, config.chat_template)
    return prompts_of(learn, lm, config.on_bad_record), prompts_of(held_out, lm, config.on_bad_record)


def prompts_of(records: Sequence[Record], lm: LanguageModel, on_bad_record: str) -> list[Prompt]:
    """What records ask, as `read_prompts` has it."""
    bad, prompts = BadRecords(on_bad_record == "skip"), []
    context = lm.model.config.max_position_embeddings
    for record in records:
        try:
            turns, columns = question_of(record)
            prompt = Prompt(lm.prompt_ids(turns), turns, columns)
            if not 1 <= len(prompt.ids) <= context:
                raise UserError(
                    f"{record.where}: the prompt has {len(prompt.ids)} tokens, and the model's context is {context}. "
                    "Shorten it, or leave such records out with --on_bad_record skip"
                )
            prompts.append(prompt)
        except UserError as error:
            if not bad.skip:
                raise
            bad.found(record.where, str(error).removeprefix(f"{record.where}: "))
    bad.tell("the data")
    if not prompts:
        raise UserError("the data hold no prompt that can be answered")
    return prompts


@dataclass(frozen=True)
class Beginning:
    """What a run begins with: the model's folder, the model with its tokenizer, and that model as it is trained."""

    folder: Path
    lm: LanguageModel
    policy: Any
    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: Rewards

    def sampler(self, config: OnlineConfig, stop: tuple[str, ...] = ()) -> Sampler:
        """What samples from the policy; for `stop` see there."""
        return Sampler(
            self.policy, self.lm.tokenizer, self.lm.eos_ids, max_completion_length=config.max_completion_length,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p, stop=stop,
            seed=config.train.seed,
        )  # fmt: skip


def begin(config: OnlineConfig, place: Place, verb: str) -> Beginning:
    """Read model, prompts and rewards.

    Raises:
        UserError: as these do; or there are several ranks.
    """
    if place.ranks.size > 1:
        raise UserError(f"{verb} samples and learns in one process: start it without torchrun")
    folder = find_folder(config.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    settings = folder / "generation_config.json"
    known = read_json(settings) if settings.exists() else {}
    lm = LanguageModel(base_model(config, folder, place), tokenizer, generation_config=known)
    prompts, held_out = read_prompts(config, lm)
    rewards = load_rewards(config.reward_funcs, config.reward_weights, allow_code_execution=config.allow_code_execution)
    policy = adapt(lm.model, config).to(place.device)
    return Beginning(folder, lm, policy, prompts, held_out[: config.num_eval_prompts], rewards)


class PromptOrder:
    """The prompts of each rollout: all of them once, shuffled, then all of them in another order, and so on."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def __call__(self, number: int, count: int, part: tuple[int, int] = (0, 1)) -> list[Prompt]:
        """Those of rollout `number`, `count` of them; or of these the `part` (which, of how many)."""
        places = range(number * count, (number + 1) * count)[part[0] :: part[1]]
        epochs: dict[int, Any] = {}
        for epoch in {place // len(self.prompts) for place in places}:
            epochs[epoch] = np.random.default_rng([self.seed % 2**64, epoch]).permutation(len(self.prompts))
        return [self.prompts[epochs[p // len(self.prompts)][p % len(self.prompts)]] for p in places]


def judged(prompts: Sequence[Prompt], rollout: Rollout, rewards: Rewards, num_generations: int = 1) -> Scores:
    """What the completions of a rollout are worth; the completions of one prompt stand side by side."""
    asked = [prompt for prompt in prompts for _ in range(num_generations)]
    names = dict.fromkeys(name for prompt in asked for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in asked] for name in names}
    said = [_said(prompt, text) for prompt, text in zip(asked, rollout.texts, strict=True)]
    return rewards([prompt.turns for prompt in asked], said, rollout.completion_ids, columns)


def _said(prompt: Prompt, text: str) -> Turns:
    return text if isinstance(prompt.turns, str) else [{"role": "assistant", "content": text}]


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """How long the completions are, and how many were cut off; TRL's names."""
    lengths, ended = np.array(rollout.lengths), np.array(rollout.finish_reasons) == "stop"
    found = {f"completions/{name}_length": float(f(lengths)) for name, f in
             (("mean", np.mean), ("min", np.min), ("max", np.max))}  # fmt: skip
    return found | {"completions/clipped_ratio": float(1 - ended.mean())}


def held_out_reward(
    sampler: Sampler, prompts: Sequence[Prompt], rewards: Rewards, reference: Reference | None, policy: nn.Module
) -> Callable[[], dict[str, float]]:
    """() -> reward of the answers to held-out prompts, and how far they are from the reference (nats a completion).

    The random numbers are the same each time, so that what changes is the policy. `eval_loss` is minus the reward.
    """

    def evaluate() -> dict[str, float]:
        rollout = sampler([prompt.ids for prompt in prompts], step=HELD_OUT)
        scores = judged(prompts, rollout, rewards)
        reward = float(scores.total_N.mean())
        found = {"eval_loss": -reward, "eval_reward": reward}
        if reference is not None:
            found["eval_kl"] = kl_of(rollout, reference, policy, sampler)
        by_function = {f"eval_{name}": n for name, n in rewards.metrics(scores.by_function_NF).items()}
        lengths = {f"eval_{name}": n for name, n in completion_metrics(rollout).items()}
        return found | by_function | lengths

    return evaluate


def kl_of(rollout: Rollout, reference: Reference, policy: nn.Module, sampler: Sampler) -> float:
    """KL to the reference in nats per completion, by the estimator k1."""
    with reference(policy) as before:
        ref_NC = rollout_logprobs(before, rollout, sampler.params.temperature)
    return float(((rollout.logprobs_NC - ref_NC) * rollout.mask_NC).sum(1).mean())


def answers(sampler: Sampler, prompts: Sequence[Prompt]) -> Callable[[nn.Module], list[Sample]]:
    """model -> its answers to a few prompts, for the record."""

    def sample(model: nn.Module) -> list[Sample]:
        rollout = sampler([prompt.ids for prompt in prompts[:SHOWN]], step=HELD_OUT)
        shown = [p.turns if isinstance(p.turns, str) else str(p.turns[-1]["content"]) for p in prompts]
        return [{"prompt": f"{p}\n", "text": t} for p, t in zip(shown, rollout.texts)]

    return sample


def rollouts_of(config: OnlineConfig, prompts: int, prompts_per_rollout: int, steps_per_rollout: int) -> int:
    """Optimizer steps of the whole run: `train.max_steps`, or `train.num_train_epochs` over the prompts."""
    if config.train.max_steps:
        return config.train.max_steps
    return math.ceil(config.train.num_train_epochs * prompts / prompts_per_rollout) * steps_per_rollout


def chunks(count: int, size: int) -> Iterator[range]:
    """0 ... count - 1 in pieces."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
