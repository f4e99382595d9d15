"""Advantages against slow references and against TRL's arithmetic; KL controllers."""

from __future__ import annotations

import math

import pytest
import torch

from zero2hero.align.advantages import (
    at_last_token,
    discounted_returns,
    gae,
    group_relative,
    groups_without_spread,
    leave_one_out,
    masked_mean,
    reinforce_plus_plus,
    whiten,
)
from zero2hero.align.kl import KLController
from zero2hero.errors import UserError


def slow_gae(rewards, values, gamma, lam):
    """By the definition: every advantage is a sum over all later surprises."""
    count = len(rewards)
    surprises = [
        rewards[t] + (gamma * values[t + 1] if t + 1 < count else 0.0) - values[t] for t in range(count)
    ]  # fmt: skip
    return [sum((gamma * lam) ** (k - t) * surprises[k] for k in range(t, count)) for t in range(count)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_its_definition_on_ragged_rows_with_padding_on_both_sides_and_holes(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    mask = torch.zeros(6, 11, dtype=torch.bool)
    for row, kept in enumerate([range(11), range(3, 11), range(5), [2, 3, 6, 7, 9], [4], []]):
        mask[row, list(kept)] = True
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(6):
        wanted = slow_gae(rewards[row][mask[row]].tolist(), values[row][mask[row]].tolist(), gamma, lam)
        assert advantages[row][mask[row]].tolist() == pytest.approx(wanted, abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    torch.testing.assert_close(returns[mask], (advantages + values)[mask], rtol=0, atol=0)


def test_padding_may_hold_anything_at_all():
    mask = torch.tensor([[True, True, False]])
    rewards, values = torch.tensor([[0.0, 1.0, math.nan]]), torch.tensor([[0.5, 0.5, math.inf]])
    for result in gae(rewards, values, mask):
        assert result.isfinite().all()


def test_returns_count_what_is_still_to_come():
    mask = torch.tensor([[True, True, False, True]])
    assert discounted_returns(torch.tensor([[1.0, 2.0, 9.0, 4.0]]), mask, 0.5).tolist() == [[3.0, 4.0, 0.0, 4.0]]


def test_a_score_stands_at_the_last_token_the_policy_chose():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    assert at_last_token(torch.tensor([5.0, 7.0, 9.0]), mask).tolist() == [[0, 5, 0, 0], [0, 0, 0, 7], [0, 0, 0, 0]]


def trl_group_relative(rewards, group, scale):
    """The lines of TRL 1.16's GRPOTrainer._generate_and_score_completions."""
    from trl.trainer.utils import nanstd

    mean = torch.nanmean(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
    if scale in ["group", "none"]:
        std = nanstd(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
    else:
        std = nanstd(rewards).expand_as(rewards)
    advantages = rewards - mean
    if scale != "none":
        advantages = advantages / (std + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_equals_trl(scale):
    pytest.importorskip("trl")
    torch.manual_seed(1)
    rewards = torch.randn(24)
    rewards[[0, 9, 10, 16, 17, 18]] = math.nan
    torch.testing.assert_close(group_relative(rewards, 4, scale), trl_group_relative(rewards, 4, scale))


def trl_rloo(rewards, group, normalize):
    """The lines of TRL 1.16's RLOOTrainer."""
    from trl.trainer.utils import nanstd

    grouped = rewards.view(-1, group)
    counts = (~torch.isnan(grouped)).sum(dim=1, keepdim=True)
    baselines = ((torch.nansum(grouped, dim=1, keepdim=True) - grouped) / (counts - 1)).view(-1)
    advantages = rewards - baselines
    if normalize:
        advantages = (advantages - torch.nanmean(advantages)) / (nanstd(advantages) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_equals_trl(normalize):
    pytest.importorskip("trl")
    torch.manual_seed(2)
    rewards = torch.randn(20)
    rewards[[1, 6]] = math.nan
    torch.testing.assert_close(leave_one_out(rewards, 5, normalize), trl_rloo(rewards, 5, normalize))


def test_leave_one_out_is_the_group_mean_times_a_factor():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(leave_one_out(rewards, 4), group_relative(rewards, 4, "none") * 4 / 3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing_and_are_counted(scale):
    rewards = torch.tensor([0.1] * 7 + [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0] + [math.nan] * 7)
    advantages = group_relative(rewards, 7, scale)
    assert not advantages[:7].any()
    assert advantages[7:14].abs().min() > 0
    assert not advantages[14:].any()
    assert groups_without_spread(rewards, 7).tolist() == [True, False, True]
    assert leave_one_out(torch.full((4,), 0.1), 4).abs().max() < 1e-6


def test_reinforce_plus_plus_is_white_over_the_batch():
    torch.manual_seed(4)
    mask = torch.rand(8, 6) < 0.7
    advantages = reinforce_plus_plus(at_last_token(torch.randn(8), mask) - 0.1 * torch.rand(8, 6), mask)
    assert advantages[mask].mean().abs() < 1e-6
    assert abs(float(advantages[mask].var()) - 1) < 1e-5
    assert not advantages[~mask].any()


def test_whitening():
    values, mask = torch.tensor([1.0, 3.0, math.nan, 5.0]), torch.tensor([1, 1, 0, 1])
    assert whiten(values, mask).tolist() == pytest.approx([-1, 0, 0, 1])
    assert whiten(values, mask, shift_mean=False).tolist() == pytest.approx([2, 3, 0, 4])
    assert whiten(values, torch.tensor([1, 0, 0, 0])).tolist() == [0, 0, 0, 0]
    assert whiten(values, torch.zeros(4)).tolist() == [0, 0, 0, 0]
    assert float(masked_mean(values, mask)) == 3.0
    assert float(masked_mean(values, torch.zeros(4))) == 0.0


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(UserError, match="7 rewards do not make groups"):
        group_relative(torch.zeros(7), 4)
    with pytest.raises(UserError, match="scale_rewards"):
        group_relative(torch.zeros(8), 4, "std")
    with pytest.raises(UserError, match="2 or more"):
        leave_one_out(torch.zeros(8), 1)


def test_the_adaptive_controller_holds_its_target():
    """Ziegler's numbers; and on a policy whose KL is what the coefficient allows, it settles at the target."""
    controller = KLController(0.2, target=6.0, horizon=10_000)
    controller.update(kl=12.0, completions=256)  # an error of 100 % counts as 20 %
    assert controller.kl_coef == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))
    controller.update(kl=5.4, completions=1000)  # 10 % too little
    assert controller.kl_coef == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000) * (1 - 0.1 * 1000 / 10_000))
    controller = KLController(1.0, target=2.0, horizon=100)
    for _ in range(200):
        controller.update(kl=1 / controller.kl_coef, completions=50)
    assert 1 / controller.kl_coef == pytest.approx(2.0, rel=0.02)


def test_the_fixed_controller_stays_and_bad_ones_are_refused():
    controller = KLController(0.05)
    controller.update(kl=100.0, completions=64)
    assert controller.kl_coef == 0.05
    for bad in ({"kl_coef": -0.1}, {"kl_coef": 0.0, "target": 1.0}, {"kl_coef": 0.1, "target": -1.0}):
        with pytest.raises(UserError):
            KLController(**bad)
