"""How far a policy has gone from its reference: estimators of the KL divergence, and what it costs.

KL(policy || reference) is a mean over what the policy would say. Reinforcement learning has samples of that only, each
with its log-probability under both. Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html),
names three estimators, with log r = log reference - log policy of one sample:

  k1 = -log r             unbiased; large variance, and negative half the time
  k2 = (log r)^2 / 2      biased, by the third power of the distance; small variance, never negative
  k3 = (r - 1) - log r    unbiased; small variance, never negative

In a reward they are numbers, and k1 or k3 pull towards the reference as the mean does. In a loss, where the gradient
goes through log policy of samples already drawn, they are not what their values are (Tang and Munos 2025, arXiv
2506.09477): the mean gradient of k1 is zero; of k2 it is the gradient of KL(policy || reference); of k3 it is the
gradient of KL(reference || policy), which is the same near the reference only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from zero2hero.errors import UserError


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-log r in nats, of the arguments' shape; each of the three is per token (or per sequence, given sums)."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2 in nats."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r in nats."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass
class KLController:
    """What one nat of KL costs in units of reward; with a target, it is made dearer until the policy stays there.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: a proportional controller in the coefficient's logarithm.
    Its whole state is `kl_coef`, so a checkpoint keeps that one number.

    Args:
        kl_coef: the cost, and the first one where it adapts.
        target: nats per completion to hold; None keeps `kl_coef` as it is.
        horizon: completions in which an error of 20 % or more changes the coefficient by about a factor of e^0.2.
    """

    kl_coef: float
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise UserError(f"kl_coef must be 0 or more, got {self.kl_coef}")
        if self.target is not None and (self.target <= 0 or self.kl_coef == 0 or self.horizon < 1):
            raise UserError(
                "a KL target must be above 0, and needs a kl_coef above 0 and a horizon of at least 1; got "
                f"target {self.target}, kl_coef {self.kl_coef}, horizon {self.horizon}"
            )

    def update(self, kl: float, completions: int) -> None:
        """Take notice of a rollout: its mean KL per completion in nats, and how many completions it has."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * completions / self.horizon
