"""Invariant 1 over ranks: however a step's rows are divided, among micro-batches or ranks, it is the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import difference, plain, together
from runs import make

from zero2hero.train.parallel import ALONE, Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(ranks: Ranks, batch_size: int, accumulation: int, clip: float = 0.0) -> dict[str, Any]:
    """One step's gradients, loss and norm, and how many targets each of this rank's micro-batches has."""
    trainer = make(ranks, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
                   max_grad_norm=clip, max_steps=1)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3, generator=generator)
    trainer.optimizers = []
    counts = [int((batch.targets_BT >= 0).sum()) for batch in trainer.data(0)]
    trainer.step()
    trainer._log()
    found = {name: p.grad for name, p in trainer.masters.parameters.items()}
    return {"gradients": found, "counts": counts} | {k: trainer.metrics[k] for k in ("loss", "grad_norm")}


def all_ways(ranks: Ranks) -> list[dict[str, Any]]:
    """Eight rows a step in every way that this number of ranks allows, and once with clipping."""
    rows = 8 // ranks.size
    ways = [(rows // parts, parts) for parts in (1, 2, 4, 8) if parts <= rows]
    return [gradients(ranks, *way) for way in ways] + [gradients(ranks, rows, 1, clip=0.05)]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return plain(all_ways(ALONE))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_and_micro_batches_do_not_change_the_step(alone, size):
    whole, clipped = alone[0], alone[-1]
    by_rank = together(size, all_ways)
    for found in by_rank:
        for one in found[:-1]:
            assert difference(one["gradients"], whole["gradients"]) < 1e-6
            assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
            assert one["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        assert difference(found[-1]["gradients"], clipped["gradients"]) < 1e-6
    counts = [found[0]["counts"] for found in by_rank]
    assert len({tuple(c) for c in counts}) > 1  # unequal shares: a mean of the ranks' means would be another number
    assert sum(map(sum, counts)) == sum(whole["counts"])


def test_micro_batches_alone(alone):
    for one in alone[1:-1]:
        assert difference(one["gradients"], alone[0]["gradients"]) < 1e-6
