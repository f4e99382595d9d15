"""A checkpoint of any number of ranks is taken up by any other, and the run goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import difference, plain, together
from runs import make
from safetensors import safe_open

from zero2hero.train.checkpoint import folder_of, verify
from zero2hero.train.ema import WeightAverage
from zero2hero.train.parallel import ALONE, Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

# (ranks, tensor-parallel, fsdp) of the first ten steps, and of the last ten
ALONE_, DATA_4, FSDP_4, TENSOR_4 = (1, 1, False), (4, 1, False), (4, 1, True), (4, 2, True)
FSDP_2, DATA_2 = (2, 1, True), (2, 1, False)


def part(ranks: Ranks, folder: Path, until: int, fsdp: bool) -> dict[str, Any]:
    """Go on with the run in `folder` (or begin it) until step `until`; its losses, weights, average and moments."""
    trainer = make(ranks, folder, fsdp=fsdp, tp_size=ranks.tp_size, optim="muon", save_steps=10, max_grad_norm=0.5,
                   max_steps=20)  # fmt: skip
    average = WeightAverage(0.9)
    trainer.watchers.append(average)
    trainer.resume()
    while trainer.state.step < until:
        trainer.step()
        trainer._log()
    trainer.save()
    with average.applied(trainer):
        mean = plain(trainer.masters.gathered())
    return {"losses": trainer.tracker.losses, "weights": trainer.masters.gathered(), "average": mean}


def run(kind: tuple[int, int, bool], folder: Path, until: int) -> dict[str, Any]:
    size, tp_size, fsdp = kind
    if size == 1:
        return plain(part(ALONE, folder, until, fsdp))
    return together(size, part, folder, until, fsdp, tp_size=tp_size)[0]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, Any]:
    return run(ALONE_, tmp_path_factory.mktemp("straight"), 20)


@pytest.mark.parametrize(
    ("first", "then"),
    [(FSDP_4, ALONE_), (FSDP_4, FSDP_2), (ALONE_, FSDP_4), (TENSOR_4, FSDP_2), (FSDP_2, TENSOR_4), (DATA_4, DATA_2)],
)
def test_another_number_of_ranks_goes_on(tmp_path, straight, first, then):
    begun = run(first, tmp_path, 10)
    assert verify(folder_of(tmp_path, 10)) is None
    ended = run(then, tmp_path, 20)
    losses = begun["losses"] + ended["losses"]
    assert len(losses) == 20
    assert np.abs(np.subtract(losses, straight["losses"])).max() < 1e-5
    assert difference(ended["weights"], straight["weights"]) < 1e-5
    assert difference(ended["average"], straight["average"]) < 1e-5


def test_each_rank_writes_its_part_and_nothing_is_pickled(tmp_path):
    run(FSDP_4, tmp_path, 2)
    folder = folder_of(tmp_path, 2)
    for name in ("model", "optimizer"):
        files = sorted((folder / name).iterdir())
        assert len(files) == 4
        sizes = []
        for file in files:
            with safe_open(str(file), framework="pt") as tensors:
                sizes.append(sum(tensors.get_tensor(key).numel() for key in tensors.keys()))  # noqa: SIM118
        assert max(sizes) < 1.5 * sum(sizes) / 4
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


def evaluated(ranks: Ranks, fsdp: bool) -> dict[str, Any]:
    """Weights after six steps with an evaluation by the average in between."""
    trainer = make(ranks, fsdp=fsdp, optim="sgd", learning_rate=0.1)
    average = WeightAverage(0.9)
    trainer.watchers.append(average)
    for step in range(6):
        if step == 3:
            with average.applied(trainer), torch.no_grad():
                trainer.objective(trainer.model, trainer.data(0)[0])
        trainer.step()
    return trainer.masters.gathered()


def test_training_goes_on_with_its_own_weights_after_the_average_was_evaluated():
    """What a divided model has gathered of the average is not used for the next step."""
    alone, divided = plain(evaluated(ALONE, False)), together(2, evaluated, True)[0]
    assert difference(divided, alone) < 1e-5
