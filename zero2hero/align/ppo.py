"""PPO: a policy learns to earn more, with a critic that says what was to be expected. What `zero2hero ppo` runs.

    prompts -> an answer each -> a score each -> rewards, values and advantages of each token -> a few careful steps

Each token costs what it adds to the KL from the model as it was, and the last one earns the answer's score (Ziegler et
al. 2019, arXiv 1909.08593; Ouyang et al. 2022, "InstructGPT", arXiv 2203.02155). A value head on the policy (see
value_head.py) guesses at each token what is still to come; what comes out better than the guess has a positive
advantage (GAE). The ratio of new to old probability counts within 1 +- `cliprange` only, so that one rollout can serve
several steps without carrying the policy off (Schulman et al. 2017, arXiv 1707.06347). What else it takes in practice
is in Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031.

Names of settings and metrics are TRL's. N samples, C tokens of the longest completion, K tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zero2hero.align.advantages import at_last_token, gae, whiten
from zero2hero.align.kl import KL_ESTIMATORS, KLController
from zero2hero.align.online import (
    Prompt,
    PromptOrder,
    answers,
    begin,
    chunks,
    completion_metrics,
    held_out_reward,
    judged,
    rollouts_of,
)
from zero2hero.align.policy_loss import Tokens, policy_loss
from zero2hero.align.reference import Reference
from zero2hero.align.rewards import Scores
from zero2hero.align.rollout import (
    PolicyBatch,
    Rollout,
    RolloutData,
    Sampler,
    chosen_states,
    rollout_logprobs,
    training_batch,
)
from zero2hero.align.value_head import ActorCritic, load_value_head, save_value_head
from zero2hero.alignment_configs import PolicyLossConfig, PpoConfig
from zero2hero.generate.reader import evaluating
from zero2hero.language_model import LanguageModel, load
from zero2hero.nn.logprobs import logprobs_and_entropies
from zero2hero.progress import human_count
from zero2hero.train.objectives import Loss
from zero2hero.train.run import Place, Task, run
from zero2hero.train.sft import save_tuned
from zero2hero.train.tracking import Units
from zero2hero.train.watch import Watcher

LARGEST_CORRECTION = 3.0  # where sampler and training forward disagree, as in grpo.py


def ppo(config: PpoConfig) -> LanguageModel:
    """Let a policy earn rewards; the adapter, or the model, is left in `config.output_dir`, the value head beside it.

    Raises:
        UserError: anything in the data, rewards or settings that a person can mend; what was learned is saved.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    run(config, functools.partial(_begin, config))
    return load(config.output_dir)


def _begin(config: PpoConfig, place: Place) -> Task:
    train = config.train
    begun = begin(config, place, "ppo")
    lm, policy, prompts, held_out, rewards = begun.lm, begun.policy, begun.prompts, begun.held_out, begun.rewards
    model = ActorCritic(policy).to(place.device)
    load_value_head(model.value_head, begun.folder)
    reference = Reference.of(policy, place.dtype, place.device)
    sampler = begun.sampler(config)
    experience = Experience(
        config, model, sampler, PromptOrder(prompts, train.seed), functools.partial(judged, rewards=rewards), reference,
        exact=sampler.exact and place.dtype == torch.float32, reward_metrics=rewards.metrics,
    )  # fmt: skip
    data = RolloutData(
        experience.collect, samples_per_micro_batch=train.per_device_train_batch_size, seed=train.seed,
        micro_batches_per_step=train.gradient_accumulation_steps, num_iterations=config.num_ppo_epochs,
        micro_batches_per_rollout=train.gradient_accumulation_steps * config.num_mini_batches, device=place.device,
    )  # fmt: skip
    evaluate = held_out_reward(sampler, held_out, rewards, reference, policy)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def save(finished: Any) -> None:
        save_tuned(dataclasses.replace(lm, model=finished.policy), config)
        save_value_head(finished.value_head, config.output_dir)

    return Task(
        model, functools.partial(ppo_loss, config=config),
        rollouts_of(config, len(prompts), config.samples_per_rollout, data.steps_per_rollout), data, save=save,
        announce=f"{len(prompts)} prompts, {config.samples_per_rollout} at a time, {len(held_out)} held out; rewards "
        f"{', '.join(rewards.functions)}; {config.method} trains {human_count(trained)} weights",
        evaluate=evaluate, baseline=evaluate, sample=answers(sampler, held_out),
        made_with={"tokenizer": lm.tokenizer.fingerprint, "base": str(begun.folder)},
        facts={"vocab_size": policy.config.vocab_size}, watchers=[experience], units=Units("token", "loss"),
    )  # fmt: skip


# --- the objective ----------------------------------------------------------------------------------------------


def ppo_loss(model: nn.Module, batch: PolicyBatch, config: PpoConfig) -> Loss:
    """The clipped loss of the policy, plus `vf_coef` times that of the value; both are sums over the same tokens.

    `batch.columns`: old, advantages, values and returns; behaviour where that is not the old policy's.
    """
    model.eval()  # with dropout the policy that learns would not be the one that wrote; the backward pass too
    hidden_KD, targets_K = chosen_states(model, batch)
    logprobs_K, entropies_K = logprobs_and_entropies(
        hidden_KD, model.head_weight, targets_K, temperature=config.temperature  # type: ignore[arg-type]
    )  # fmt: skip
    values_K = model.value_head(hidden_KD)  # type: ignore[operator]
    columns, now_K = batch.columns, logprobs_K.detach()
    correction_K = None
    if "behaviour" in columns:
        correction_K = (columns["old"] - columns["behaviour"]).exp().clamp(max=LARGEST_CORRECTION)
    clip = PolicyLossConfig(loss_type="bnpo", epsilon=config.cliprange)  # bnpo: all tokens of a step count alike
    tokens = Tokens(
        logprobs_K, columns["old"], columns["advantages"], batch.sample_K, batch.num_samples, correction_K=correction_K
    )
    policy = policy_loss(tokens, clip)
    value_K, stopped_K = clipped_value_loss(values_K, columns["values"], columns["returns"], config.cliprange_value)
    ratio_K = (now_K - columns["old"]).exp()
    metrics = {
        "loss/policy_avg": policy.sum.detach(), "loss/value_avg": value_K.detach().sum(),
        "policy/clipfrac_avg": policy.metrics["clip_ratio/region_mean"], "val/clipfrac_avg": stopped_K.float().sum(),
        "policy/approxkl_avg": (now_K - columns["old"]).square().sum() / 2, "policy/entropy_avg": entropies_K.sum(),
        "val/ratio": ratio_K.sum(),
    }  # fmt: skip
    return Loss(policy.sum + config.vf_coef * value_K.sum(), policy.weight, metrics)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """(half the squared error of each, where clipping stopped it); of the arguments' shape.

    The larger of two errors: of the value, and of the value held within `cliprange_value` of what it was. A value that
    has moved further, towards its return, has no gradient.
    """
    bounded = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error, bounded_error = (values - returns).square(), (bounded - returns).square()
    return torch.max(error, bounded_error) / 2, bounded_error > error


# --- the rollouts -----------------------------------------------------------------------------------------------


class Experience(Watcher):
    """Collects rollouts, and says what every token of them was worth.

    It is a watcher too: what KL costs is kept over a resume, and what rollouts were like is in the record, as a mean
    over those since the last line.

    Args:
        judge: (prompts, rollout) -> scores.
        exact: the sampler's log-probabilities are those of the training forward.
        reward_metrics: scores of each function [N, F] -> metrics.
    """

    name = "experience"

    def __init__(
        self,
        config: PpoConfig,
        model: ActorCritic,
        sampler: Sampler,
        order: PromptOrder,
        judge: Callable[[Sequence[Prompt], Rollout], Scores],
        reference: Reference,
        *,
        exact: bool = True,
        reward_metrics: Callable[[Tensor], dict[str, float]] | None = None,
    ) -> None:
        self.config, self.model, self.sampler, self.order = config, model, sampler, order
        self.judge, self.reference, self.exact, self.reward_metrics = judge, reference, exact, reward_metrics
        self.controller = KLController(config.kl_coef, config.target_kl, config.horizon)
        self._sums: dict[str, float] = {}
        self._rollouts = 0

    def collect(self, number: int) -> tuple[Rollout, dict[str, Tensor]]:
        """Rollout `number`, and for each of its tokens [N, C]: old (log-probability), values, advantages, returns.

        Raises:
            UserError: a reward function fails (it is named).
        """
        c = self.config
        prompts = self.order(number, c.samples_per_rollout)
        rollout = self.sampler([prompt.ids for prompt in prompts], step=number)
        scores = self.judge(prompts, rollout)
        score_N, mask_NC, old_NC = scores.total_N, rollout.mask_NC, rollout.logprobs_NC
        if c.missing_eos_penalty is not None:
            score_N = score_N - c.missing_eos_penalty * torch.tensor([r != "stop" for r in rollout.finish_reasons])
        values_NC, trained_NC = self._values_and_logprobs(rollout)
        columns = {"values": values_NC}
        if not self.exact:
            columns["behaviour"], old_NC = old_NC, trained_NC
        with self.reference(self.model.policy) as before:
            ref_NC = rollout_logprobs(before, rollout, c.temperature, c.train.per_device_train_batch_size)
        cost_NC = self.controller.kl_coef * KL_ESTIMATORS[c.kl_estimator](old_NC, ref_NC) * mask_NC
        rewards_NC = at_last_token(score_N, mask_NC) - cost_NC
        if c.whiten_rewards:
            rewards_NC = whiten(rewards_NC, mask_NC, shift_mean=False)
        advantages_NC, returns_NC = gae(rewards_NC, values_NC, mask_NC, c.gamma, c.lam)
        if c.whiten_advantages:
            advantages_NC = whiten(advantages_NC, mask_NC)
        kl = float(((old_NC - ref_NC) * mask_NC).sum(1).mean())
        self._note(rollout, scores, score_N, kl, -float(cost_NC.sum(1).mean()), -float(old_NC.sum(1).mean()))
        self.controller.update(kl, len(rollout))
        return rollout, columns | {"old": old_NC, "advantages": advantages_NC, "returns": returns_NC}

    @torch.no_grad()
    def _values_and_logprobs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Of each token [N, C], as the model is now: what was to be expected before it, and how likely it was."""
        values_NC, logprobs_NC = (torch.zeros(rollout.mask_NC.shape) for _ in range(2))
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            for part in chunks(len(rollout), self.config.train.per_device_train_batch_size):
                batch = training_batch(rollout, part).to(device)
                hidden_KD, targets_K = chosen_states(self.model, batch)
                batch.padded(self.model.value_head(hidden_KD).cpu(), values_NC)
                if not self.exact:
                    found = logprobs_and_entropies(
                        hidden_KD, self.model.head_weight, targets_K, temperature=self.config.temperature
                    )
                    batch.padded(found[0].cpu(), logprobs_NC)
        return values_NC, logprobs_NC

    def _note(
        self, rollout: Rollout, scores: Scores, score_N: Tensor, kl: float, non_score: float, entropy: float
    ) -> None:
        score = float(score_N.mean())
        found = {
            "reward": float(scores.total_N.mean()), "reward_std": float(scores.total_N.std(correction=0)),
            "objective/kl": kl, "objective/entropy": entropy, "objective/non_score_reward": non_score,
            "objective/scores": score, "objective/rlhf_reward": score + non_score,
            "objective/kl_coef": self.controller.kl_coef,
            "val/num_eos_tokens": float(rollout.finish_reasons.count("stop")),
        }  # fmt: skip
        found |= completion_metrics(rollout)
        if self.reward_metrics is not None:
            found |= self.reward_metrics(scores.by_function_NF)
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._rollouts += 1

    def metrics(self) -> dict[str, float]:
        found = {name: total / self._rollouts for name, total in self._sums.items()}
        self._sums, self._rollouts = {}, 0
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.controller.kl_coef, "sums": dict(self._sums), "rollouts": self._rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.kl_coef = float(state["kl_coef"])
        self._sums, self._rollouts = dict(state["sums"]), int(state["rollouts"])
