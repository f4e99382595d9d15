"""What alignment can be told: reward models, preferences, reinforcement learning. Like config.py, without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from zero2hero.config import DecoderConfig, TokenizerConfig, TrainConfig, at_least, one_of
from zero2hero.errors import UserError, did_you_mean
from zero2hero.tuning_configs import TuneConfig, tuning_defaults

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def reward_defaults() -> TrainConfig:
    """Settings of the loop for a new head on a model that knows something already."""
    return dataclasses.replace(tuning_defaults(), learning_rate=1e-4, num_train_epochs=1.0, head_lr_scale=1.0)


@dataclass(frozen=True)
class RewardConfig(TuneConfig):
    """`zero2hero reward`: a model and preferences in, a model out that scores answers. Names are TRL's."""

    data: str | list[str] = "preferences"
    """Preferences (prompt, chosen, rejected; also margin) in any common form; other columns may stand beside them. A
    file, a folder, a hub data set, or the built-in preferences."""
    output_dir: str = "runs/reward"
    center_rewards_coefficient: float | None = None
    """What the square of a pair's summed rewards costs, so that rewards lie around 0; 0.01 is a good try."""
    train: TrainConfig = field(default_factory=reward_defaults)

    task = "text-classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center_rewards_coefficient is not None:
            at_least(self, 0, "center_rewards_coefficient")
        if self.method == "qlora":
            raise UserError("a reward model is saved as a whole, which one in 4 bits cannot be: use --method lora")


@dataclass(frozen=True)
class DistillConfig(TuneConfig):
    """`zero2hero distill`: a small model, a large one and data in; a small model out that predicts as the large one."""

    data: str | list[str] = "dialogues"  # as sft's: what is compared are the predictions of its answers
    teacher: str = ""  # the model to learn from, with the same tokenizer
    output_dir: str = "runs/distilled"
    beta: float = 0.5
    """How far is measured: 0 forward KL (cover all that the teacher says), 1 reverse KL (say nothing that it would
    not), between them the generalized Jensen-Shannon divergence."""
    temperature: float = 1.0  # divides both models' logits; above 1 unlikely tokens count more
    lmbda: float = 0.0  # the share of batches in which the student learns from answers of its own
    max_completion_length: int = 128  # tokens of these, at most
    train: TrainConfig = field(default_factory=tuning_defaults)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise UserError(
                "say which model to learn from: --teacher runs/large, a Hugging Face directory, or a hub id"
            )
        at_least(self, 1, "max_completion_length")
        at_least(self, 1e-3, "temperature")
        for name in ("beta", "lmbda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} lies in [0, 1], not {getattr(self, name)}")


@dataclass(frozen=True)
class BestOfNConfig:
    """`zero2hero best-of-n`: prompts and rewards in, the best of n answers out, as data for `zero2hero sft`."""

    model: str = ""  # the model that answers: a run, a Hugging Face directory, or a hub id
    data: str | list[str] = ""  # what to answer: records with a column `prompt`, or conversations
    output: str = "best_of_n.jsonl"  # where the answers go that are kept; beside it a report
    overwrite: bool = False  # an earlier output is replaced
    reward_funcs: list[str] = field(default_factory=list)  # what says how good an answer is, as for grpo
    reward_weights: list[float] = field(default_factory=list)  # what each of them counts; by default 1
    allow_code_execution: bool = False  # verifiers may run Python that the model wrote, in a sandbox
    n: int = 8  # answers to each prompt
    threshold: float | None = None  # keep every different answer with at least this score, in the place of the best
    max_prompts: int = 0  # answer the first so many; 0: all
    max_completion_length: int = 256  # tokens of an answer, at most
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    on_bad_record: str = "raise"  # a record that cannot be used is an error (raise), or is left out (skip)
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None  # fp32 or bf16; as stored by default

    def __post_init__(self) -> None:
        at_least(self, 1, "n", "max_completion_length")
        at_least(self, 0, "max_prompts")
        one_of(self, "on_bad_record", ("raise", "skip"))
        for name, example in (("model", "runs/mine"), ("data", "prompts.jsonl"), ("reward_funcs", "'[runs/reward]'")):
            if not getattr(self, name):
                raise UserError(f"best-of-n needs --{name}, such as --{name} {example}")


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


def grpo_defaults() -> TrainConfig:
    """Those of all online runs, with all samples of a step in one batch."""
    return dataclasses.replace(online_defaults(), per_device_train_batch_size=64)


@dataclass(frozen=True)
class GrpoConfig(OnlineConfig, PolicyLossConfig):
    """`zero2hero grpo`: prompts and rewards in, a policy that earns more of them out. Names and defaults are TRL's."""

    data: str | list[str] = "sums"
    """Prompts to answer: records with a column `prompt`, or questions, whose answers become the column `answer`. All
    other columns are handed to the reward functions. By default the built-in sums."""
    output_dir: str = "runs/grpo"
    reward_funcs: list[str] = field(default_factory=lambda: ["number"])
    """What says how good an answer is, as in '[number, rewards.py:politeness, runs/reward]': verifiers, functions of a
    file or a module, reward models. See align/rewards.py."""
    num_generations: int = 8  # answers to each prompt, which are compared with each other
    advantage_estimator: str = "grpo"
    """How much better than expected an answer was: grpo (than the mean of its group), rloo (than the mean of the
    others), reinforce_plus_plus (each token's return, whitened over the batch), reinforce_plus_plus_baseline (the same
    after the group's mean was taken off). The last three take KL (beta) off the reward, grpo adds it to the loss."""
    scale_rewards: str = "group"
    """Of grpo, what the difference is divided by: the standard deviation of the group, or of the batch; none."""
    steps_per_generation: int = 0
    """Micro-batches that a rollout is divided into; 0: as many as make one step (train.gradient_accumulation_steps)."""
    num_iterations: int = 1  # how often each rollout is learned from
    importance_sampling_clip_max: float = 3.0
    """Where sampler and training disagree (bf16; top_k, top_p, min_p) each token's loss is multiplied by the ratio of
    their probabilities, at most by this (truncated importance sampling)."""
    environment: str = ""
    """What answers the model during its answer: calculator, or path.py:Class (see align/environment.py)."""
    train: TrainConfig = field(default_factory=grpo_defaults)

    def __post_init__(self) -> None:
        OnlineConfig.__post_init__(self)
        PolicyLossConfig.__post_init__(self)
        at_least(self, 1, "num_generations", "num_iterations")
        at_least(self, 0, "steps_per_generation")
        at_least(self, 1.0, "importance_sampling_clip_max")
        one_of(self, "advantage_estimator", ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"))
        one_of(self, "scale_rewards", ("group", "batch", "none"))
        if self.num_generations < 2 and self.advantage_estimator != "reinforce_plus_plus":
            raise UserError(f"{self.advantage_estimator} compares answers to one prompt: num_generations is at least 2")
        if self.micro_batches % self.train.gradient_accumulation_steps:
            raise UserError(
                f"steps_per_generation {self.steps_per_generation} is not a multiple of "
                f"train.gradient_accumulation_steps {self.train.gradient_accumulation_steps}"
            )
        if self.samples_per_rollout % self.num_generations:
            raise UserError(
                f"a rollout of {self.samples_per_rollout} answers (train.per_device_train_batch_size times "
                f"steps_per_generation) does not divide into groups of num_generations {self.num_generations}"
            )

    @property
    def micro_batches(self) -> int:
        """Of a rollout."""
        return self.steps_per_generation or self.train.gradient_accumulation_steps

    @property
    def samples_per_rollout(self) -> int:
        return self.train.per_device_train_batch_size * self.micro_batches

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps."""
        return self.micro_batches // self.train.gradient_accumulation_steps * self.num_iterations


# --- preferences ----------------------------------------------------------------------------------------------

LOSS_TYPES = ("sigmoid", "robust", "sigmoid_norm", "ipo", "hinge", "exo_pair", "discopop", "sppo_hard", "nca_pair",
              "bco_pair", "apo_zero", "apo_down", "aot", "aot_unpaired", "sft", "cpo", "cpo_hinge", "cpo_ipo", "simpo",
              "orpo", "kto", "apo_zero_unpaired")  # fmt: skip
UNPAIRED = ("kto", "apo_zero_unpaired")
NO_DIVERGENCE = ("sppo_hard", "nca_pair", "bco_pair", "apo_zero", "apo_down", "aot", "aot_unpaired", "orpo", *UNPAIRED)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class PreferenceSettings:
    """What the losses of align/preference.py can be told; names and defaults are TRL's."""

    loss_type: str | list[str] = "sigmoid"
    """sigmoid (DPO; with label_smoothing cDPO), robust, sigmoid_norm, ipo, hinge, exo_pair, discopop, sppo_hard,
    nca_pair, bco_pair, apo_zero, apo_down, aot, aot_unpaired; without a reference cpo, cpo_hinge, cpo_ipo, simpo, orpo;
    of single answers that were liked or not kto, apo_zero_unpaired; sft to be mixed in, as '[sigmoid, sft]'."""
    loss_weights: list[float] = field(default_factory=list)  # of several losses; by default 1 each
    beta: float = 0.1  # the higher, the closer to the reference (of most losses)
    label_smoothing: float = 0.0  # the share of preferences that are taken to be wrong
    f_divergence_type: str = "reverse_kl"
    """What keeps the policy near the reference: reverse_kl, forward_kl, js_divergence, alpha_divergence."""
    f_alpha_divergence_coef: float = 0.5  # of alpha_divergence; 1 is reverse_kl; with cpo or simpo, 1 - AlphaPO's alpha
    ld_alpha: float | None = None
    """How much an answer's tokens beyond the length of its rival count (LD-DPO); by default as much as the others."""
    simpo_gamma: float = 0.5  # of simpo, the margin that is wanted
    cpo_alpha: float = 1.0  # of cpo, the weight of imitation
    discopop_tau: float = 0.05  # temperature of discopop's mixing
    desirable_weight: float = 1.0  # of kto, what liked answers count
    undesirable_weight: float = 1.0  # and the others

    @property
    def loss_types(self) -> list[str]:
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    def __post_init__(self) -> None:
        kinds = self.loss_types
        for kind in kinds:
            if kind not in LOSS_TYPES:
                raise UserError(f"loss_type is one of {', '.join(LOSS_TYPES)}, not {kind!r}."
                                f"{did_you_mean(kind, LOSS_TYPES)}")  # fmt: skip
        if not kinds or (len(kinds) > 1 and set(kinds) & set(UNPAIRED)):
            raise UserError(
                f"loss_type {kinds}: name one loss or several of pairs; {' and '.join(UNPAIRED)} stand alone"
            )
        if self.loss_weights and len(self.loss_weights) != len(kinds):
            raise UserError(f"loss_weights has {len(self.loss_weights)} numbers for {len(kinds)} losses")
        one_of(self, "f_divergence_type", DIVERGENCES)
        without = [kind for kind in kinds if kind in NO_DIVERGENCE]
        if self.f_divergence_type != "reverse_kl" and without:
            raise UserError(f"loss_type {without[0]} knows no f_divergence_type but reverse_kl")
        if not self.beta > 0:
            raise UserError(f"beta must be above 0, not {self.beta}")
        limit = 0.5 if "robust" in kinds else 1.0
        if not 0 <= self.label_smoothing < limit or ("exo_pair" in kinds and not self.label_smoothing):
            least = "above 0" if "exo_pair" in kinds else "at least 0"
            raise UserError(f"label_smoothing must be {least} and below {limit} for loss_type {', '.join(kinds)}, not "
                            f"{self.label_smoothing}")  # fmt: skip
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"ld_alpha is a share in [0, 1], not {self.ld_alpha}")
        if self.ld_alpha is not None and set(kinds) & set(UNPAIRED):
            raise UserError("ld_alpha compares the lengths of two answers: loss_type has no pairs")


def preference_defaults() -> TrainConfig:
    """Smaller steps than fine-tuning's: what was learned must not be lost."""
    return dataclasses.replace(tuning_defaults(), learning_rate=5e-5, num_train_epochs=1.0)


@dataclass(frozen=True)
class DpoConfig(TuneConfig, PreferenceSettings):
    """`zero2hero dpo`: a model and preferences in, a model that people prefer out."""

    data: str | list[str] = "preferences"
    """Preferences (prompt, chosen, rejected), and for kto single answers too (prompt, completion, label), in any common
    form; other columns may stand beside them. A file, a folder, a hub data set, or the built-in preferences."""
    output_dir: str = "runs/dpo"
    num_samples: int = 32
    """Held-out prompts that are answered at each evaluation: for the KL to the reference, and to be read. 0: none, and
    where every weight is trained no copy of the model is kept."""
    max_completion_length: int = 128  # tokens of these answers
    train: TrainConfig = field(default_factory=preference_defaults)

    def __post_init__(self) -> None:
        TuneConfig.__post_init__(self)
        PreferenceSettings.__post_init__(self)
        at_least(self, 0, "num_samples")
        at_least(self, 1, "max_completion_length")


def _cold_start_defaults() -> TrainConfig:
    """Of a model that begins with nothing. One that knows something wants a twentieth of the learning rate."""
    return TrainConfig(max_steps=250, learning_rate=0.01, per_device_train_batch_size=16, max_length=256)


def _practice_defaults() -> TrainConfig:
    return dataclasses.replace(
        grpo_defaults(), max_steps=250, learning_rate=3e-4, per_device_train_batch_size=256, max_length=256
    )


@dataclass(frozen=True)
class ReasonConfig(TuneConfig):
    """`zero2hero reason`: questions with worked answers in, a model that thinks before it answers out."""

    model: str = "new"
    """The model to begin with: a run, a Hugging Face directory, or a hub id; new: a small one that knows nothing yet
    (its `shape` and `tokenizer`)."""
    data: str | list[str] = "sums:20000"
    """Questions with worked answers in GSM8K's form: columns `question` and `answer`, which ends in "#### N"."""
    output_dir: str = "runs/reason"
    method: str = "full"
    cold_start_examples: int = 20_000  # of the worked answers, so many are shown; of the others the number alone counts
    reward_funcs: list[str] = field(default_factory=lambda: ["number", "think"])
    """What says how good an answer is; the first of them says what is right. See align/rewards.py."""
    reward_weights: list[float] = field(default_factory=lambda: [1.0, 0.1])
    num_generations: int = 16  # answers to each question, which are compared with each other
    beta: float = 0.0  # what one nat of KL to the model of the cold start costs
    max_completion_length: int = 128  # tokens of an answer, thought included
    eval_questions: int = 200  # of the held-out ones, measured before and after
    eval_samples: int = 16  # attempts at each, for pass@k and maj@k
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocab_size=512, pattern="qwen2"))
    """Of a new model. qwen2 cuts numbers into digits, which is how they are added."""
    shape: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(hidden_size=128, num_attention_heads=4, qk_norm=True)
    )
    cold_start: TrainConfig = field(default_factory=_cold_start_defaults)
    train: TrainConfig = field(default_factory=_practice_defaults)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "cold_start_examples", "eval_questions", "eval_samples", "max_completion_length")
