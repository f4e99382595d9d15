"""Configurations: what is refused and in which words, what is derived, what has changed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig, differences
from zero2hero.errors import UserError
from zero2hero.machine import Machine
from zero2hero.models import Decoder
from zero2hero.train.pretrain import fit_shape, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (DecoderConfig, {"hidden_size": 100, "num_attention_heads": 6}, ["100", "not divisible", "6", "heads 5"]),
        (DecoderConfig, {"hidden_size": 0}, ["hidden_size must be at least 1"]),
        (DecoderConfig, {"num_hidden_layers": 0}, ["num_hidden_layers must be at least 1"]),
        (DecoderConfig, {"num_attention_heads": -2}, ["num_attention_heads must be at least 1, not -2"]),
        (DecoderConfig, {"num_attention_heads": 6, "num_key_value_heads": 4}, ["not a multiple", "6", "4"]),
        (DecoderConfig, {"hidden_size": 30, "num_attention_heads": 6}, ["head_dim 5 must be even"]),
        (DecoderConfig, {"position": "rotray"}, ["rotary, learned", "Did you mean 'rotary'"]),
        (DecoderConfig, {"norm": "layer_norm"}, ["Did you mean 'layernorm'"]),
        (DecoderConfig, {"feedforward": "swigl"}, ["Did you mean 'swiglu'"]),
        (DecoderConfig, {"dropout": 1.0}, ["dropout must be below 1"]),
        (DecoderConfig, {"dropout": -0.1}, ["dropout must be at least 0"]),
        (DecoderConfig, {"sliding_window": 0}, ["sliding_window must be at least 1"]),
        (DecoderConfig, {"rope_theta": math.nan}, ["rope_theta"]),
        (TrainConfig, {"optim": "adamww"}, ["muon, adamw", "Did you mean 'adamw'"]),
        (TrainConfig, {"lr_scheduler_type": "cosin"}, ["Did you mean 'cosine'"]),
        (TrainConfig, {"per_device_train_batch_size": 0}, ["per_device_train_batch_size must be at least 1"]),
        (TrainConfig, {"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps"]),
        (TrainConfig, {"max_length": 0}, ["max_length"]),
        (TrainConfig, {"max_steps": -5}, ["max_steps must be at least 0, not -5"]),
        (TrainConfig, {"num_train_epochs": 0}, ["max_steps", "num_train_epochs above 0"]),
        (TrainConfig, {"num_train_epochs": math.inf}, ["num_train_epochs"]),
        (TrainConfig, {"learning_rate": math.nan}, ["learning_rate"]),
        (TrainConfig, {"learning_rate": -1e-3}, ["learning_rate"]),
        (TrainConfig, {"adam_beta2": 1.0}, ["adam_beta2 must be below 1"]),
        (TrainConfig, {"length_schedule": [0.5, 0.5]}, ["less than 1 in all"]),
        (TrainConfig, {"length_schedule": [0.0]}, ["each in (0, 1)"]),
        (TrainConfig, {"length_schedule": [0.2, 0.2], "max_length": 30}, ["30 cannot be halved 2 times"]),
        (PretrainConfig, {"precision": "bf61"}, ["auto, fp32, bf16, fp16", "Did you mean 'bf16'"]),
        (PretrainConfig, {"on_bad_record": "skipp"}, ["Did you mean 'skip'"]),
        (PretrainConfig, {"validation_fraction": 1.0}, ["validation_fraction", "(0, 1)"]),
        (PretrainConfig, {"validation_fraction": 0.0}, ["validation_fraction"]),
    ],
)
def test_bad_values(kind, settings, words):
    with pytest.raises(UserError) as caught:
        kind(**settings)
    for word in words:
        assert word in str(caught.value)


@given(hidden=st.integers(2, 512), heads=st.integers(1, 64))
def test_the_number_of_heads_that_is_suggested_works(hidden, heads):
    try:
        DecoderConfig(hidden_size=hidden, num_attention_heads=heads, position="none")
    except UserError as error:
        suggested = int(str(error).split("try num_attention_heads ")[1].split(",")[0])
        assert hidden % heads
        assert hidden % suggested == 0
        DecoderConfig(hidden_size=hidden, num_attention_heads=suggested, position="none")
    else:
        assert hidden % heads == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": TokenizerConfig(vocab_size=256)}, ["vocab_size", "256"]),
        ({"tokenizer": TokenizerConfig(kind="char", vocab_size=4)}, ["different characters", "vocab_size=4"]),
        ({"tokenizer": TokenizerConfig(pattern="gpt-2")}, ["gpt2"]),
        ({"model": DecoderConfig(vocab_size=5)}, ["model.vocab_size 5 is smaller than the tokenizer's"]),
        ({"train": TrainConfig(max_length=4096)}, ["context is longer than the data", "4096"]),
        ({"model": DecoderConfig(position="none")}, ["no published architecture"]),
        ({"device": "cud"}, ["cud"]),
        ({"data": "storys"}, ["Did you mean 'stories'"]),
    ],
)
def test_what_only_shows_with_the_data_is_refused_before_training(tmp_path, monkeypatch, changes, words):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n\n" * 40)
    monkeypatch.setattr("zero2hero.machine.prepare", lambda: Machine("a processor", 1, 1e9, 0.0, "as is"))
    settings = {
        "data": str(tmp_path / "text.txt"), "output_dir": str(tmp_path / "run"), "precision": "fp32", "device": "cpu",
        "tokenizer": TokenizerConfig(kind="char"), "train": TrainConfig(max_steps=1, max_length=16),
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        pretrain(PretrainConfig(**settings | changes))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- derived ------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 8), st.sampled_from(["swiglu", "relu2", "gelu_new"]))
def test_what_is_left_out_is_derived(head_dim, heads, feedforward):
    width = 2 * head_dim * heads
    c = DecoderConfig(hidden_size=width, num_attention_heads=heads, feedforward=feedforward).derived()
    assert (c.head_dim, c.num_key_value_heads) == (2 * head_dim, heads)
    if feedforward == "swiglu":  # about as many weights as the plain form's 4 D
        assert c.intermediate_size % 32 == 0
        assert 0 <= c.intermediate_size - 8 * width / 3 < 32
    else:
        assert c.intermediate_size == 4 * width
    assert c.derived() == c


def test_what_is_given_is_kept():
    c = DecoderConfig(num_key_value_heads=2, head_dim=10, intermediate_size=7).derived()
    assert (c.num_key_value_heads, c.head_dim, c.intermediate_size) == (2, 10, 7)


SHAPES = [
    DecoderConfig(vocab_size=50, hidden_size=24, num_attention_heads=4, num_key_value_heads=2),
    DecoderConfig(vocab_size=50, hidden_size=24, num_attention_heads=2, head_dim=8, feedforward="relu2"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_of_training_equals_what_torch_counts(shape, monkeypatch):
    """Torch counts whole squares of attention, of which a causal query sees half."""
    monkeypatch.setattr("zero2hero.nn.attention.use_explicit", lambda q: True)
    model, length = Decoder(shape), 20
    layers = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    assert model.config.num_matrix_parameters == layers + model.head_weight.numel()
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, length, dtype=torch.long))).sum().backward()
    c = model.config
    attention = c.training_flops_per_token(length) - 6 * c.num_matrix_parameters
    assert counter.get_total_flops() == length * (6 * c.num_matrix_parameters + 2 * attention)


def test_a_longer_row_makes_a_longer_context():
    config = PretrainConfig(train=TrainConfig(max_length=512), model=DecoderConfig(max_position_embeddings=128))
    assert config.model.max_position_embeddings == 512


class FakeTokenizer:
    vocab_size, bos_token_id, eos_token_id, pad_token_id = 300, 1, 2, None


def test_the_shape_takes_vocabulary_and_special_tokens_from_the_tokenizer():
    fitted = fit_shape(DecoderConfig(), FakeTokenizer())  # type: ignore[arg-type]
    assert (fitted.vocab_size, fitted.bos_token_id, fitted.eos_token_id, fitted.pad_token_id) == (300, 1, 2, None)
    assert fit_shape(DecoderConfig(vocab_size=512), FakeTokenizer()).vocab_size == 512  # type: ignore[arg-type]
    with pytest.raises(UserError, match="299 is smaller than the tokenizer's 300"):
        fit_shape(DecoderConfig(vocab_size=299), FakeTokenizer())  # type: ignore[arg-type]


# --- compared -----------------------------------------------------------------------------------------------


def test_differences():
    before = {"a": 1, "train": {"lr": 0.1, "steps": 5, "gone": None}, "list": [1, 2], "model": {"x": 1}}
    after = {"a": 1, "train": {"lr": 0.2, "steps": 5, "new": "n"}, "list": [1], "model": 3}
    assert differences(before, before) == []
    assert differences(before, after) == [
        "list: [1, 2] -> [1]",
        "model: {'x': 1} -> 3",
        "train.lr: 0.1 -> 0.2",
        "train.new: None -> 'n'",
    ]


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), JSON), st.integers(0, 99))
def test_a_difference_is_found_wherever_it_is(value, number):
    assert differences(value, value) == []
    assert differences({"x": {"y": value}}, {"x": {"y": value}}) == []
    for key, inner in value.items():
        if inner != number:
            (line,) = differences({"x": {"y": value}}, {"x": {"y": value | {key: number}}})
            assert line == f"x.y.{key}: {inner!r} -> {number}"


def test_configurations_are_values():
    a, b = TrainConfig(), TrainConfig()
    assert a == b
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.seed = 3  # type: ignore[misc]
    a.length_schedule.append(0.5)
    assert b.length_schedule == []
