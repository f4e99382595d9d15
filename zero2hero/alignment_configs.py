"""What alignment can be told: reward models, preferences, reinforcement learning. Like config.py, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from zero2hero.config import at_least, one_of
from zero2hero.errors import UserError

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
