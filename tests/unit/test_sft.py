"""Fine-tuning from records to an adapter or a model: what is learned, kept, measured, resumed and refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zero2hero as z2h
from zero2hero.cli import main
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.worlds.dialogues import Dialogues, dialogue, messages
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.pretrain import fit_shape
from zero2hero.train.sft import sft, split_records
from zero2hero.train.tracking import read_metrics
from zero2hero.tune.config import LoraConfig
from zero2hero.tuning_configs import SftConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = TrainConfig(
    max_steps=12, per_device_train_batch_size=4, max_length=96, learning_rate=0.02, optim="adamw", weight_decay=0.0,
    eval_steps=6, save_steps=6, logging_steps=4,
)  # fmt: skip
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model that was never trained, with a tokenizer that has ChatML's tokens and no template."""
    folder = tmp_path_factory.mktemp("sft") / "base"
    tokenizer = Tokenizer.train(["What colour is the sky? Blue. How many legs has a cat? 4"], vocab_size=300)
    shape = DecoderConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128)
    model = Decoder(fit_shape(shape, tokenizer))
    init_weights(model, 0)
    z2h.save(z2h.LanguageModel(model, tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    pairs = [("What colour is the sky?", "Blue."), ("How many legs has a cat?", "4")] * 20
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(base, chats, tmp_path) -> SftConfig:
    return SftConfig(
        model=str(base), data=str(chats), output_dir=str(tmp_path / "run"), precision="fp32", report_to=[], train=TRAIN,
        lora=LoraConfig(r=8, lora_alpha=16, target_modules=EVERYWHERE),
    )  # fmt: skip


def test_an_adapter_learns_to_answer_and_the_record_says_how_well(config):
    config = dataclasses.replace(
        config, exact_match=4, retain_data="stories:200", train=dataclasses.replace(TRAIN, max_steps=40, eval_steps=20)
    )
    lm = sft(config)
    assert lm.chat([{"role": "user", "content": "What colour is the sky?"}], temperature=0) == "Blue."
    rows = read_metrics(config.output_dir)
    right = [row["eval_exact_match"] for row in rows if "eval_exact_match" in row]
    assert (right[0], right[-1]) == (0.0, 1.0)
    kept = [row["eval_retain_loss"] for row in rows if "eval_retain_loss" in row]
    assert kept[-1] != kept[0]
    report = (Path(config.output_dir) / "report.html").read_text()
    assert "100% of held-out answers are right word for word, 0% before" in report
    assert "the loss went from" in report


def test_the_folder_is_peft_s_and_says_what_ends_an_answer(config, base):
    sft(config)
    run = Path(config.output_dir)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    tokenizer = Tokenizer.from_pretrained(run)
    assert tokenizer.chat_template is not None
    ends = json.loads((run / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.token_to_id("<|im_end|>")}


def test_a_resumed_run_ends_as_the_straight_one(config):
    sft(config)
    run = Path(config.output_dir)
    straight = load_file(run / "adapter_model.safetensors")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    sft(dataclasses.replace(config, resume=True))
    again = load_file(run / "adapter_model.safetensors")
    assert again.keys() == straight.keys()
    assert all(torch.equal(again[name], straight[name]) for name in straight)


@pytest.mark.parametrize("packing", [True, False])
def test_every_weight_but_the_frozen_ones(config, base, packing):
    full = dataclasses.replace(config, method="full", freeze=["embed_tokens", "layers.0"], packing=packing)
    before, after = z2h.load(base).model.state_dict(), sft(full).model.state_dict()
    assert all(
        torch.equal(before[n], after[n]) == n.startswith(("embed_tokens", "layers.0.", "lm_head")) for n in before
    )


def test_a_tuned_model_is_tuned_further(config, tmp_path):
    """What an adapter learned is where the next training of every weight begins."""
    answered = {"temperature": 0, "max_new_tokens": 8}
    learned = sft(dataclasses.replace(config, train=dataclasses.replace(TRAIN, max_steps=40)))
    still = dataclasses.replace(TRAIN, max_steps=1, warmup_steps=0, learning_rate=0.0)
    further = dataclasses.replace(config, model=config.output_dir, output_dir=str(tmp_path / "further"), train=still)
    with pytest.raises(UserError, match=r"is an adapter.*--method full.*zero2hero merge"):
        sft(further)
    again = sft(dataclasses.replace(further, method="full"))
    question = [{"role": "user", "content": "What colour is the sky?"}]
    assert again.chat(question, **answered) == learned.chat(question, **answered) == "Blue."


def test_on_a_base_in_four_bits(config):
    losses = [row["eval_loss"] for row in read_metrics(_run(config, method="qlora")) if "eval_loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def _run(config: SftConfig, **changes) -> str:
    config = dataclasses.replace(config, **changes)
    sft(config)
    return config.output_dir


def test_mistakes_are_one_line(config, base, chats, tmp_path, capsys):
    for changes, words in [
        ({"method": "full", "freeze": ["layer.0"]}, "no weights begin with 'layer.0'"),
        ({"lora": LoraConfig(r=999)}, "r 999 is more than"),
        ({"chat_template": "llama3"}, "needs tokens that this tokenizer lacks"),
        ({"chat_template": "chatlm"}, "Did you mean 'chatml'"),
        ({"train": dataclasses.replace(TRAIN, max_length=4)}, "Raise max_length"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            sft(dataclasses.replace(config, output_dir=str(tmp_path / "x"), **changes))
    one = tmp_path / "one.jsonl"
    one.write_text(chats.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="too few to hold one out"):
        sft(dataclasses.replace(config, data=str(one)))
    assert main(["sft", "--data", str(chats)]) == 2
    assert "say which model to tune" in capsys.readouterr().err
    assert main(["sft", "--model", str(base), "--freeze", "[layers.0]"]) == 2
    assert "freeze is for --method full" in capsys.readouterr().err


# --- the built-in questions ---------------------------------------------------------------------------------


def test_dialogues_are_true_and_their_answers_check():
    turns = [turn for index in range(60) for turn in dialogue(index)]
    assert all(turn.check(f" {turn.answer}. ".upper() if turn.problem is None else turn.answer) for turn in turns)
    assert not any(turn.check("I do not know") for turn in turns)
    assert {"sum", "who", "where", "yesno", "feeling"} <= {turn.kind for turn in turns}
    for index in range(0, 60, 3):
        story, *_ = dialogue(index)[0].question.rpartition("\n\n")
        for turn in dialogue(index):
            assert turn.kind in ("yesno", "order") or turn.answer.lower() in story.lower()


def test_held_out_dialogues_are_others():
    learn, held_out = ({dialogue(i, split)[0].question for i in range(200)} for split in ("train", "validation"))
    assert not learn & held_out
    record = Dialogues().record(3, "validation")
    assert record["messages"] == messages(dialogue(3, "validation"))
    assert [m["role"] for m in record["messages"][:2]] == ["user", "assistant"]


def test_a_mix_of_built_in_data_holds_out_what_its_parts_do(config):
    mixed = dataclasses.replace(config, data=["dialogues:40", "stories:20"])
    learn, held_out = split_records(mixed)
    assert [sum(record.kind == "text" for record in side) for side in (learn, held_out)] == [20, 2]
    assert messages(dialogue(0, "validation")) in [record.messages for record in held_out]
