"""Alignment on distributions so small that every mean is known exactly.

Policies are real decoders that learn by the verbs' own code, in worlds of a few prompts whose best policy is known.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from zero2hero.align.advantages import at_last_token, group_relative, leave_one_out, reinforce_plus_plus
from zero2hero.align.kl import KL_ESTIMATORS
from zero2hero.align.online import Prompt, PromptOrder, judged
from zero2hero.align.policy_loss import Tokens, policy_loss
from zero2hero.align.ppo import Experience, ppo_loss
from zero2hero.align.preference import Answers, preference_loss
from zero2hero.align.reference import Reference
from zero2hero.align.rewards import load_rewards
from zero2hero.align.rollout import PolicyBatch, RolloutData, Sampler, policy_logprobs, rollout_logprobs
from zero2hero.align.value_head import ActorCritic
from zero2hero.alignment_configs import DpoConfig, PolicyLossConfig, PpoConfig
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.worlds.prefworld import PrefWorld
from zero2hero.models import Decoder, init_weights
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import Loss

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 0.01  # nats from the best policy
SAMPLES = 256  # a rollout


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


def two_distributions(distance: float = 1.0):
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64)
    ref = logits + distance * torch.randn(7, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_kl_estimators_are_unbiased(name):
    """The mean over every outcome, each as often as the policy says it, is the divergence itself."""
    logits, ref = two_distributions()
    logprobs = logits.detach().log_softmax(0)
    mean = (logprobs.exp() * KL_ESTIMATORS[name](logprobs, ref)).sum()
    assert float(mean - exact_kl(logprobs.exp(), ref.exp())) == pytest.approx(0.0, abs=1e-14)


def test_k2_is_biased_by_the_third_power_of_the_distance_and_k3_varies_least():
    biases = []
    for distance in (0.2, 0.1, 0.05):
        logits, ref = two_distributions(distance)
        logprobs = logits.detach().log_softmax(0)
        p, exact = logprobs.exp(), exact_kl(logprobs.exp(), ref.exp())
        biases.append(float((p * KL_ESTIMATORS["k2"](logprobs, ref)).sum() - exact))
        second_moment = {name: float((p * f(logprobs, ref).square()).sum()) for name, f in KL_ESTIMATORS.items()}
        assert second_moment["k3"] < 0.1 * second_moment["k1"]
        assert (KL_ESTIMATORS["k3"](logprobs, ref) >= 0).all()
        assert (KL_ESTIMATORS["k1"](logprobs, ref) < 0).any()
    assert biases[0] / biases[1] == pytest.approx(8, rel=0.2)
    assert biases[1] / biases[2] == pytest.approx(8, rel=0.2)


def test_gradients_of_the_estimators_in_a_loss():
    """k1's is zero on average, k2's that of KL(policy || reference), k3's that of KL(reference || policy)."""
    logits, ref = two_distributions()

    def mean_gradient(estimator):  # samples come from the policy and carry no gradient themselves
        logprobs = logits.log_softmax(0)
        return torch.autograd.grad((logprobs.exp().detach() * estimator(logprobs, ref)).sum(), logits)[0]

    p, q = logits.softmax(0), ref.exp()
    reverse, forward = (
        torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (exact_kl(p, q), exact_kl(q, p))
    )
    torch.testing.assert_close(mean_gradient(KL_ESTIMATORS["k1"]), torch.zeros_like(logits), rtol=0, atol=1e-14)
    torch.testing.assert_close(mean_gradient(KL_ESTIMATORS["k2"]), reverse, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mean_gradient(KL_ESTIMATORS["k3"]), forward, rtol=1e-12, atol=1e-14)


# --- policies in a world whose best policy is known ---------------------------------------------------------------


class Letters:
    """A tokenizer for a world of numbers."""

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


class Finite:
    """A decoder of `vocab` words that answers a one-word prompt by `length` words, and a world around it."""

    def __init__(self, vocab: int, length: int, prompts: int) -> None:
        self.vocab, self.length, self.prompts = vocab, length, prompts
        shape = DecoderConfig(
            vocab_size=vocab, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8,
            tie_word_embeddings=False, position="learned",
        )  # fmt: skip
        self.model = Decoder(shape)
        init_weights(self.model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # a policy that prefers some answers, and can tell prompts and words apart
            for name, p in self.model.named_parameters():
                if p.dim() > 1:
                    std = 1.0 if "embed" in name else 0.15 if "lm_head" in name else 1.5 * p.shape[1] ** -0.5
                    p.normal_(0, std, generator=generator)
        self.answers = torch.cartesian_prod(*[torch.arange(vocab)] * length).view(-1, length)
        self.world = PrefWorld(0, prompts, len(self.answers), self.logprobs_PA().numpy())
        self.reference = Reference.of(self.model)

    @torch.no_grad()
    def logprobs_PA(self) -> Tensor:
        """Of every answer to every prompt."""
        rows = []
        for prompt in range(self.prompts):
            ids = torch.cat([torch.full((len(self.answers), 1), prompt), self.answers], 1)
            logprobs = self.model.logits(self.model(ids[:, :-1])).double().log_softmax(-1)
            rows.append(logprobs.gather(-1, ids[:, 1:, None])[..., 0].sum(1))
        return torch.stack(rows)

    def reward(self, prompts, completion_ids) -> list[float]:
        numbers = [functools.reduce(lambda n, word: n * self.vocab + word, ids) for ids in completion_ids]
        return [float(self.world.rewards_PA[int(p), n]) for p, n in zip(prompts, numbers)]

    @property
    def asked(self) -> list[Prompt]:
        return [Prompt([p], str(p), {}) for p in range(self.prompts)]

    def sampler(self) -> Sampler:
        return Sampler(self.model, Letters(), [], max_completion_length=self.length)  # type: ignore[arg-type]

    def judge(self, prompts, rollout, num_generations=1):
        return judged(prompts, rollout, load_rewards([self.reward]), num_generations)

    def distance(self, beta: float) -> float:
        return self.world.distance(self.logprobs_PA().numpy(), beta)


def settings(steps: int) -> TrainConfig:
    return TrainConfig(
        max_steps=steps, per_device_train_batch_size=SAMPLES, learning_rate=0.01, optim="adamw", weight_decay=0.0,
        adam_beta2=0.999, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=0.0,
    )  # fmt: skip


def test_the_best_policy_of_a_world_is_the_best():
    world, beta = PrefWorld(3), 0.5
    best = world.best(beta)
    assert np.allclose(np.exp(best).sum(1), 1)
    assert world.distance(best, beta) == pytest.approx(0.0, abs=1e-12)
    value = np.log((np.exp(world.ref_logprobs_PA + world.rewards_PA / beta)).sum(1)).mean() * beta
    assert world.objective(best, beta) == pytest.approx(value)
    other = PrefWorld(4).ref_logprobs_PA
    assert world.objective(other, beta) == pytest.approx(value - beta * world.distance(other, beta))
    prompts, chosen, rejected = world.preferences(20_000)
    assert (chosen != rejected).all()
    margin = world.rewards_PA[prompts, chosen] - world.rewards_PA[prompts, rejected]
    assert (margin > 0).mean() == pytest.approx((1 / (1 + np.exp(-np.abs(margin)))).mean(), abs=0.01)


@pytest.mark.parametrize(("vocab", "length", "prompts", "beta", "steps"), [(8, 1, 4, 0.5, 80), (4, 2, 2, 1.0, 120)])
def test_ppo_reaches_the_best_policy(vocab, length, prompts, beta, steps):
    finite, train = Finite(vocab, length, prompts), settings(steps)
    config = PpoConfig(
        model="-", data="-", reward_funcs=["-"], kl_coef=beta, num_ppo_epochs=2, train=train, lam=1.0, vf_coef=0.5,
        whiten_advantages=False, cliprange_value=10.0, max_completion_length=length,
    )  # fmt: skip
    model = ActorCritic(finite.model)
    experience = Experience(
        config, model, finite.sampler(), PromptOrder(finite.asked, 0), finite.judge, finite.reference
    )
    data = RolloutData(experience.collect, samples_per_micro_batch=SAMPLES, num_iterations=2)
    assert finite.distance(beta) > 0.4
    Trainer(model, functools.partial(ppo_loss, config=config), data, train, steps).train()
    assert finite.distance(beta) < CLOSE
    values = model.value_head(finite.model(torch.arange(prompts)[:, None]))[:, 0]
    best = finite.world.best(beta)  # the critic's guess of a prompt is what it is worth, KL paid
    worth = (np.exp(best) * (finite.world.rewards_PA - beta * (best - finite.world.ref_logprobs_PA))).sum(1)
    assert np.allclose(values.detach().numpy(), worth, atol=0.25)


def practise(finite: Finite, method: str, beta: float, steps: int) -> None:
    """GRPO has KL in its loss, the others in their reward."""
    loss = PolicyLossConfig(
        loss_type="bnpo", beta=beta if method.startswith("grpo") else 0.0, use_bias_correction_kl=method == "grpo"
    )
    sampler, group = finite.sampler(), SAMPLES // finite.prompts

    def collect(number: int):
        rollout = sampler([prompt.ids for prompt in finite.asked], group, number)
        reward_N = finite.judge(finite.asked, rollout, group).total_N
        with finite.reference(finite.model) as before:
            ref_NC = rollout_logprobs(before, rollout, samples_at_a_time=SAMPLES)
        kl_NC = (rollout.logprobs_NC - ref_NC) * rollout.mask_NC
        if method.startswith("grpo"):
            advantages = group_relative(reward_N, group, "none")
        elif method == "rloo":
            advantages = leave_one_out(reward_N - beta * kl_NC.sum(1), group)
        else:
            advantages = reinforce_plus_plus(at_last_token(reward_N, rollout.mask_NC) - beta * kl_NC, rollout.mask_NC)
        return rollout, {"old": rollout.logprobs_NC, "ref": ref_NC, "advantages": advantages}

    def objective(model, batch: PolicyBatch) -> Loss:
        columns = batch.columns
        return policy_loss(
            Tokens(policy_logprobs(model, batch), columns["old"], columns["advantages"], batch.sample_K,
                   batch.num_samples, columns["ref"]), loss,
        )  # fmt: skip

    data = RolloutData(collect, samples_per_micro_batch=SAMPLES, num_iterations=1)
    Trainer(finite.model, objective, data, settings(steps), steps).train()


@pytest.mark.parametrize("method", ["grpo", "rloo", "reinforce"])
def test_grpo_and_reinforce_reach_the_best_policy(method):
    finite = Finite(8, 1, 4)
    practise(finite, method, beta=0.5, steps=80)
    assert finite.distance(0.5) < CLOSE


def test_grpo_as_first_published_reaches_another_policy_which_is_known_too():
    """The gradient of k3 on samples is that of KL(reference || policy), so what holds at rest is

    policy(y) (r(y) - mean r) = beta (policy(y) - ref(y)), so policy(y) = beta ref(y) / (c - r(y)); they sum to 1.
    """
    finite, beta = Finite(8, 1, 4), 0.5
    practise(finite, "grpo, first published", beta, steps=100)
    assert finite.distance(beta) > 2 * CLOSE
    ref_PA, rewards_PA = np.exp(finite.world.ref_logprobs_PA), finite.world.rewards_PA
    low, high = rewards_PA.max(1) + 1e-9, rewards_PA.max(1) + beta
    for _ in range(100):
        c = (low + high) / 2
        too_much = (beta * ref_PA / (c[:, None] - rewards_PA)).sum(1) > 1
        low, high = np.where(too_much, c, low), np.where(too_much, high, c)
    at_rest = np.log(beta * ref_PA / (high[:, None] - rewards_PA))
    mine = finite.logprobs_PA().numpy()
    assert (np.exp(mine) * (mine - at_rest)).sum(1).mean() < CLOSE


# --- the four quadrants of PPO's clip -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.5, 2.0, -1.2 * 2.0, 0.0),  # better, and likelier by enough: nothing more to gain
        (0.5, 2.0, -0.5 * 2.0, -0.5 * 2.0),  # better, but less likely: all of the gradient
        (1.5, -2.0, 1.5 * 2.0, 1.5 * 2.0),  # worse, yet likelier: all of the gradient
        (0.5, -2.0, 0.8 * 2.0, 0.0),  # worse, and less likely by enough
        (1.0, 2.0, -2.0, -2.0),  # the first update: the policy gradient itself
    ],
)
def test_quadrants_of_the_clip(ratio, advantage, value, gradient):
    old = torch.tensor([-2.0])
    logprob = (old + math.log(ratio)).requires_grad_()
    tokens = Tokens(logprob, old, torch.tensor([advantage]), torch.tensor([0]), 1)
    loss = policy_loss(tokens, PolicyLossConfig(loss_type="bnpo", epsilon=0.2))
    loss.sum.backward()
    assert loss.sum.item() == pytest.approx(value)
    assert float(logprob.grad) == pytest.approx(gradient)
    assert float(loss.metrics["clip_ratio/region_mean"]) == (gradient == 0)


# --- preferences --------------------------------------------------------------------------------------------------


def test_dpo_begins_at_ln_2_and_reaches_the_same_policy():
    """All pairs, each as often as raters who know the rewards would vote so."""
    finite, beta = Finite(8, 1, 4), 0.5
    rewards = torch.tensor(finite.world.rewards_PA, dtype=torch.float32)
    chosen, rejected = (~torch.eye(8, dtype=torch.bool)).nonzero().T
    votes_PK = torch.sigmoid(rewards[:, chosen] - rewards[:, rejected]).flatten()
    ref_PA = torch.tensor(finite.world.ref_logprobs_PA, dtype=torch.float32)
    ones = torch.ones(len(votes_PK))
    config = DpoConfig(model="-", data="-", beta=beta)
    losses, rate = [], 0.01
    optimizer = torch.optim.AdamW(finite.model.parameters(), rate, weight_decay=0.0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / 300)
        logprobs_PA = finite.model.logits(finite.model(torch.arange(4)[:, None]))[:, 0].log_softmax(-1)
        pairs = [of[:, y].flatten() for of in (logprobs_PA, ref_PA) for y in (chosen, rejected)]
        answers = Answers(*pairs, ones, ones, 0 * ones, ones)
        loss = (votes_PK * preference_loss(answers, config)).sum() / votes_PK.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert finite.distance(beta) < CLOSE
