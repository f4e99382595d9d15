"""The gradient noise scale where it is known: gradients with a given mean and a given noise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zero2hero.train.noise_scale import NoiseScale

pytestmark = pytest.mark.usefixtures("one_thread")


def step(watcher: NoiseScale, gradients: list[torch.Tensor], weights: list[float]) -> None:
    """One step of micro-batches with these mean gradients over so many tokens."""
    total, weight = torch.zeros_like(gradients[0]), 0.0
    trainer = SimpleNamespace(
        masters=SimpleNamespace(gradients=[total], divided=False),
        config=SimpleNamespace(gradient_accumulation_steps=len(gradients)),
        ranks=SimpleNamespace(data_size=1),
        metrics={},
    )
    for index, (gradient, tokens) in enumerate(zip(gradients, weights)):
        total += gradient * tokens
        weight += tokens
        watcher.after_micro_batch(trainer, index, weight)
    trainer.step_weight, trainer.metrics["grad_norm"] = weight, float((total / weight).norm())
    watcher.before_update(trainer)


def test_the_scale_of_known_noise():
    """Tokens with gradient G + noise of variance s each in D dimensions: the scale is D s / |G|^2."""
    generator = torch.Generator().manual_seed(0)
    mean, variance, dimensions = torch.full((50,), 0.1), 0.5, 50
    watcher = NoiseScale()
    for _ in range(400):
        noise = [(variance / tokens) ** 0.5 * torch.randn(dimensions, generator=generator) for tokens in (20, 30, 50)]
        step(watcher, [mean + n for n in noise], [20, 30, 50])
    expected = dimensions * variance / float(mean.square().sum())
    assert watcher.metrics()["gradient_noise_scale"] == pytest.approx(expected, rel=0.25)


def test_two_sizes_solve_two_equations():
    """One step by hand: |g_10|^2 = 5 and |g_40|^2 = 2 give |G|^2 = 1 and S = 40."""
    watcher = NoiseScale()
    first, rest = torch.tensor([5.0**0.5, 0.0]), torch.tensor([0.0, 0.0])
    rest[0] = (40 * (2 - 0.25) ** 0.5 - 10 * 5**0.5) / 30
    rest[1] = 40 * 0.5 / 30
    step(watcher, [first, rest], [10, 30])
    assert watcher.noise / watcher.signal == pytest.approx(40, rel=1e-5)


def test_a_single_micro_batch_says_nothing():
    watcher = NoiseScale()
    step(watcher, [torch.ones(3)], [8])
    assert watcher.metrics() == {}


def test_it_remembers_over_a_resume():
    one, other = NoiseScale(), NoiseScale()
    step(one, [torch.tensor([3.0, 1.0]), torch.tensor([3.0, -1.0])], [8, 8])
    other.load_state_dict(one.state_dict())
    for watcher in (one, other):
        step(watcher, [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])], [8, 8])
    assert one.metrics() == other.metrics() != {}
