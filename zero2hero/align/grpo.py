"""GRPO and its kin: a policy practises on questions whose answers can be judged. What `zero2hero grpo` runs.

    prompts  ->  several answers each, sampled  ->  rewards  ->  advantages  ->  the clipped loss, a step or a few

No value model guesses what to expect: the other answers to the same question tell (Shao et al. 2024, "DeepSeekMath",
arXiv 2402.03300). Where all of a group earn the same there is nothing to compare, and the group teaches nothing; how
many groups are like that is in the record (`frac_reward_zero_std`).

    grpo                         reward minus the group's mean, over a standard deviation (`scale_rewards`)
    rloo                         reward minus the mean of the others (Ahmadian et al. 2024, arXiv 2402.14740)
    reinforce_plus_plus          each token's return, whitened over the batch (Hu 2025, arXiv 2501.03262)

and the loss is one of policy_loss.py. Rollouts are those of rollout.py, with the weights as they are at that moment.
In fp32 the sampler's own log-probabilities are the old policy's. Where the training forward gives a little others
(bf16), or the sampler cuts tails, it is asked itself: for nothing where a rollout serves one step, else by a pass more;
and each token counts by the ratio of the two, at most `importance_sampling_clip_max` (truncated importance sampling,
Yao et al. 2025, fengyao.notion.site/off-policy-rl), because the tokens were drawn from the other one.

N samples, C tokens of the longest completion, K tokens of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from zero2hero.align.advantages import (
    at_last_token,
    group_relative,
    groups_without_spread,
    leave_one_out,
    reinforce_plus_plus,
)
from zero2hero.align.environment import Talks, find_environment
from zero2hero.align.online import (
    Prompt,
    PromptOrder,
    answers,
    begin,
    completion_metrics,
    held_out_reward,
    judged,
    rollouts_of,
)
from zero2hero.align.policy_loss import Tokens, policy_loss
from zero2hero.align.reference import Reference
from zero2hero.align.rewards import Rewards, Scores
from zero2hero.align.rollout import PolicyBatch, Rollout, RolloutData, Sampler, chosen_states, rollout_logprobs
from zero2hero.alignment_configs import GrpoConfig
from zero2hero.language_model import LanguageModel, load
from zero2hero.nn.logprobs import logprobs_and_entropies
from zero2hero.progress import human_count
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import Loss
from zero2hero.train.run import Place, Task, run
from zero2hero.train.sft import save_tuned
from zero2hero.train.tracking import Units
from zero2hero.train.watch import Watcher

SHOWN = 4  # completions in a table


def grpo(config: GrpoConfig) -> LanguageModel:
    """Let a model practise; the adapter, or the model, is left in `config.output_dir`.

    Raises:
        UserError: anything in the data, rewards or settings that a person can mend; what was learned is saved.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    run(config, functools.partial(_begin, config))
    return load(config.output_dir)


def _begin(config: GrpoConfig, place: Place) -> Task:
    train = config.train
    begun = begin(config, place, "grpo")
    lm, adapted, prompts, held_out, rewards = begun.lm, begun.policy, begun.prompts, begun.held_out, begun.rewards
    reference = Reference.of(adapted, place.dtype, place.device) if config.beta else None
    environment = find_environment(config.environment, lm.tokenizer) if config.environment else None
    sampler = begun.sampler(config, environment.stop if environment else ())
    practice = Practice(config, prompts, sampler, rewards, reference, environment, place.dtype)
    data = RolloutData(
        practice.collect, samples_per_micro_batch=train.per_device_train_batch_size, seed=train.seed,
        micro_batches_per_step=train.gradient_accumulation_steps, micro_batches_per_rollout=config.micro_batches,
        num_iterations=config.num_iterations, device=place.device,
    )  # fmt: skip
    evaluate = held_out_reward(sampler, held_out, rewards, reference, adapted)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    per_rollout = config.samples_per_rollout // config.num_generations
    total_steps = rollouts_of(config, len(prompts), per_rollout, config.steps_per_rollout)
    return Task(
        adapted, practice.objective, total_steps, data,
        save=lambda model: save_tuned(dataclasses.replace(lm, model=model), config),  # type: ignore[arg-type]
        announce=f"{len(prompts)} prompts, {per_rollout} at a time with {config.num_generations} answers each, "
        f"{len(held_out)} held out; rewards {', '.join(rewards.functions)}; {config.method} trains "
        f"{human_count(trained)} weights",
        evaluate=evaluate, baseline=evaluate,
        sample=answers(sampler, held_out),
        made_with={"tokenizer": lm.tokenizer.fingerprint, "base": str(begun.folder)},
        facts={"vocab_size": adapted.config.vocab_size},
        watchers=[practice],
        units=Units("token" if config.loss_type == "bnpo" else "completion", "loss"),
    )  # fmt: skip


class Practice(Watcher):
    """Collects rollouts, judges them, and says what is to be minimized on them.

    It is a watcher too: what a rollout was like is in the record, as a mean over the rollouts since the last line.
    """

    name = "practice"

    def __init__(
        self,
        config: GrpoConfig,
        prompts: list[Prompt],
        sampler: Sampler,
        rewards: Rewards,
        reference: Reference | None = None,
        environment: Talks | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.sampler, self.rewards, self.reference = config, sampler, rewards, reference
        self.order = PromptOrder(prompts, config.train.seed)
        self.exact = sampler.exact and dtype == torch.float32
        self.environment = environment
        self.kl_in_loss = config.advantage_estimator == "grpo"
        self._sums: dict[str, float] = {}
        self._rollouts = 0
        self._last: dict[str, float] = {}
        self._shown: list[dict[str, Any]] = []

    # --- a rollout ----------------------------------------------------------------------------------------------

    def collect(self, number: int) -> tuple[Rollout, dict[str, Tensor]]:
        """Rollout number `number`, and what the loss must know of its tokens.

        Raises:
            UserError: a reward function fails (it is named), or a prompt cannot be answered.
        """
        c, model = self.config, self.sampler.model
        prompts = self.order(number, c.samples_per_rollout // c.num_generations)
        talk = None
        if self.environment is not None:
            talk = self.environment(
                [{"prompt": p.turns, **p.columns} for p in prompts for _ in range(c.num_generations)]
            )
        rollout = self.sampler([p.ids for p in prompts], c.num_generations, number, talk)
        scores = judged(prompts, rollout, self.rewards, c.num_generations)
        columns = {"behaviour": rollout.logprobs_NC}
        if not self.exact and c.steps_per_rollout > 1:
            columns["old"] = rollout_logprobs(model, rollout, c.temperature, c.train.per_device_train_batch_size)
        if self.reference is not None:
            with self.reference(model) as before:
                columns["ref"] = rollout_logprobs(before, rollout, c.temperature, c.train.per_device_train_batch_size)
        if c.mask_truncated_completions:
            columns["kept"] = torch.tensor([float(reason == "stop") for reason in rollout.finish_reasons])
        columns["advantages"] = self._advantages(rollout, scores, columns)
        self._note(prompts, rollout, scores, columns)
        return rollout, columns

    def _advantages(self, rollout: Rollout, scores: Scores, columns: dict[str, Tensor]) -> Tensor:
        """[N], or [N, C] where they differ from token to token."""
        c, mask_NC = self.config, rollout.mask_NC
        if self.kl_in_loss:
            return group_relative(scores.total_N, c.num_generations, c.scale_rewards)
        penalty_NC = torch.zeros(mask_NC.shape)
        if "ref" in columns:
            penalty_NC = c.beta * (columns.get("old", columns["behaviour"]) - columns["ref"]) * mask_NC
        if c.advantage_estimator == "rloo":
            return leave_one_out(scores.total_N - penalty_NC.sum(1), c.num_generations)
        total_N = scores.total_N
        if c.advantage_estimator == "reinforce_plus_plus_baseline":
            total_N = group_relative(total_N, c.num_generations, "none")
        return reinforce_plus_plus(at_last_token(total_N, mask_NC) - penalty_NC, mask_NC)

    # --- the objective --------------------------------------------------------------------------------------------

    def objective(self, model: nn.Module, batch: PolicyBatch) -> Loss:
        """The policy's loss on a micro-batch.

        Dropout is off, for with it the policy would not be the one that wrote: also in the backward pass, where
        activations may be computed once more.
        """
        c, columns = self.config, batch.columns
        model.eval()
        hidden_KD, targets_K = chosen_states(model, batch)
        head: Any = model.head_weight
        logprobs_K, entropies_K = logprobs_and_entropies(hidden_KD, head, targets_K, temperature=c.temperature)
        now_K, behaviour_K = logprobs_K.detach(), columns["behaviour"]
        old_K = behaviour_K if self.exact else columns.get("old", now_K)
        correction_K = None if self.exact else (old_K - behaviour_K).exp().clamp(max=c.importance_sampling_clip_max)
        loss = policy_loss(
            Tokens(
                logprobs_K, old_K, columns["advantages"], batch.sample_K, batch.num_samples,
                columns.get("ref") if self.kl_in_loss else None, entropies_K, columns.get("kept"), correction_K,
                batch.tokens_per_sample,
            ), c, c.max_completion_length,
        )  # fmt: skip
        count = torch.tensor(float(len(now_K)))
        if batch.fresh:  # the policy is still the one that sampled
            self._add(loss, "sampling/sampling_logp_difference/mean", (now_K - behaviour_K).abs().sum(), count)
        if correction_K is not None:
            self._add(loss, "sampling/importance_sampling_ratio/mean", correction_K.sum(), count)
        if "ref" in columns and not self.kl_in_loss:
            self._add(loss, "kl", (now_K - columns["ref"]).sum(), count)
        return loss

    @staticmethod
    def _add(loss: Loss, name: str, total: Tensor, count: Tensor) -> None:
        loss.metrics[name], loss.weights[name] = total, count

    # --- the record -----------------------------------------------------------------------------------------------

    def _note(self, prompts: list[Prompt], rollout: Rollout, scores: Scores, columns: dict[str, Tensor]) -> None:
        c, total_N = self.config, scores.total_N
        alike = groups_without_spread(total_N, c.num_generations).float().mean()
        found = {
            "reward": float(total_N.mean()),
            "reward_std": float(total_N.std()),
            "frac_reward_zero_std": float(alike),
        }
        found |= self.rewards.metrics(scores.by_function_NF) | completion_metrics(rollout)
        if self.environment is not None:
            calls = [sum(a and not b for a, b in itertools.pairwise(own)) for own in rollout.own]
            found["tools/call_frequency"] = sum(calls) / len(calls)
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._rollouts += 1
        advantages = columns["advantages"]
        each_N = advantages if advantages.dim() == 1 else (advantages * rollout.mask_NC).sum(1) / rollout.mask_NC.sum(1)
        order = total_N.argsort(stable=True)
        chosen = sorted({int(order[i * (len(order) - 1) // (SHOWN - 1)]) for i in range(SHOWN)})  # of worst to best
        self._shown = [
            {
                "prompt": _question(prompts[i // c.num_generations]), "completion": rollout.texts[i],
                "reward": round(float(total_N[i]), 4), "advantage": round(float(each_N[i]), 4),
                "rewards": {n: None if x.isnan() else round(float(x), 4)
                            for n, x in zip(self.rewards.functions, scores.by_function_NF[i])},
            } for i in sorted(chosen, key=lambda i: -float(total_N[i]))
        ]  # fmt: skip

    def after_update(self, trainer: Trainer) -> None:
        """Show some completions of the last rollout, where samples are due."""
        if not self._shown or not (trainer.state.step % trainer.sample_steps == 0 or trainer.state.step == 1):
            return
        if trainer.tracker:
            trainer.tracker.record(trainer.state.step, completions=self._shown)
        if trainer.progress:
            lines = [f"  {s['reward']:>8.3g}  {' '.join(s['completion'].split())[:100]}" for s in self._shown]
            trainer.progress.print("\n".join([f"step {trainer.state.step}: rewards and completions", *lines]))
        self._shown = []

    def metrics(self) -> dict[str, float]:
        if self._rollouts:
            self._last = {name: value / self._rollouts for name, value in self._sums.items()}
        self._sums, self._rollouts = {}, 0
        return self._last

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "rollouts": self._rollouts, "shown": self._shown, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._rollouts = dict(state["sums"]), state["rollouts"]
        self._shown, self._last = list(state["shown"]), dict(state["last"])


def _question(prompt: Prompt) -> str:
    return prompt.turns if isinstance(prompt.turns, str) else str(prompt.turns[-1]["content"])
