"""The classifying objective: equal to the definition of cross entropy, and blind to what has no label."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zero2hero.train.objectives import classification


class Scores(nn.Module):
    """Logits that are given."""

    def forward(self, logits: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return logits * scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def by_definition(logits: list[float], label: int, smoothing: float = 0.0) -> float:
    logprobs = [x - math.log(sum(map(math.exp, logits))) for x in logits]
    return -(1 - smoothing) * logprobs[label] - smoothing * sum(logprobs) / len(logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_sum_of_cross_entropies(shape, smoothing):
    rows = [[1.0, -2.0, 0.5], [0.0, 0.0, 3.0], [2.0, 1.0, 0.0], [-1.0, 4.0, 0.0]]
    labels = [0, 2, -100, 0]
    batch = SimpleNamespace(inputs=(torch.tensor(rows).view(*shape, 3), 1.0), labels=torch.tensor(labels).view(shape))
    loss = classification(Scores(), batch, smoothing)
    expected = sum(by_definition(row, label, smoothing) for row, label in zip(rows, labels) if label >= 0)
    assert float(loss.sum) == pytest.approx(expected, abs=1e-5)
    assert float(loss.weight) == 3
    assert int(loss.metrics["accuracy"]) == 2


def test_the_arguments_reach_the_model():
    batch = SimpleNamespace(inputs=(torch.tensor([[1.0, 0.0]]), -1.0), labels=torch.tensor([1]))
    assert int(classification(Scores(), batch).metrics["accuracy"]) == 1
