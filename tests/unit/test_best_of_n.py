"""The best of n: what is kept, what it is worth, and that `sft` reads it."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from zero2hero.align.best_of_n import best_of_n, chosen, reward_by_n
from zero2hero.align.reward_model import with_score_head
from zero2hero.alignment_configs import BestOfNConfig
from zero2hero.config import DecoderConfig
from zero2hero.data.conversations import read_records
from zero2hero.data.examples import encode_records
from zero2hero.errors import UserError
from zero2hero.language_model import LanguageModel, load, save
from zero2hero.models import Decoder, init_weights, save_pretrained
from zero2hero.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

REWARDS = """
def letters(completions):
    return [sum(c == "e" for c in text) for text in completions]

def nothing(completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    tokenizer = Tokenizer.train(["See the bees, the trees, the green sea and me."], vocab_size=280)
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, max_position_embeddings=64,
                                  eos_token_id=tokenizer.eos_token_id))  # fmt: skip
    init_weights(model, 1)
    save(LanguageModel(model, tokenizer), folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"See {i}"}) for i in range(40)))
    return folder


def config(setting, **more) -> BestOfNConfig:
    return BestOfNConfig(**{
        "model": str(setting / "model"), "data": str(setting / "prompts.jsonl"), "n": 6, "max_completion_length": 8,
        "reward_funcs": [f"{setting / 'rewards.py'}:letters"],
    } | more)  # fmt: skip


def test_the_best_are_kept_and_sft_reads_them(setting, tmp_path, capsys):
    out = tmp_path / "best.jsonl"
    best_of_n(config(setting, output=str(out)))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"See {i}" for i in range(40)]
    assert all(row["score"] == row["completion"].count("e") for row in rows)
    assert {"n": 6, "seed": 0, "model": str(setting / "model")}.items() <= rows[0].items()
    report = json.loads((tmp_path / "best.jsonl.report.json").read_text())
    assert report["reward_by_n"][-1]["reward"] == pytest.approx(np.mean([row["score"] for row in rows]))
    rewards = [row["reward"] for row in report["reward_by_n"]]
    assert rewards == sorted(rewards)
    assert rewards[-1] > rewards[0]
    assert "mean reward" in capsys.readouterr().out
    records = list(read_records(out))
    assert {record.kind for record in records} == {"completion"}
    assert len(encode_records(records, load(setting / "model").tokenizer).examples) == 40
    again = tmp_path / "again.jsonl"
    best_of_n(config(setting, output=str(again)))
    assert again.read_text() == out.read_text()


def test_conversations_and_a_reward_model(setting, tmp_path):
    lm = load(setting / "model")
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    save(lm, tmp_path / "talker")
    save_pretrained(with_score_head(lm.model, lm.tokenizer), tmp_path / "reward")
    lm.tokenizer.save_pretrained(tmp_path / "reward")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "See?"}]}))
    out = tmp_path / "best.jsonl"
    best_of_n(config(setting, model=str(tmp_path / "talker"), data=str(tmp_path / "chats.jsonl"), output=str(out),
                     reward_funcs=[str(tmp_path / "reward")]))  # fmt: skip
    (record,) = read_records(out)
    assert record.completion[0]["role"] == "assistant"
    assert math.isfinite(record.other["score"])


def test_a_threshold_keeps_each_good_answer_once(setting):
    texts, scores = ["a", "b", "a", " ", "c"], np.array([2.0, 1.0, 2.0, 9.0, 3.0])
    assert chosen(texts, scores, config(setting, threshold=2.0)) == [4, 0]
    assert chosen(texts, scores, config(setting)) == [4]
    assert chosen(texts, scores, config(setting, threshold=5.0)) == []


def test_reward_by_n_counts_all_subsets():
    scores = np.random.default_rng(0).normal(size=(3, 6))
    for row in reward_by_n(scores):
        best = [max(some) for one in scores for some in itertools.combinations(one, row["n"])]
        assert row["reward"] == pytest.approx(np.mean(best))
        assert row["kl_bound"] == pytest.approx(math.log(row["n"]) - 1 + 1 / row["n"])
    assert [row["n"] for row in reward_by_n(scores)] == [1, 2, 4, 6]


def test_what_is_wrong_is_named_and_nothing_is_written(setting, tmp_path):
    out = tmp_path / "best.jsonl"
    with pytest.raises(UserError, match="nothing returned nan"):
        best_of_n(config(setting, output=str(out), reward_funcs=[f"{setting / 'rewards.py'}:nothing"]))
    with pytest.raises(UserError, match="no answer was kept"):
        best_of_n(config(setting, output=str(out), threshold=1000.0, max_prompts=2))
    assert not list(tmp_path.iterdir())
    out.write_text("precious")
    with pytest.raises(UserError, match="exists"):
        best_of_n(config(setting, output=str(out)))
    with pytest.raises(UserError, match="--reward_funcs"):
        config(setting, reward_funcs=[])
    with pytest.raises(UserError, match="n must be at least 1"):
        config(setting, n=0)
