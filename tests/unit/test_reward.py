"""Training a reward model: it learns what can be learned, says what it is worth, and names what it leaves out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from zero2hero.align.reward import Pair, calibration, encode_pairs, measured, reward
from zero2hero.align.reward_model import load_reward_model, scores
from zero2hero.alignment_configs import RewardConfig, reward_defaults
from zero2hero.config import DecoderConfig, from_dict
from zero2hero.data.conversations import read_records, recognize
from zero2hero.errors import UserError
from zero2hero.language_model import LanguageModel, save
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.intervals import wilson
from zero2hero.train.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD, BAD = "please thank you kindly", "go away you fool"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train([GOOD, BAD, "What now? How so? Who is it?"], vocab_size=300)
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2,
                                  num_attention_heads=4, max_position_embeddings=128,
                                  eos_token_id=tokenizer.eos_token_id))  # fmt: skip
    init_weights(model, 0)
    save(LanguageModel(model, tokenizer), folder)
    return folder


def votes(path, number: int = 60):
    """Polite words are preferred. Two columns say where a vote came from, as the arena's do."""
    rng = np.random.default_rng(0)

    def words(of: str) -> str:
        return " " + " ".join(rng.choice(of.split(), 4))

    rows = [{"prompt": f"Who is it? {i}", "chosen": words(GOOD), "rejected": words(BAD), "voter": f"v{i % 3}",
             "models": {"chosen": "a", "rejected": "b"}, "time": 1.7e9 + i} for i in range(number)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(base, data, output_dir, method="full", **train):
    return from_dict(RewardConfig, {
        "model": str(base), "data": str(data), "output_dir": str(output_dir), "method": method, "precision": "fp32",
        "validation_fraction": 0.3, "report_to": [],
        "train": {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "warmup_steps": 0} | train,
    })  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora"])
def test_votes_with_provenance_become_a_reward_model(base, tmp_path, method):
    reward(settings(base, votes(tmp_path / "votes.jsonl"), tmp_path / "run", method))
    found = json.loads((tmp_path / "run" / "reward.json").read_text())
    assert found["accuracy"] == 1.0
    assert found["pairs"] == 18
    rows = read_metrics(tmp_path / "run")
    first = next(row for row in rows if "eval_loss" in row)
    last = [row for row in rows if "eval_loss" in row][-1]
    assert abs(first["eval_loss"] - math.log(2)) < 0.15
    assert last["eval_loss"] < 0.5
    assert {"eval_accuracy_low", "eval_calibration_error", "eval_length_correlation"} <= last.keys()
    model, tokenizer = load_reward_model(tmp_path / "run")
    good, bad = scores(model, tokenizer, ["Who is it?"] * 2, [f" {GOOD}", f" {BAD}"])
    assert good > bad + 0.5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What its scores are worth" in page
    assert "right, with 95 % interval" in page


def test_the_same_votes_tune_a_model(base, tmp_path):
    """What an arena writes goes through `dpo` as through `reward`: columns beside the preference are left alone."""
    from zero2hero.align.dpo import dpo
    from zero2hero.alignment_configs import DpoConfig

    data = votes(tmp_path / "votes.jsonl")
    assert next(iter(read_records(data))).other.keys() == {"voter", "models", "time"}
    dpo(from_dict(DpoConfig, {
        "model": str(base), "data": str(data), "output_dir": str(tmp_path / "run"), "method": "full", "num_samples": 0,
        "precision": "fp32", "report_to": [],
        "train": {"max_steps": 6, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "warmup_steps": 0},
    }))  # fmt: skip
    found = [row for row in read_metrics(tmp_path / "run") if "eval_rewards/accuracies" in row]
    assert found[-1]["eval_rewards/accuracies"] == 1.0


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(base, tmp_path):
    data = votes(tmp_path / "votes.jsonl")
    reward(settings(base, data, tmp_path / "whole"))
    from dataclasses import replace

    from zero2hero.errors import Stopped
    from zero2hero.train.loop import Trainer

    plain, config = Trainer.step, settings(base, data, tmp_path / "cut")

    def step(self):
        plain(self)
        if self.state.step == 5:
            self._asked_to_stop = 15

    Trainer.step = step
    try:
        with pytest.raises(Stopped):
            reward(config)
    finally:
        Trainer.step = plain
    reward(replace(config, resume=True))
    one, other = (load_reward_model(tmp_path / name)[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_learned_from_is_left_out_named_and_counted(base):
    tokenizer = Tokenizer.from_pretrained(base)
    model = Decoder(DecoderConfig(vocab_size=300, hidden_size=32, num_attention_heads=4))
    rows = [("a", " b", " c"), ("a", " b", " b"), ("a " * 90, " b", " c"), ("a", " c", " c")]
    named = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    records = [recognize(row, i, f"line {i}") for i, row in enumerate(named, 1)]
    found = encode_pairs(records, tokenizer, 60, model)
    assert len(found.pairs) == 1
    assert found.report(60) == (
        "2 left out for chosen and rejected are the same (the first: line 2); "
        "1 left out for one of them is longer than max_length 60 (the first: line 3)"
    )
    with pytest.raises(UserError, match="no preference to learn from: 1 left out for chosen and rejected"):
        encode_pairs(records[1:2], tokenizer, 60, model)
    with pytest.raises(UserError, match=r"record 1: .*holds no preference"):
        encode_pairs([recognize({"prompt": "a", "completion": "b"})], tokenizer, 60, model)


def test_an_empty_answer_is_named_or_skipped(tmp_path):
    (tmp_path / "votes.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": ""}\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    )
    with pytest.raises(UserError, match="line 1: chosen or rejected is empty"):
        list(read_records(tmp_path / "votes.jsonl"))
    with pytest.warns(UserWarning, match="1 "):
        assert len(list(read_records(tmp_path / "votes.jsonl", on_bad_record="skip"))) == 1


def test_measures():
    pairs = [Pair(np.arange(2), np.arange(3)), Pair(np.arange(5), np.arange(4)), Pair(np.arange(1), np.arange(9)),
             Pair(np.arange(7), np.arange(2), margin=1.0)]  # fmt: skip
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 2.0], [0.0, 0.0]])
    found = measured(scores, pairs)
    assert found["accuracy"] == 0.5
    assert found["accuracy_shorter"] == 1.0
    assert found["accuracy_longer"] == 0.0
    want = -np.log(1 / (1 + np.exp(-np.array([1.0, -2.0, 1.0, -1.0])))).mean()
    assert found["loss"] == pytest.approx(want, abs=1e-6)
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson(0.5, 4)
    assert wilson(0.5, 4)[0] == pytest.approx(0.15, abs=0.01)
    assert (found["min_reward"], found["max_reward"]) == (0.0, 3.0)


def test_calibration_of_a_model_that_means_what_it_says():
    rng = np.random.default_rng(0)
    strength = rng.normal(0, 2, 20000)
    won = rng.random(20000) < 1 / (1 + np.exp(-strength))  # a world in which Bradley and Terry are right
    honest = np.where(won, strength, -strength)
    for factor, least, most in ((1.0, 0.0, 0.015), (4.0, 0.05, 0.3)):  # one that is too sure of itself
        bins = calibration(factor * honest)
        error = sum(n * abs(sure - right) for sure, right, n in bins) / 20000
        assert least <= error <= most
        assert sum(n for *_, n in bins) == 20000


def test_bad_settings():
    with pytest.raises(UserError, match="--method lora"):
        RewardConfig(model="x", method="qlora")
    with pytest.raises(UserError, match="center_rewards_coefficient"):
        RewardConfig(model="x", center_rewards_coefficient=-1.0)
    assert reward_defaults().head_lr_scale == 1.0
