"""The learning-rate trial: curves with a known answer, a real short run, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pytest

from zero2hero.cli import VERBS, main
from zero2hero.command_line import parse
from zero2hero.config import DecoderConfig, TokenizerConfig, TrainConfig
from zero2hero.errors import UserError
from zero2hero.options import PlanLearningRateConfig
from zero2hero.plan import learning_rate
from zero2hero.plan.learning_rate import BELOW_BEST, command, suggest

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = np.geomspace(1e-5, 1, 101).tolist()


def curve(lowest: float) -> list[float]:
    """A loss that falls to a valley at one learning rate and then explodes."""
    return [3 - 2 * math.exp(-(math.log10(rate / lowest) ** 2)) + rate / lowest / 50 for rate in RATES]


@pytest.mark.parametrize("lowest", [1e-3, 1e-2])
def test_the_suggestion_lies_below_the_valley(lowest):
    noise = np.random.default_rng(0).normal(0, 0.03, len(RATES))
    assert suggest(RATES, (np.array(curve(lowest)) + noise).tolist()) == pytest.approx(lowest / BELOW_BEST, rel=0.4)


def test_a_loss_that_only_rises_or_stands_still_has_no_suggestion():
    with pytest.raises(UserError, match="Lower --min_learning_rate"):
        suggest(RATES, [1 + i for i in range(len(RATES))])
    with pytest.raises(UserError, match="raise --max_learning_rate"):
        suggest(RATES, [3 - 1e-5 * i for i in range(len(RATES))])
    with pytest.raises(UserError, match="Lower --min_learning_rate"):
        suggest([], [])


@pytest.fixture
def small(tmp_path, monkeypatch) -> PlanLearningRateConfig:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} and {i + 1} make {2 * i + 1}." for i in range(400)))
    return PlanLearningRateConfig(
        data="text.txt", output_dir="runs/x", precision="fp32", device="cpu", steps=60,
        tokenizer=TokenizerConfig(kind="char"), model=DecoderConfig(hidden_size=32, num_hidden_layers=1,
                            num_attention_heads=2),
        train=TrainConfig(max_length=32, per_device_train_batch_size=8, max_steps=500),
    )  # fmt: skip


def test_a_real_trial(small, capsys, tmp_path):
    found = learning_rate.run(small)
    assert 1e-4 < found < 0.2
    assert sorted(os.listdir(tmp_path)) == ["learning_rate.png", "text.txt"]
    assert (tmp_path / "learning_rate.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    said = capsys.readouterr().out
    assert f"--train.learning_rate {found}" in said
    assert learning_rate.run(small) == found


def test_a_trial_on_a_stream(small, tmp_path):
    records = [json.dumps({"text": f"{i} and {i + 1} make {2 * i + 1}."}) for i in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(records))
    streamed = dataclasses.replace(small, data="text.jsonl", streaming=True)
    found = learning_rate.run(streamed)
    assert 1e-4 < found < 0.2
    assert "--streaming True" in command(streamed, found)


def test_the_command_to_type_next_is_the_planned_run(small):
    words = command(small, 0.004)
    assert words.startswith("zero2hero pretrain ")
    assert "--train.learning_rate 0.004" in words
    assert "--train.max_steps 500" in words
    assert "--model.hidden_size 32" in words
    assert "--steps" not in words
    read = parse("pretrain", VERBS["pretrain"], words.split()[2:])
    assert (read.train.learning_rate, read.model, read.tokenizer) == (0.004, small.model, small.tokenizer)


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--steps 3", "steps"),
        ("--min_learning_rate 2", "min_learning_rate"),
        ("--streaming", "max_steps"),
        ("--train.optim nadam", "train.optim|optim"),
    ],
)
def test_mistakes_are_one_line(small, option, word, capsys):
    assert main(["plan", "lr", "--data", "text.txt", *option.split()]) == 2
    assert word.split("|")[-1] in capsys.readouterr().err
