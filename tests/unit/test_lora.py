"""LoRA by its definition: what it computes, what it trains, what it refuses."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.batches import Batch
from zero2hero.errors import UserError
from zero2hero.model_configs import EncoderConfig
from zero2hero.models import Decoder, Encoder, init_weights
from zero2hero.nn.linear import joint_linear
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import causal_lm
from zero2hero.tune import (
    LoraConfig,
    adapter_names,
    add_lora,
    dequantize,
    disable_adapter,
    merge,
    quantize_int8,
    quantize_nf4,
    save_adapter,
    set_adapter,
)
from zero2hero.tune.adapters import adapter_parameters
from zero2hero.tune.lora import LoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def make(config: DecoderConfig = CONFIG) -> Decoder:
    model = Decoder(config)
    init_weights(model, seed=1)
    randomize(model.parameters())
    return model.eval()


def randomize(parameters, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.empty(p.shape).normal_(0, 0.1, generator=generator))


def logits(model) -> torch.Tensor:
    return model.logits(model(IDS))


class Frozen(nn.Module):
    """A linear module that is no nn.Linear, as a quantized one is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().clone())
        self.bias = linear.bias

    def dequantize(self) -> torch.Tensor:
        return self.packed

    def forward(self, x):
        return nn.functional.linear(x, self.packed, self.bias)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}]
)
def test_begins_as_the_base(settings: dict):
    model = make()
    base = logits(model)
    add_lora(model, LoraConfig(r=4, **settings))
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
    with disable_adapter(model):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projections_together_are_the_definition(dora: bool, bias: bool, dtype: torch.dtype):
    """Values and gradients of W + s B A written out, for two adapted projections and a plain one beside them."""
    torch.manual_seed(0)
    bases = [nn.Linear(12, out, bias=bias).to(dtype).requires_grad_(False) for out in (8, 6, 10)]
    config = LoraConfig(use_dora=dora)
    projections: list = [LoraLinear(bases[0]), bases[1], LoraLinear(bases[2])]
    adapters = []
    for p, rank in ((projections[0], 3), (projections[2], 5)):
        p.add("a", rank, 7, config, torch.Generator().manual_seed(rank))
        p.to(dtype).active = "a"
        randomize(p.adapters.parameters())
        adapters.append(p.adapters["a"])
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    wanted = [torch.randn(2, 5, base.out_features, dtype=dtype) for base in bases]

    def written_out(base, adapter):
        if adapter is None:
            return base(x)
        W = base.weight + 7 / adapter.rank * adapter.B @ adapter.A
        if dora:
            W = adapter.magnitude[:, None] * W / W.detach().norm(dim=1, keepdim=True)
        return nn.functional.linear(x, W, base.bias)

    inputs = [x, *(p for a in adapters for p in a.parameters())]
    results = []
    for ys in (
        joint_linear(x, *projections),
        [written_out(base, a) for base, a in zip(bases, (adapters[0], None, adapters[1]))],
        [p(x) for p in projections],
    ):
        results.append((*ys, *torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, wanted)), inputs)))
    for others in results[1:]:
        for a, b in zip(results[0], others):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_trained():
    model = add_lora(make(), LoraConfig(r=4, modules_to_save=["norm"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_parameters(model).keys()
    assert "norm.adapters.default.weight" in trained
    logits(model).sum().backward()
    assert all((p.grad is not None) == (n in trained) for n, p in model.named_parameters())
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"]), "other")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapter_parameters(model, "other").keys()


def test_several_adapters_are_chosen_at_run_time():
    model = make()
    base = logits(model)
    seen = [base]
    for name, settings in (("one", {"target_modules": ["q_proj", "lm_head"]}), ("two", {"modules_to_save": ["norm"]})):
        add_lora(model, LoraConfig(r=4, **settings), name)
        randomize(adapter_parameters(model, name).values())
        seen.append(logits(model))
    assert adapter_names(model) == ["one", "two"]
    for name, expected in zip((None, "one", "two"), seen):
        set_adapter(model, name)
        assert torch.equal(logits(model), expected)
    assert len({x.sum().item() for x in seen}) == 3
    with pytest.raises(UserError, match="Did you mean 'two'"):
        set_adapter(model, "tow")


def test_an_adapted_head_in_the_loss():
    """The loss takes the head's matrix, and the adapter gets its gradient through it."""
    model = add_lora(make(), LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"]))
    randomize(p for p in model.parameters() if p.requires_grad)
    batch = Batch(IDS[:, :-1], IDS[:, 1:], torch.arange(11).expand(2, -1), None)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(causal_lm(model, batch).sum, trained)
    whole = nn.functional.cross_entropy(
        model.logits(model(IDS[:, :-1])).flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    for a, b in zip(grads, torch.autograd.grad(whole, trained)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_that_is_no_plain_linear(dora: bool):
    """Computed by its own forward; merged into what it dequantizes to, aloud."""
    model, plain = make(), make()
    for layer in model.layers:
        layer.self_attn.q_proj = Frozen(layer.self_attn.q_proj)
        layer.mlp.down_proj = Frozen(layer.mlp.down_proj)
    for m in (model, plain):
        add_lora(m, LoraConfig(r=4, use_dora=dora))
        randomize(adapter_parameters(m).values())
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    expected = logits(model)
    with pytest.warns(UserWarning, match="dequantized weights of 4"):
        merge(model)
    assert type(model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_an_adapter_on_a_quantized_base(quantize):
    """As on the same base dequantized: values, gradients, and what is merged."""
    model = quantize(make())
    plain = dequantize(copy.deepcopy(model))
    results = []
    for m in (model, plain):
        add_lora(m, LoraConfig(r=4))
        randomize(adapter_parameters(m).values())
        results.append((logits(m), torch.autograd.grad(logits(m).square().sum(), list(adapter_parameters(m).values()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    with pytest.warns(UserWarning, match="dequantized weights of 14"):
        merge(model)
    torch.testing.assert_close(logits(model), results[0][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_unties_what_differs(target: str):
    model = add_lora(make(dataclasses.replace(CONFIG, tie_word_embeddings=True)), LoraConfig(target_modules=[target]))
    randomize(p for p in model.parameters() if p.requires_grad)
    expected = logits(model)
    merge(model)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.embed_tokens.weight
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_merging_keeps_a_tie_it_does_not_touch():
    model = add_lora(make(dataclasses.replace(CONFIG, tie_word_embeddings=True)), LoraConfig())
    randomize(p for p in model.parameters() if p.requires_grad)
    merge(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.embed_tokens.weight


def test_merging_refuses():
    tied = Encoder(EncoderConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    add_lora(tied, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    with pytest.raises(UserError, match="one matrix in this kind of model"):
        merge(tied)
    model = make()
    with pytest.raises(UserError, match="no adapter is active"):
        merge(model)
    add_lora(model, LoraConfig())
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.adapters["default"].B[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        merge(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "rank is a whole number"),
        ({"r": 2.5}, "rank is a whole number"),
        ({"r": 33}, "r 33 is more than 32, the smaller side of"),
        ({"rank_pattern": {"q_proj": 40}}, "r 40 is more than 32"),
        ({"lora_alpha": float("nan")}, "a number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
        ({"target_modules": ["q_porj"]}, "Did you mean 'q_proj'"),
        ({"target_modules": "q_proj"}, "regular expression of whole names"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": []}, "a list of names, not"),
        ({"target_modules": ["input_layernorm"]}, "is a RMSNorm"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, "finds no module"),
        ({"layers_to_transform": 7}, "finds no module"),
        ({"modules_to_save": ["nrom"]}, "Did you mean 'norm'"),
        ({"bias": "all"}, "use none"),
        ({"init_lora_weights": "pissa"}, "changed its base"),
        ({"task_type": "CAUSAL"}, "Did you mean 'CAUSAL_LM'"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA of an embedding"),
    ],
)
def test_refuses(settings: dict, message: str):
    model = make()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UserError, match=message):
        add_lora(model, LoraConfig(**settings))
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_refuses_names():
    model = add_lora(make(), LoraConfig())
    for name in ("default", "a.b", "", "keys"):
        with pytest.raises(UserError, match="adapter_name"):
            add_lora(model, LoraConfig(), name)


def test_same_seed_same_adapter():
    one, two, other = (add_lora(make(), LoraConfig(), seed=seed) for seed in (3, 3, 4))
    pairs = list(zip(*(adapter_parameters(m).values() for m in (one, two, other))))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def _trainer(model, folder, steps: int, dtype=torch.float32) -> Trainer:
    def data(step: int) -> list[Batch]:
        ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(step))
        return [Batch(ids[:, :-1], ids[:, 1:], torch.arange(11).expand(2, -1), None)]

    config = TrainConfig(optim="adamw", learning_rate=1e-2, max_steps=6, save_steps=3)
    return Trainer(model, causal_lm, data, config, steps, folder, dtype=dtype)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    settings = LoraConfig(r=4, lora_dropout=0.1, modules_to_save=["norm"])
    whole = add_lora(make(), settings)
    frozen = copy.deepcopy(whole)
    _trainer(whole, tmp_path / "whole", 6).train()
    first = _trainer(add_lora(make(), settings), tmp_path / "parts", 6)
    for _ in range(3):
        first.step()
    first.save()
    second = add_lora(make(), settings, seed=9)
    trainer = _trainer(second, tmp_path / "parts", 6)
    assert trainer.resume() == 3
    trainer.train()
    for (name, a), b, before in zip(whole.named_parameters(), second.parameters(), frozen.parameters()):
        assert torch.equal(a, b)
        assert torch.equal(a, before) != (".adapters." in name)


def test_bf16_has_masters_of_the_adapter_alone(bf16):
    model = add_lora(make(), LoraConfig(r=4))
    trainer = _trainer(model, None, 3, torch.bfloat16)
    assert trainer.masters.parameters.keys() == adapter_parameters(model).keys()
    first = trainer.masters.parameters["layers.0.self_attn.q_proj.adapters.default.B"].clone()
    trainer.step()
    assert not torch.equal(first, trainer.masters.parameters["layers.0.self_attn.q_proj.adapters.default.B"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_saving_needs_names_of_a_family(tmp_path):
    model = add_lora(make(dataclasses.replace(CONFIG, position="none")), LoraConfig())
    with pytest.raises(UserError, match="no published architecture"):
        save_adapter(model, tmp_path)
