"""The reference is the policy as it was, whatever is trained and however long."""

from __future__ import annotations

import pytest
import torch

from zero2hero.align.reference import Reference
from zero2hero.config import DecoderConfig
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.tune import LoraConfig, adapted_modules, add_lora

IDS = torch.arange(24).view(2, 12) % 40


def policy(dropout=0.0):
    model = Decoder(DecoderConfig(vocab_size=40, hidden_size=32, num_attention_heads=4, dropout=dropout))
    init_weights(model, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return model


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(IDS).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "saved head", "lora again"])
def test_reference_is_the_policy_before_training(kind):
    model = policy()
    if kind != "full":
        more = {"modules_to_save": ["norm"]} if kind == "saved head" else {"use_dora": kind == "dora"}
        add_lora(model, LoraConfig(r=4, target_modules="all-linear", **more))
    if kind == "lora again":  # an adapter that has learned something already
        train(model)
    with torch.no_grad():
        before = model.eval()(IDS)
    reference = Reference.of(model)
    assert (reference.frozen is None) == (kind != "full")
    assert (reference.weights is None) == (kind != "lora again")
    train(model)
    with reference(model) as old:
        torch.testing.assert_close(old(IDS), before, rtol=1e-5, atol=1e-6)
        assert not old(IDS).requires_grad
    assert model.training
    assert (model(IDS) - before).abs().max() > 1e-3, "the policy goes on as it is"
    assert all(m.active == "default" for m in adapted_modules(model).values())
    assert any(p.requires_grad for p in model.parameters())


def test_no_dropout_and_no_trace_after_an_error():
    model = add_lora(policy(dropout=0.5), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)).train()
    reference = Reference.of(model)
    with reference(model) as old:
        assert torch.equal(old(IDS), old(IDS))
    with pytest.raises(RuntimeError, match="stop"), reference(model):
        raise RuntimeError("stop")
    assert model.training
    assert torch.is_grad_enabled()


def test_copy_is_in_the_precision_of_training():
    frozen = Reference.of(policy(), dtype=torch.bfloat16).frozen
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen.parameters())
