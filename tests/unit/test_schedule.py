"""The learning-rate schedules, in closed form and against transformers'."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2hero.config import SCHEDULES, TrainConfig
from zero2hero.errors import UserError
from zero2hero.train.schedule import learning_rate_factor, resolve_steps


def factors(kind: str, total: int = 100, **settings) -> list[float]:
    return [learning_rate_factor(step, total, kind, **settings) for step in range(total)]


@pytest.mark.parametrize("warmup", [10, 0.1])
def test_schedules_in_closed_form(warmup):
    rising = [(step + 1) / 11 for step in range(10)]
    constant = factors("constant", warmup_steps=warmup)
    assert constant == pytest.approx(rising + [1.0] * 90)
    linear = factors("linear", warmup_steps=warmup)
    assert linear == pytest.approx(rising + [(90 - i) / 90 for i in range(90)])
    cosine = factors("cosine", warmup_steps=warmup)
    assert cosine == pytest.approx(rising + [(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)])
    for decay in (40, 0.4):
        stable = factors("warmup_stable_decay", warmup_steps=warmup, decay_steps=decay)
        assert stable == pytest.approx(rising + [1.0] * 50 + [(40 - i) / 40 for i in range(40)])


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 60),
    st.floats(0, 0.5) | st.integers(1, 60),
    st.floats(0, 1, exclude_max=True) | st.integers(1, 60),
)
@settings(deadline=None)
def test_every_schedule_rises_then_falls_and_never_stands_at_zero(kind, total, warmup, decay):
    values = factors(kind, total, warmup_steps=warmup, decay_steps=decay)
    assert all(0 < value <= 1 for value in values)
    w = min(resolve_steps(warmup, total), total)
    assert all(a < b for a, b in pairwise(values[:w]))
    assert all(a >= b for a, b in pairwise(values[w:]))


def test_a_share_is_of_the_whole_run():
    assert [resolve_steps(value, 200) for value in (0, 0.25, 1, 1.0, 30)] == [0, 50, 1, 1, 30]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_transformers(kind, warmup):
    """After the warm-up, step by step; decay to zero, linear at the end of warmup_stable_decay."""
    from transformers import get_scheduler

    arguments = {
        "polynomial": {"power": 2.5, "lr_end": 0.0},
        "warmup_stable_decay": {"num_decay_steps": 20, "decay_type": "linear"},
    }
    theirs = get_scheduler(
        "constant_with_warmup" if kind == "constant" else kind,
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
        num_warmup_steps=warmup, num_training_steps=60, scheduler_specific_kwargs=arguments.get(kind),
    )  # fmt: skip
    expected = []
    for _ in range(60):
        expected += theirs.get_last_lr()
        theirs.optimizer.step()
        theirs.step()
    ours = factors(kind, 60, warmup_steps=warmup, decay_steps=20, power=2.5)
    assert ours[warmup:] == pytest.approx(expected[warmup:])
    assert ours[:warmup] == pytest.approx([(i + 1) / (warmup + 1) for i in range(warmup)])


def test_an_unknown_schedule():
    with pytest.raises(UserError, match="polynomial"):
        TrainConfig(lr_scheduler_type="polynomal")
    with pytest.raises(ValueError, match="exponential"):
        learning_rate_factor(1, 10, "exponential")
