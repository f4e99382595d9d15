"""A world of preferences so small that the best policy is known in closed form.

There are P prompts and A answers; each answer is worth r(x, y), and a reference policy says it with probability
ref(y | x). What alignment wants is a policy that maximizes E[r] - beta KL(policy || ref). The only one that does
(Korbak et al. 2022, arXiv 2205.11275; Rafailov et al. 2023, arXiv 2305.18290, section 4) is

    best(y | x) = ref(y | x) exp(r(x, y) / beta) / Z(x)        and it reaches    mean over x of beta ln Z(x)

Reinforcement learning gets there by trying answers, DPO by comparisons that raters make with noise: the first of two
is preferred with probability sigmoid(r(x, first) - r(x, second)) (Bradley and Terry 1952).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zero2hero.errors import UserError

Floats = NDArray[np.float64]


class PrefWorld:
    """Known rewards and a known reference. Prompts and answers are numbers.

    Attributes:
        rewards_PA: what each answer to each prompt is worth.
        ref_logprobs_PA: ln ref(y | x) in nats; by default drawn at random.
    """

    def __init__(
        self, seed: int = 0, prompts: int = 4, answers: int = 8, ref_logprobs_PA: Floats | None = None
    ) -> None:
        if prompts < 1 or answers < 2:
            raise UserError(f"a world of preferences needs a prompt and 2 answers, not {prompts} and {answers}")
        rng = np.random.default_rng([seed, 0x70726566])
        self.rewards_PA: Floats = rng.normal(size=(prompts, answers))
        drawn = _log_softmax(rng.normal(size=(prompts, answers)))
        self.ref_logprobs_PA: Floats = drawn if ref_logprobs_PA is None else _log_softmax(ref_logprobs_PA)
        if self.ref_logprobs_PA.shape != self.rewards_PA.shape:
            raise UserError(f"{prompts} prompts with {answers} answers, but a reference of {ref_logprobs_PA.shape}")  # type: ignore[union-attr]

    def best(self, beta: float) -> Floats:
        """ln best(y | x) [P, A] for a nat of KL that costs `beta`."""
        return _log_softmax(self.ref_logprobs_PA + self.rewards_PA / beta)

    def objective(self, logprobs_PA: Floats, beta: float) -> float:
        """E[r] - beta KL(policy || ref) of any policy, over all prompts alike; `best` has the highest."""
        value_PA = self.rewards_PA - beta * (logprobs_PA - self.ref_logprobs_PA)
        return float((np.exp(logprobs_PA) * value_PA).sum(1).mean())

    def distance(self, logprobs_PA: Floats, beta: float) -> float:
        """KL(policy || best) in nats, the mean over prompts. The objective falls short by `beta` times this."""
        return float((np.exp(logprobs_PA) * (logprobs_PA - self.best(beta))).sum(1).mean())

    def preferences(self, count: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(prompts, chosen, rejected), `count` each: two different answers of the reference, and a noisy rater."""
        rng = np.random.default_rng([seed, 0x70616972])
        prompts = rng.integers(len(self.rewards_PA), size=count)
        ranks = self.ref_logprobs_PA[prompts] + rng.gumbel(size=(count, self.rewards_PA.shape[1]))
        first, second = np.argsort(-ranks, axis=1)[:, :2].T  # two of them without putting back
        margin = self.rewards_PA[prompts, first] - self.rewards_PA[prompts, second]
        agrees = rng.random(count) < 1 / (1 + np.exp(-margin))
        return prompts, np.where(agrees, first, second), np.where(agrees, second, first)


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
