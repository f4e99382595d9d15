"""`plan finetune`: from config.json alone, what fits and what to type."""

from __future__ import annotations

import dataclasses
import json

import pytest

from zero2hero.cli import VERBS, main
from zero2hero.command_line import parse
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder
from zero2hero.plan.finetune import command, flops_per_token, page, read_shape, ways
from zero2hero.train.memory_plan import NF4, Run, learning_counts, predict, weight_bytes, weight_counts
from zero2hero.tune import LoraConfig, add_lora, quantize_nf4
from zero2hero.tuning_configs import PlanFinetuneConfig

LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 8,
         "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 2816}  # fmt: skip
TRAIN = TrainConfig(optim="adamw", per_device_train_batch_size=1, max_length=512)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def planned(folder, **settings) -> Run:
    return Run(read_shape(str(folder)), TRAIN, **({"precision": "bf16"} | settings))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_weights_are_counted_as_the_model_has_them(method):
    shape = DecoderConfig(vocab_size=96, hidden_size=128, num_hidden_layers=2, num_attention_heads=4).derived()
    model = Decoder(shape)
    if method == "qlora":
        quantize_nf4(model)
    if method != "full":
        add_lora(model, LoraConfig(r=4))
    run = Run(shape, TRAIN, method=method, lora_r=4)
    stored = sum(t.nbytes for t in [*model.parameters(), *(b for n, b in model.named_buffers() if "rotary" not in n)])
    assert weight_bytes(run) == pytest.approx(stored, rel=2e-3)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(learning_counts(run).values()) == learning


def test_less_learns_and_less_is_needed(folder):
    peaks = {(way.method, way.train.gradient_checkpointing): predict(way).peak for way in ways(planned(folder))}
    assert len(peaks) == 6
    for checkpointing in (False, True):
        full, lora, qlora = (peaks[method, checkpointing] for method in ("full", "lora", "qlora"))
        assert full > 3 * lora
        inner = weight_counts(read_shape(str(folder)))["matrices"]
        assert lora - qlora == pytest.approx(inner * (2 - NF4), rel=0.15)
    assert all(peaks[method, True] < peaks[method, False] for method in ("full", "lora", "qlora"))


def test_flops(folder):
    """Of products only: 6 a weight when all learn, 4 when none does, and 2 more when it is computed again."""
    run = planned(folder)
    run = dataclasses.replace(run, train=dataclasses.replace(TRAIN, max_length=1))
    matrices = run.shape.num_matrix_parameters
    costs = [flops_per_token(way) / matrices for way in ways(run)]
    assert costs == pytest.approx([6, 8, 4, 6, 4, 6], rel=0.06)


@pytest.mark.parametrize(("free", "fitting"), [(1e12, 6), (0.5e9, 2), (1e6, 0)])
def test_what_fits_can_be_typed(folder, free, fitting):
    config = PlanFinetuneConfig(str(folder), data="chats.jsonl", train=TRAIN)
    text = page(config, planned(folder), free, 1e12)
    yes = sum(" yes " in line for line in text.splitlines())
    lines = [line for line in text.splitlines() if "zero2hero sft" in line]
    assert len(lines) == (fitting or 1)
    assert yes == fitting
    assert all(f"--model {folder} --data chats.jsonl --method" in line for line in lines)
    assert ("Nothing fits" in text or "This would fit" in text) == (fitting == 0)


def test_the_command_says_what_was_planned(folder):
    config = PlanFinetuneConfig(str(folder), train=TRAIN)
    typed = [command(config, way) for way in ways(planned(folder))]
    assert typed[0] == (f"zero2hero sft --model {folder} --data DATA.jsonl --method full "
                        "--train.per_device_train_batch_size 1 --train.max_length 512 --train.optim adamw "
                        "--precision bf16")  # fmt: skip
    for words, way in zip(typed, ways(planned(folder))):
        said = parse("sft", VERBS["sft"], words.split()[2:])
        assert (said.method, said.precision, said.model) == (way.method, "bf16", str(folder))
        assert said.lora.r == 16
        for name in ("max_length", "per_device_train_batch_size", "optim", "gradient_checkpointing"):
            assert getattr(said.train, name) == getattr(way.train, name)


def test_from_the_command_line(folder, capsys):
    assert main(["plan", "finetune", str(folder), "--precision", "fp32", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "estimates, for 1024 tokens an example" in text
    assert text.count("checkpointing") >= 3


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 8}, "is a bert; plan finetune predicts"),
        (LLAMA | {"model_type": "mixtral"}, "is a mixture of experts"),
        (LLAMA | {"model_type": "llamma"}, "model_type 'llamma' is not one"),
        (LLAMA | {"hidden_size": "wide"}, "wrong kind"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(tmp_path, theirs, message):
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(UserError, match=message):
        read_shape(str(tmp_path))


def test_bad_options(folder, capsys):
    assert main(["plan", "finetune"]) == 2
    assert "plan finetune needs MODEL" in capsys.readouterr().err
    assert main(["plan", "finetune", str(folder), "--lora_r", "0"]) == 2
    assert main(["plan", "finetune", str(folder / "nowhere")]) == 2
