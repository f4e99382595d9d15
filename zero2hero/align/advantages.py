"""How much better than expected was it? Rewards become advantages, by what is compared with.

  gae                  each token with a value model's guess (Schulman et al. 2015, arXiv 1506.02438): PPO
  group_relative       each completion with the others of its prompt (Shao et al. 2024, arXiv 2402.03300): GRPO
  leave_one_out        the same but itself, hence unbiased (Ahmadian et al. 2024, arXiv 2402.14740): RLOO
  reinforce_plus_plus  each token's return with all of the batch (Hu 2025, arXiv 2501.03262): REINFORCE++

Masks are True where the policy chose the token; padding may be on either side, and a tool's words in the middle: they
are passed over. Nothing here has a gradient.

B completions, T tokens; N completions that come in groups of `num_generations`, one prompt each; P prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zero2hero.errors import UserError

EPSILON = 1e-4  # beside a standard deviation of rewards, as in TRL


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages_BT, returns_BT): generalized advantage estimation; advantage + value is the value's target.

    With d_t = r_t + gamma V_{t+1} - V_t, the advantage is sum_k (gamma lam)^k d_{t+k}; V is 0 after the last token.
    lam = 1 compares the whole return with the value (no bias), lam = 0 looks one token ahead (little variance).
    Rewards and values where the mask is False are not looked at; what comes out there is 0.
    """
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = advantage_B = values_BT.new_zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        chosen_B, value_B = mask_BT[:, t].bool(), values_BT[:, t]
        surprise_B = rewards_BT[:, t] + gamma * next_value_B - value_B
        advantage_B = torch.where(chosen_B, surprise_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(chosen_B, value_B, next_value_B)
        advantages_BT[:, t] = torch.where(chosen_B, advantage_B, 0.0)
    return advantages_BT, torch.where(mask_BT.bool(), advantages_BT + values_BT, 0.0)


def discounted_returns(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """sum_k gamma^k r_{t+k} [B, T]: what was still to come at each token, itself included."""
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, lam=1.0)[0]


def at_last_token(scores_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Rewards [B, T] that are zero but at each completion's last chosen token, where its score is."""
    mask_BT = mask_BT.bool()
    is_last_BT = mask_BT & (mask_BT.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(is_last_BT, scores_B[:, None], 0.0)


def group_relative(rewards_N: Tensor, num_generations: int, scale_rewards: str = "group") -> Tensor:
    """GRPO's advantages [N]: reward minus the group's mean, over a standard deviation as `scale_rewards` says.

    "group" divides by each group's own, which makes prompts of all difficulties count alike; "batch" by that of all
    rewards (Liu et al. 2025, arXiv 2508.08221); "none" by nothing (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).
    Where all of a group are equal there is nothing to learn, and its advantages are 0. A reward that is NaN was not
    given: it does not count, and its advantage is 0.
    """
    rewards_PG = _grouped(rewards_N, num_generations)
    advantages_PG = rewards_PG - torch.nanmean(rewards_PG, dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages_PG = advantages_PG / (_nanstd(rewards_PG) + EPSILON)
    elif scale_rewards == "batch":
        advantages_PG = advantages_PG / (_nanstd(rewards_PG.reshape(1, -1)) + EPSILON)
    elif scale_rewards != "none":
        raise UserError(f"scale_rewards must be group, batch or none, got '{scale_rewards}'")
    equal_P = groups_without_spread(rewards_N, num_generations)
    return advantages_PG.masked_fill(equal_P[:, None], 0.0).nan_to_num(nan=0.0).reshape(-1)


def groups_without_spread(rewards_N: Tensor, num_generations: int) -> Tensor:
    """Which groups teach nothing, for all their rewards are equal. [P] booleans (TRL logs frac_reward_zero_std)."""
    rewards_PG = _grouped(rewards_N, num_generations)
    low_P = rewards_PG.nan_to_num(nan=float("inf")).amin(1)
    high_P = rewards_PG.nan_to_num(nan=float("-inf")).amax(1)
    return high_P - low_P <= 1e-8


def leave_one_out(rewards_N: Tensor, num_generations: int, normalize_advantages: bool = False) -> Tensor:
    """RLOO's advantages [N]: reward minus the mean of the group's others; NaN as in `group_relative`.

    Equal to `group_relative` without scale, times G / (G - 1): that factor makes it unbiased.
    """
    if num_generations < 2:
        raise UserError(
            f"RLOO compares with the others of a group: num_generations must be 2 or more, got {num_generations}"
        )
    rewards_PG = _grouped(rewards_N, num_generations)
    given_P1 = (~rewards_PG.isnan()).sum(1, keepdim=True)
    others_PG = (rewards_PG.nansum(1, keepdim=True) - rewards_PG) / (given_P1 - 1)
    advantages_N = (rewards_PG - others_PG).reshape(-1)
    if normalize_advantages:
        advantages_N = (advantages_N - advantages_N.nanmean()) / (_nanstd(advantages_N[None])[0] + EPSILON)
    return advantages_N.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def reinforce_plus_plus(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """REINFORCE++'s advantages [B, T]: each token's return, whitened over all tokens of the batch.

    Rewards are per token: a score `at_last_token`, minus what KL costs at each. Its variant "baseline" first takes the
    group's mean from the scores: `at_last_token(group_relative(scores_N, G, "none"), mask_BT)`.
    """
    return whiten(discounted_returns(rewards_BT, mask_BT, gamma), mask_BT)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over what the mask keeps, 0 elsewhere; without `shift_mean` the mean stays as it was.

    The variance is that of a sample (divided by n - 1). One value alone, or equal values, become 0 (or stay).
    """
    mask = mask.bool()
    kept = values[mask].float()
    if kept.numel() == 0:
        return torch.zeros_like(values)
    mean = kept.mean()
    variance = kept.var() if kept.numel() > 1 else kept.new_zeros(())
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over what the mask keeps; 0 where it keeps nothing."""
    mask = mask.bool()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _grouped(rewards_N: Tensor, num_generations: int) -> Tensor:
    """[P, G]; completions of one prompt stand side by side."""
    if num_generations < 1 or len(rewards_N) % num_generations:
        raise UserError(f"{len(rewards_N)} rewards do not make groups of num_generations = {num_generations}")
    return rewards_N.view(-1, num_generations).float()


def _nanstd(values_PG: Tensor) -> Tensor:
    """Each row's standard deviation [P, 1], divided by n - 1, of what is not NaN; 0 where that is fewer than two."""
    count_P1 = (~values_PG.isnan()).sum(1, keepdim=True)
    squares_P1 = (values_PG - values_PG.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return torch.where(count_P1 > 1, squares_P1 / (count_P1 - 1), 0.0).sqrt()
