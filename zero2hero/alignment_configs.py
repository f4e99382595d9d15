"""What alignment can be told: reward models, preferences, reinforcement learning. Like config.py, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from zero2hero.config import TrainConfig, at_least, one_of
from zero2hero.errors import UserError
from zero2hero.tuning_configs import TuneConfig

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


@dataclass(frozen=True)
class PolicyLossConfig:
    """The loss of a policy that learns from its own samples (align/policy_loss.py); names and defaults are TRL's."""

    loss_type: str = "dapo"
    """What each token counts: dapo (all tokens alike), grpo (all completions), dr_grpo (over max_completion_length),
    bnpo (all tokens of a step); or another loss: cispo, sapo, luspo, vespo. See align/policy_loss.py."""
    importance_sampling_level: str = "token"
    """Whose ratio of new to old probability is clipped: token; sequence (GSPO); trajectory, the product of a
    completion's ratios (RLOO)."""
    epsilon: float = 0.2  # the ratio is clipped below at 1 - epsilon
    epsilon_high: float | None = None
    """... and above at 1 + epsilon_high, by default as far. Of cispo, the largest ratio that counts, by default 5."""
    delta: float | None = None  # the largest ratio that counts where a token turned out worse; above 1 + epsilon_high
    beta: float = 0.0  # what one nat of KL to the model as it was costs; 0 needs no reference
    use_bias_correction_kl: bool = True  # weigh the KL of each token by its ratio, as it is a mean over the new policy
    mask_truncated_completions: bool = False  # learn nothing from completions that were cut off
    top_entropy_quantile: float = 1.0  # learn from this share of the tokens, those at which the policy was undecided
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        one_of(self, "loss_type", LOSSES)
        one_of(self, "importance_sampling_level", ("token", "sequence", "trajectory"))
        at_least(self, 0, "epsilon", "beta")
        at_least(self, 1e-6, "sapo_temperature_pos", "sapo_temperature_neg")
        if not 0 < self.top_entropy_quantile <= 1:
            raise UserError(f"top_entropy_quantile is a share of the tokens in (0, 1], not {self.top_entropy_quantile}")
        if self.epsilon_high is not None:
            at_least(self, 0, "epsilon_high")
        if self.delta is not None and self.delta <= 1 + self.upper:
            raise UserError(f"delta {self.delta} bounds what clipping does not: it is above 1 + epsilon_high")
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            raise UserError("loss_type luspo is made for --importance_sampling_level sequence")

    @property
    def upper(self) -> float:
        """`epsilon_high`, where it is not given too."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return 5.0 if self.loss_type == "cispo" else self.epsilon


def online_defaults() -> TrainConfig:
    """Settings of the loop that suit a policy which learns from its own samples: small steps, nothing decays."""
    return TrainConfig(
        optim="adamw", learning_rate=1e-4, weight_decay=0.0, adam_beta2=0.999, lr_scheduler_type="constant",
        warmup_steps=0, num_train_epochs=1.0, per_device_train_batch_size=16, max_length=1024, logging_steps=1,
    )  # fmt: skip


@dataclass(frozen=True)
class OnlineConfig(TuneConfig):
    """What all runs have that learn from their own samples: `ppo` and `grpo`."""

    data: str | list[str] = ""
    """Prompts to answer: records with a column `prompt`, or conversations, whose last answer becomes the column
    `answer`. All other columns are handed to the reward functions."""
    reward_funcs: list[str] = field(default_factory=list)
    """What says how good an answer is, as in '[number, rewards.py:politeness, runs/reward]': verifiers, functions of a
    file or a module, reward models. See align/rewards.py."""
    reward_weights: list[float] = field(default_factory=list)
    """What each of them counts; by default 1. One that counts 0 is looked at alone, and shown."""
    allow_code_execution: bool = False  # verifiers may run Python that the model wrote, in a sandbox
    max_completion_length: int = 256  # tokens of an answer, at most
    temperature: float = 1.0  # of sampling
    top_k: int = 0  # sample from so many likeliest tokens only; 0: from all
    top_p: float = 1.0  # ... from the likeliest that have this probability together
    min_p: float = 0.0  # ... from those at least this share as likely as the likeliest
    num_eval_prompts: int = 64  # of the held-out prompts, so many are answered at each evaluation
    train: TrainConfig = field(default_factory=online_defaults)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_completion_length", "num_eval_prompts")
        if not self.data:
            raise UserError("say which prompts to answer: --data prompts.jsonl, records with a column `prompt`")
        if not self.reward_funcs:
            raise UserError(
                "say what rewards an answer: --reward_funcs '[number]', '[file.py:function]', '[runs/reward]'"
            )


@dataclass(frozen=True)
class PpoConfig(OnlineConfig):
    """`zero2hero ppo`: prompts and rewards in, a policy that earns more of them out. Names and defaults are TRL's."""

    output_dir: str = "runs/ppo"
    num_ppo_epochs: int = 4  # how often each rollout is learned from
    num_mini_batches: int = 1
    """Steps that an epoch over a rollout takes: a rollout has train.per_device_train_batch_size *
    train.gradient_accumulation_steps * num_mini_batches prompts, answered once each."""
    kl_coef: float = 0.05  # what one nat of KL to the model as it was costs, in units of reward
    kl_estimator: str = "k1"  # of each token's KL: k1 (unbiased), or k3 (unbiased too, never negative)
    target_kl: float | None = None
    """Nats per completion that kl_coef is adapted to hold (Ziegler et al. 2019); by default it stays as it is."""
    horizon: int = 10_000  # completions in which kl_coef adapts
    cliprange: float = 0.2  # the ratio of new to old probability counts within 1 +- this
    cliprange_value: float = 0.2  # the value may move by so much from what it was, as far as its loss goes
    vf_coef: float = 0.1  # what the value's loss counts
    gamma: float = 1.0  # what a reward one token later is worth
    lam: float = 0.95  # of GAE: 1 trusts rewards alone, 0 the value alone
    whiten_rewards: bool = False  # divide the rewards of a rollout by their standard deviation
    whiten_advantages: bool = True  # give the advantages of a rollout mean 0 and variance 1
    missing_eos_penalty: float | None = None  # taken off the score of a completion that was cut off

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_ppo_epochs", "num_mini_batches", "horizon")
        at_least(self, 0, "kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam")
        one_of(self, "kl_estimator", ("k1", "k3"))
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                raise UserError(f"{name} is at most 1, not {getattr(self, name)}")

    @property
    def samples_per_rollout(self) -> int:
        return self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps * self.num_mini_batches
