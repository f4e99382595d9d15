"""The command line under torchrun, from text to a model's directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import free_port
from safetensors.torch import load_file

import zero2hero as z2h
from zero2hero.data.worlds import world
from zero2hero.machine import Machine, processor_name
from zero2hero.train.tracking import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and a cache in which this machine's speed is already known (fp32 needs no measurement)."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "text.txt").write_text("\n\n".join(world("markov").documents(count=120)))
    known = {f"{processor_name()} x1 torch {torch.__version__}": vars(Machine("", 1, 1e9, 0.0, "as is"))}
    (folder / "cache").mkdir()
    (folder / "cache" / "machine.json").write_text(json.dumps(known))
    return folder


def start(folder: Path, name: str, *options: str, ranks: int = 1, rows: int = 4) -> subprocess.Popen:
    words = [
        "-m", "zero2hero", "pretrain", "--data", str(folder / "text.txt"), "--output_dir", str(folder / name),
        "--precision", "fp32", "--device", "cpu", "--report_to", "[]", "--tokenizer.kind", "char",
        "--model.hidden_size", "16", "--model.num_hidden_layers", "1", "--model.num_attention_heads", "2",
        "--train.max_length", "32", "--train.logging_steps", "1", "--train.learning_rate", "0.002",
        "--train.per_device_train_batch_size", str(rows // ranks), *options,
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *words]
    variables = {"ZERO2HERO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command, env=os.environ | variables | {"PYTHONPATH": paths}, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(folder: Path, name: str, *options: str, **more) -> tuple[int, str, str]:
    process = start(folder, name, *options, **more)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / name) if "loss" in row]


def test_two_ranks_leave_what_one_process_leaves(folder):
    code, _, error = run(folder, "one", "--train.max_steps", "10")
    assert code == 0, error
    for name, option in (("two", "false"), ("sharded", "true")):
        code, out, error = run(folder, name, "--train.max_steps", "10", "--train.fsdp", option, ranks=2)
        assert code == 0, error
        assert out.count("tokens to learn from") == 1  # one rank speaks
        assert "2 ranks" in out
        assert losses(folder, name) == pytest.approx(losses(folder, "one"), abs=1e-5)
        one, other = (load_file(folder / run / "model.safetensors") for run in ("one", name))
        assert one.keys() == other.keys()
        assert all((one[key] - other[key]).abs().max() < 1e-4 for key in one)
        last = [[row for row in read_metrics(folder / run) if "eval_loss" in row][-1] for run in ("one", name)]
        assert last[1]["eval_loss"] == pytest.approx(last[0]["eval_loss"], abs=1e-5)
        assert z2h.load(folder / name, device="cpu").generate("a", max_new_tokens=3, seed=0)


def test_a_signal_to_one_rank_stops_all_at_one_step(folder):
    steps = ["--train.max_steps", "2000", "--train.eval_steps", "100000", "--train.save_steps", "100000"]
    process = start(folder, "stopped", *steps, ranks=2)
    metrics = folder / "stopped" / "metrics.jsonl"
    end = time.monotonic() + 100
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(rank_one(process.pid), signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped and saved" in error
    (saved,) = (folder / "stopped" / "checkpoints").glob("step-*")
    at = int(saved.name.removeprefix("step-"))
    assert 0 < at < 2000
    assert len(losses(folder, "stopped")) == at
    process = start(folder, "stopped", *steps, "--resume", ranks=2)
    while len(losses(folder, "stopped")) < at + 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)


def rank_one(torchrun: int) -> int:
    """The process of rank 1 among torchrun's children."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("torchrun has no rank 1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.tp_size", "3"], "tp_size 3 does not divide the number of ranks, 2"),
        (["--train.max_length", "100000"], "the context is longer than the data"),
    ],
)
def test_errors_are_told_and_end_every_rank(folder, options, words):
    code, _, error = run(folder, "wrong", *options, ranks=2)
    assert code != 0
    assert any(line.startswith("zero2hero: ") and words in line for line in error.splitlines()), error


def test_without_the_others_it_does_not_wait_for_ever(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = run(folder, "wrong")
    assert code == 2
    assert "RANK is not set: start several processes with torchrun" in error
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, error = run(folder, "wrong", "--train.ddp_timeout", "1")
    assert code == 2
    assert "zero2hero, rank 1: rank 1 cannot join the others at 127.0.0.1:1" in error
