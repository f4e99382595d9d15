"""Prompt and prefix tuning: begun as real tokens they are those tokens; they learn, and they write."""

from __future__ import annotations

import pytest
import torch

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.batches import Batch
from zero2hero.errors import UserError
from zero2hero.generate.decode import generate_tokens
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.models import Decoder, init_weights
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import causal_lm
from zero2hero.tune import add_prefix, add_prompt

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
ADD = pytest.mark.parametrize("add", [add_prompt, add_prefix])


def make() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      max_position_embeddings=32)
    )  # fmt: skip
    init_weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@ADD
def test_begun_as_tokens_they_are_those_tokens(add):
    base = make()
    first = [3, 1, 4, 1]
    whole = base(torch.cat([torch.tensor([first]).expand(2, -1), IDS], 1))[:, 4:].detach()
    model = add(base, 4, ids=first)
    torch.testing.assert_close(model(IDS), whole, rtol=1e-4, atol=1e-5)


@ADD
def test_only_they_learn(add):
    model = add(make(), 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = Batch(IDS[:, :-1], IDS[:, 1:], torch.arange(8).expand(2, -1), None)
    config = TrainConfig(optim="adamw", learning_rate=0.1, max_steps=20, lr_scheduler_type="constant")
    trainer = Trainer(model, causal_lm, lambda step: [batch], config, 20)
    losses = []
    for _ in range(20):
        trainer.step()
        losses.append(trainer.step_loss)
    assert losses[-1] < losses[0] - 0.1
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == ["prompt_embeddings"]
    with pytest.raises(UserError, match="packing"):
        model(IDS, document_ids=torch.zeros_like(IDS))


@ADD
def test_they_write(add):
    """Ragged prompts with a cache, as the full forward pass says."""
    model = add(make(), 4)
    prompts = [[5, 6, 7], [8]]
    tokens: dict[int, list[int]] = {0: [], 1: []}
    room = [model.with_room(prompt) for prompt in prompts]
    for token in generate_tokens(model, room, SamplingConfig(max_new_tokens=5, temperature=0), frozenset()):
        tokens[token.row].append(token.id)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
        assert tokens[row] == ids[len(prompt) :]


@ADD
def test_there_must_be_room(add):
    for count in (0, 32):
        with pytest.raises(UserError, match="from 1 to 31"):
            add(make(), count)
