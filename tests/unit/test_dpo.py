"""`zero2hero dpo` from records to an adapter or a model: what is learned, shown, kept, resumed and refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zero2hero as z2h
from zero2hero.align.dpo import dpo
from zero2hero.alignment_configs import DpoConfig
from zero2hero.cli import main
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.worlds.preferences import Preferences, preference, preferred, taste
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.pretrain import fit_shape
from zero2hero.train.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = TrainConfig(
    max_steps=8, per_device_train_batch_size=4, max_length=64, learning_rate=5e-3, optim="adamw", weight_decay=0.0,
    eval_steps=4, save_steps=4, logging_steps=2,
)  # fmt: skip
COLOURS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dpo") / "base"
    tokenizer = Tokenizer.train(["The sky is red. The sky is green, blue, black or white. What is it?"], vocab_size=300)
    shape = DecoderConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=96)
    model = Decoder(fit_shape(shape, tokenizer))
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    z2h.save(z2h.LanguageModel(model, tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def votes(tmp_path_factory) -> Path:
    """People like blue; as an arena exports them, with columns that say where they come from."""
    rows = [
        {"prompt": f"What is it? {other} {i}", "chosen": " It is blue.", "rejected": f" It is {other}.",
         "model_a": "x", "voter": "v7", "timestamp": "2026-01-01T00:00:00Z"}
        for i in range(8) for other in COLOURS if other != "blue"
    ]  # fmt: skip
    rows.append(rows[0] | {"rejected": rows[0]["chosen"]})
    path = tmp_path_factory.mktemp("data") / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(base, votes, tmp_path) -> DpoConfig:
    return DpoConfig(
        model=str(base), data=str(votes), output_dir=str(tmp_path / "run"), precision="fp32", report_to=[], train=TRAIN,
        validation_fraction=0.2, num_samples=3, max_completion_length=8,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full"])
def test_learns_what_people_like(config, method, capsys):
    lm = dpo(dataclasses.replace(config, method=method))
    run = Path(config.output_dir)
    rows = read_metrics(run)
    evaluated = [row for row in rows if "eval_loss" in row]
    assert evaluated[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluated[0]["eval_kl"] == pytest.approx(0, abs=1e-4)
    assert next(row["loss"] for row in rows if "loss" in row) == pytest.approx(math.log(2), abs=1e-6)
    last = evaluated[-1]
    assert last["eval_loss"] < 0.6
    assert last["eval_rewards/accuracies"] > 0.8
    assert last["eval_rewards/accuracies_low"] < last["eval_rewards/accuracies"] <= last["eval_rewards/accuracies_high"]
    assert last["eval_kl"] > 0.01
    trained = next(row for row in reversed(rows) if "loss" in row)
    assert trained["rewards/margins"] == pytest.approx(
        trained["rewards/chosen"] - trained["rewards/rejected"], abs=1e-5
    )
    assert {"rewards/accuracies", "logps/chosen", "logps/rejected", "pairs_per_second", "num_pairs"} <= trained.keys()
    assert lm.loglikelihood("What is it?", " It is blue.") > lm.loglikelihood("What is it?", " It is black.")
    said = capsys.readouterr().out
    assert "1 left out for chosen and rejected are the same" in said
    page = (run / "report.html").read_text()
    assert "It prefers what people prefer in" in page
    assert "nats per pair" in page
    assert (run / "adapter_config.json").exists() == (method == "lora")


def test_of_every_kind(config):
    """Loss types end to end, on pairs and on single answers; each lowers its own held-out loss."""
    for i, kind in enumerate([["ipo", "sft"], "orpo", "simpo", "kto"]):
        one = dataclasses.replace(
            config, loss_type=kind, method="full", output_dir=f"{config.output_dir}{i}", num_samples=0
        )
        dpo(one)
        losses = [row["eval_loss"] for row in read_metrics(one.output_dir) if "eval_loss" in row]
        assert losses[-1] < losses[0], kind


def test_resumed_run_is_the_same_run(config, tmp_path):
    dpo(config)
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    shutil.copytree(config.output_dir, again.output_dir)
    shutil.rmtree(Path(again.output_dir) / "checkpoints" / "step-000008")
    dpo(dataclasses.replace(again, resume=True))
    first, second = (load_file(Path(c.output_dir) / "adapter_model.safetensors") for c in (config, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("options", "words"), [
    (["--loss_type", "ipoo"], "Did you mean 'ipo'"), (["--train.max_length", "3"], "leaves no room for an answer"),
    (["--data", "sums:50"], "holds no preference"), (["--method", "ful"], "Did you mean 'full'"),
])  # fmt: skip
def test_bad_input_is_one_line(config, tmp_path, options, words, capsys):
    given = ["dpo", "--model", config.model, "--data", str(config.data), "--output_dir", str(tmp_path / "x"), *options]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_raters_have_a_taste():
    some = [preference(i) for i in range(300)]
    assert some[5] == preference(5)
    assert all(p.prompt and p.chosen != p.rejected for p in some)
    right = sum(taste(p.chosen) > taste(p.rejected) for p in some)
    wrong = sum(taste(p.chosen) < taste(p.rejected) for p in some)
    assert 3 < right / wrong < 8, "raters err now and then"
    assert taste('"Hello!" said Tom. He ran. "Stop!" said Mia.') == pytest.approx(2 / 5)
    assert taste("He ran home. It was late.") == 0
    assert preferred('"Hi," he said.', "He ran.") > 0.99
    assert preferred("He ran.", "She ran.") == 0.5
    record = Preferences().record(0)
    assert record["prompt"] + record["chosen"] == Preferences().document(0)
    with pytest.raises(UserError, match="unknown split"):
        preference(0, "test")
