"""Prompts of all shapes, in an order that misses none; what their answers are worth."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

import zero2hero as z2h
from zero2hero.align.online import PromptOrder, completion_metrics, judged, read_prompts
from zero2hero.align.rewards import load_rewards
from zero2hero.align.rollout import Rollout
from zero2hero.alignment_configs import PpoConfig
from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template
from zero2hero.train.pretrain import fit_shape


@pytest.fixture(scope="module")
def lm() -> z2h.LanguageModel:
    tokenizer = Tokenizer.train(["What is 2 + 3? The answer is 5."] * 3, vocab_size=300)
    set_chat_template(tokenizer, "chatml")
    shape = DecoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    model = Decoder(fit_shape(shape, tokenizer))
    init_weights(model, 0)
    return z2h.LanguageModel(model, tokenizer)


def written(tmp_path, *rows) -> PpoConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PpoConfig(model="x", data=str(path), reward_funcs=["number"], validation_fraction=0.2)


def test_prompts_of_every_shape_keep_their_columns(lm, tmp_path):
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    config = written(
        tmp_path,
        {"prompt": "2 + 3 =", "answer": "5", "level": 1},
        {"prompt": question, "answer": "5"},
        {"messages": [*question, {"role": "assistant", "content": "5"}]},
        {"question": "What is 2 + 3?", "answer": "5"},
        {"prompt": "2 + 3 =", "completion": " 5"},
    )
    prompts = [p for part in read_prompts(config, lm) for p in part]
    assert [int(p.columns["answer"]) for p in prompts] == [5] * 5
    assert sorted(isinstance(p.turns, str) for p in prompts) == [False, False, False, True, True]
    assert all(p.ids == lm.prompt_ids(p.turns) for p in prompts)
    said = ["5" if isinstance(p.turns, str) else "The answer is 5." for p in prompts]
    rollout = Rollout([p.ids for p in prompts], [[1]] * 5, [[0.0]] * 5, [[True]] * 5, ["stop"] * 5, said)
    assert judged(prompts, rollout, load_rewards("number")).total_N.tolist() == [1.0] * 5


def test_completions_of_one_prompt_stand_side_by_side(lm, tmp_path):
    config = written(tmp_path, *({"prompt": f"{n} =", "answer": str(n)} for n in range(5)))
    prompts = PromptOrder(read_prompts(config, lm)[0], 0)(0, 4)
    said = [f"{p.columns['answer']}" for p in prompts for _ in range(3)]
    said[4] = "wrong"
    rollout = Rollout([[1]] * 12, [[1, 2]] * 11 + [[1]], [[0.0] * 2] * 12, [[True] * 2] * 12, ["length"] * 12, said)
    scores = judged(prompts, rollout, load_rewards("number"), num_generations=3).total_N.tolist()
    assert scores == [1.0] * 4 + [0.0] + [1.0] * 7
    lengths = completion_metrics(rollout)
    assert (lengths["completions/min_length"], lengths["completions/max_length"]) == (1, 2)
    assert lengths["completions/clipped_ratio"] == 1.0


def test_every_prompt_is_asked_once_an_epoch_whatever_the_size_of_a_rollout_and_the_ranks():
    prompts = list(range(10))
    order = PromptOrder(prompts, seed=3)  # type: ignore[arg-type]
    asked = [p for number in range(5) for p in order(number, 6)]
    assert Counter(asked[:10]) == Counter(asked[10:20]) == Counter(asked[20:30]) == Counter(prompts)
    assert asked[:10] != asked[10:20]
    parts = [order(2, 6, part=(rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(order(2, 6))


def test_prompts_that_cannot_be_answered_are_named_or_left_out(lm, tmp_path):
    good = [{"prompt": f"{n} =", "answer": "5"} for n in range(6)]
    config = written(tmp_path, *good, {"prompt": "2 + 3 = " * 40, "answer": "5"})
    with pytest.raises(UserError, match=r"line 7: the prompt has \d+ tokens, and the model's context is 64"):
        read_prompts(config, lm)
    with pytest.warns(UserWarning, match="left out 1 bad records"):
        learn, held_out = read_prompts(dataclasses.replace(config, on_bad_record="skip"), lm)
    assert len(learn + held_out) == 6
    with pytest.raises(UserError, match="nothing to answer"):
        read_prompts(written(tmp_path, *({"text": "Once upon a time"} for _ in range(5))), lm)


def test_texts_need_no_chat_template(lm, tmp_path):
    """Plain prompts are read as they are; messages get the format that the settings name."""
    tokenizer = Tokenizer.train(["What is 2 + 3? The answer is 5."] * 3, vocab_size=300)
    plain = z2h.LanguageModel(lm.model, tokenizer)
    texts = written(tmp_path, *({"prompt": f"{n} ="} for n in range(5)))
    assert all(p.ids == tokenizer.encode(p.turns) for p in read_prompts(texts, plain)[0])
    assert tokenizer.chat_template is None
    talk = written(tmp_path, *({"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(5)))
    assert read_prompts(talk, plain)[0]
    assert tokenizer.chat_template is not None
