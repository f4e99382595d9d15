"""What a checkpoint holds, which are kept, and that a damaged one changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import FILES, kept, make, moments, run_config, same, text, weights  # noqa: F401

from zero2hero.errors import UserError
from zero2hero.train import checkpoint
from zero2hero.train.checkpoint import LATEST, MANIFEST, best_checkpoint, folder_of, newest_checkpoint, verify
from zero2hero.train.loop import Stopped, Trainer
from zero2hero.train.watch import Watcher

pytestmark = pytest.mark.usefixtures("one_thread")


def stepped(output_dir: Path, steps: int, **settings) -> Any:
    """A run that has done some steps and saved."""
    trainer = make(output_dir, **settings)
    for _ in range(steps):
        trainer.step()
    trainer.save()
    return trainer


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    return weights(trainer) | moments(trainer) | {"random": torch.get_rng_state()}


# --- what a checkpoint holds ----------------------------------------------------------------------------------


def test_the_manifest_describes_every_file(tmp_path):
    trainer = stepped(tmp_path, 3)
    folder = folder_of(tmp_path, 3)
    manifest = checkpoint.read_manifest(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES) == sorted([*manifest["files"], MANIFEST])
    assert manifest["step"] == 3
    described = manifest["files"]["model.safetensors"]
    assert described["bytes"] == (folder / "model.safetensors").stat().st_size
    assert described["tensors"] == {n: f"F32 {list(p.shape)}" for n, p in trainer.masters.parameters.items()}
    assert manifest["made_with"].keys() == {"settings"}


def test_every_random_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))

    trainer = stepped(tmp_path, 1)
    draw()  # an odd number of normal numbers: Python and NumPy keep the second of a pair for later
    trainer.save()
    expected = draw(), draw()
    torch.manual_seed(5)
    make(tmp_path).resume()
    assert (draw(), draw()) == expected


class Remembers(Watcher):
    """A moving average, and a count: a tensor in half precision and a number."""

    name = "remembers"

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros(16, dtype=torch.bfloat16), 0

    def after_update(self, trainer: Trainer) -> None:
        self.mean.lerp_(trainer.masters.parameters["norm.weight"].detach().bfloat16(), 0.1)
        self.count += 1

    def metrics(self) -> dict[str, float]:
        return {"mean": float(self.mean.float().sum()), "count": self.count}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "nested": {"count": self.count, "nothing": None, "list": [1, "two", 3.5]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["nested"]["list"] == [1, "two", 3.5]
        assert state["nested"]["nothing"] is None
        self.mean, self.count = state["mean"], state["nested"]["count"]


class Streams:
    """Data with a position of its own, and a remainder."""

    def __init__(self, batches) -> None:
        self.batches, self.position, self.remainder = batches, 0, torch.arange(3)
        self.stop_at = -1

    def __call__(self, step: int) -> list[Any]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        self.position += 1
        self.remainder = self.remainder * 3 % 101
        return self.batches(self.position + int(self.remainder[2]))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "remainder": self.remainder}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.remainder = state["position"], state["remainder"]


def test_watchers_data_and_sums_since_the_last_log_line_go_on_as_well(tmp_path):
    def run(output_dir) -> Any:
        trainer = make(output_dir, save_steps=4, logging_steps=6)
        trainer.watchers, trainer.data = [Remembers()], Streams(trainer.data)
        return trainer

    def rows(trainer: Any) -> list:
        learned = ("loss", "grad_norm", "learning_rate", "mean", "count", "num_tokens")
        return [(step, [row[name] for name in learned]) for step, row in trainer.tracker.rows]

    straight = run(tmp_path / "straight")
    straight.train()
    first, second = run(tmp_path / "stopped"), run(tmp_path / "stopped")
    first.data.stop_at = 3
    with pytest.raises(Stopped):
        first.train()
    assert second.resume() == 4
    second.train()
    assert rows(second) == [row for row in rows(straight) if row[0] > 4]
    assert same(weights(second), weights(straight))
    assert second.watchers[0].mean.dtype == torch.bfloat16
    assert torch.equal(second.data.remainder, straight.data.remainder)
    with pytest.raises(UserError, match=r"watched by \['remembers'\]"):
        make(tmp_path / "stopped").resume()


def test_moments_keep_their_dtype(tmp_path):
    """torch would load 8-bit moments as 32-bit ones."""

    class EightBit(torch.optim.SGD):
        pass

    def run() -> Any:
        trainer = make(tmp_path)
        trainer.optimizers = [EightBit(trainer.masters.parameters.values(), lr=0.1)]
        trainer._set_learning_rate = lambda: None
        return trainer

    trainer = run()
    for p in trainer.masters.parameters.values():
        trainer.optimizers[0].state[p] = {
            "codes": torch.arange(5, dtype=torch.uint8),
            "scale": torch.rand(2).bfloat16(),
        }
    trainer.step()
    trainer.save()
    again = run()
    again.resume()
    restored = moments(again)
    assert {t.dtype for t in restored.values()} == {torch.uint8, torch.bfloat16}
    assert same(restored, moments(trainer))


# --- which are kept -------------------------------------------------------------------------------------------


def falling_then_rising(step: int) -> float:
    return abs(step - 5) + 1.0


@pytest.mark.parametrize(("keep_best", "best"), [(0, []), (1, [5]), (3, [4, 5, 6])])
def test_the_best_are_kept_beside_the_last(tmp_path, keep_best, best):
    trainer = make(tmp_path, save_steps=100, eval_steps=1, keep_best=keep_best, keep_last=1,
                   evaluate=lambda: {"eval_loss": falling_then_rising(trainer.state.step)})  # fmt: skip
    trainer.train()
    assert kept(tmp_path) == [f"step-{step:06d}" for step in [*best, 12]]
    chosen = best_checkpoint(tmp_path)
    assert chosen == folder_of(tmp_path, 5 if best else 12)
    assert checkpoint.eval_loss(chosen) == (1.0 if best else 8.0)


def test_a_best_checkpoint_that_is_damaged_is_not_restored(tmp_path, capsys):
    seen = {}

    def evaluate() -> dict[str, float]:
        seen[trainer.state.step] = weights(trainer)
        if trainer.state.step == 7:
            (folder_of(tmp_path, 5) / "model.safetensors").write_bytes(b"no tensors")
        return {"eval_loss": falling_then_rising(trainer.state.step)}

    trainer = make(tmp_path, save_steps=1, eval_steps=1, early_stopping_patience=3, keep_best=2, evaluate=evaluate)
    trainer.train()
    assert trainer.state.step == 8
    assert "step-000005 is damaged" in capsys.readouterr().err
    assert same(weights(trainer), seen[4])
    assert trainer.metrics["eval_loss"] == 2.0


def test_what_was_half_deleted_or_half_written_is_swept(tmp_path):
    trainer = stepped(tmp_path, 1)
    for name in (".step-000009.abc", ".old.xyz", ".LATEST.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    trainer.save()
    assert kept(tmp_path) == ["step-000001"]


# --- damage ---------------------------------------------------------------------------------------------------


def damage(folder: Path) -> None:
    with open(folder / "state.json", "r+b") as stream:
        stream.write(b"!")


def test_when_none_is_whole_it_says_so(tmp_path, capsys):
    make(tmp_path, save_steps=6).train()
    damage(folder_of(tmp_path, 6))
    damage(folder_of(tmp_path, 12))
    again = make(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used: step-000012 is damaged .* 1 before it"):
        again.resume()
    assert capsys.readouterr().err.count("WARNING") == 2
    assert again.state.step == 0


def test_a_checkpoint_that_vanished_is_missed(tmp_path, capsys):
    make(tmp_path, save_steps=6).train()
    shutil.rmtree(folder_of(tmp_path, 12))
    assert make(tmp_path).resume() == 6
    assert "step-000012 is damaged (FileNotFoundError" in capsys.readouterr().err
    shutil.rmtree(folder_of(tmp_path, 6))
    with pytest.raises(UserError, match="no checkpoint"):
        make(tmp_path).resume()
    (tmp_path / "checkpoints" / LATEST).write_text("../../elsewhere\n")  # a name that is none points nowhere
    assert make(tmp_path).resume() == 0


@pytest.mark.parametrize(
    "manifest",
    [
        "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 1}}', '{"format": 2, "files": [1]}',
        '{"format": 2, "files": {"state.json": 3}}', "\xff",
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(tmp_path, manifest):
    stepped(tmp_path, 1)
    (folder_of(tmp_path, 1) / MANIFEST).write_text(manifest, encoding="latin-1")
    assert verify(folder_of(tmp_path, 1))
    with pytest.raises(UserError, match="no checkpoint"):
        newest_checkpoint(tmp_path)


def rewritten(folder: Path, file: str, change) -> None:
    """Put other content in a checkpoint and make its manifest agree."""
    path = folder / file
    change(path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][file] = checkpoint._describe(path)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verify(folder) is None


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def norm(value: torch.Tensor):
    return lambda path: change_tensors(path, lambda tensors: tensors.update({"norm.weight": value}))


UNFIT: list[tuple[str, Any, str]] = [
    ("model.safetensors", lambda p: change_tensors(p, lambda t: t.pop("norm.weight")), "norm.weight does not fit"),
    ("model.safetensors", lambda p: change_tensors(p, lambda t: t.update(extra=torch.ones(1))), "extra does not fit"),
    ("model.safetensors", norm(torch.ones(7)), r"\(7,\)"),
    ("model.safetensors", norm(torch.ones(16).half()), "float16"),
    ("optimizer.json", lambda p: change_json(p, lambda o: o.pop()), "another optimizer"),
    ("optimizer.json", lambda p: change_json(p, lambda o: o[0]["param_groups"].pop()), "another optimizer"),
    ("optimizer.json", lambda p: change_json(p, lambda o: o[0].pop("param_groups")), "optimizer"),
    ("optimizer.safetensors", lambda p: change_tensors(p, lambda t: t.popitem()), "cannot|can be read"),
    ("state.json", lambda p: change_json(p, lambda s: s["state"]["loop"].update(stop=1)), "stop"),
    ("state.json", lambda p: change_json(p, lambda s: s["state"].pop("watchers")), "watchers"),
    ("state.json", lambda p: change_json(p, lambda s: s.pop("random")), "random"),
    ("state.json", lambda p: p.write_text("[1, 2]"), "can be read"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "words"), UNFIT)
def test_what_does_not_fit_changes_nothing(tmp_path, file, change, words):
    stepped(tmp_path, 2)
    rewritten(folder_of(tmp_path, 2), file, change)
    again = make(tmp_path, model_seed=3)
    before = everything(again)
    with pytest.raises(UserError, match=words):
        again.resume()
    assert same(everything(again), before)
    assert again.state.step == 0


def test_a_checkpoint_made_with_something_else_is_refused(tmp_path):
    def run(tokenizer: str, **settings) -> Any:
        trainer = make(tmp_path, **settings)
        trainer.made_with |= {"tokenizer": tokenizer}
        return trainer

    trainer = run("a")
    trainer.step()
    trainer.save()
    assert run("a", save_steps=3, logging_steps=2, keep_last=7).resume() == 1  # these change nothing that is learned
    with pytest.raises(UserError, match="made with other tokenizer than this run has now"):
        run("b").resume()
    with pytest.raises(UserError, match="made with other settings and tokenizer"):
        run("b", weight_decay=0.5).resume()
