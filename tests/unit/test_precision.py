"""fp16: the loss is scaled so that small gradients survive, and a step whose gradients overflow changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.batches import Batch
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import Loss, causal_lm
from zero2hero.train.precision import LossScale, MasterWeights

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = DecoderConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


def make(objective=causal_lm, dtype: torch.dtype = torch.float16, steps: int = 30) -> Trainer:
    model = Decoder(SHAPE)
    init_weights(model)
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(16).expand(4, -1), None)
    config = TrainConfig(max_steps=steps, learning_rate=0.01)
    return Trainer(model, objective, lambda step: [batch], config, steps, dtype=dtype)


def test_fp16_learns_as_fp32_does() -> None:
    losses = {}
    for dtype in (torch.float32, torch.float16):
        trainer = make(dtype=dtype)
        trainer.train()
        losses[dtype] = trainer.metrics["loss"]
    assert losses[torch.float16] < 2.5
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], abs=0.05)
    assert trainer.metrics["loss_scale"] == LossScale.FIRST


def test_a_gradient_too_small_for_fp16_survives() -> None:
    weight = torch.nn.Linear(1, 1, bias=False)
    masters = MasterWeights(weight, torch.float16)
    assert masters.loss_scale is not None
    masters.loss_scale.value = 2.0**14
    masters.backward((weight(torch.ones(1, 1, dtype=torch.float16)) * 1e-3).float().sum() * 1e-6)
    assert float(masters.gradients[0]) == pytest.approx(1e-9, rel=0.01)  # fp16's smallest number is 6e-8


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    explode = [False]

    def objective(model, batch) -> Loss:
        loss = causal_lm(model, batch)
        return Loss(loss.sum + (loss.sum - loss.sum.detach()) * (1e30 if explode[0] else 0.0), loss.weight)

    trainer = make(objective)
    trainer.step()
    before = {name: p.clone() for name, p in trainer.masters.parameters.items()}
    explode[0] = True
    trainer.step()
    assert trainer.state.step == 2
    assert all(torch.equal(before[name], p) for name, p in trainer.masters.parameters.items())
    assert math.isfinite(trainer.metrics["grad_norm"])
    scale = trainer.masters.loss_scale
    assert scale is not None
    assert scale.value == LossScale.FIRST / 2
    explode[0] = False
    trainer.step()
    assert any(not torch.equal(before[name], p) for name, p in trainer.masters.parameters.items())


def test_the_scale_grows_again_and_is_remembered() -> None:
    scale = LossScale()
    assert scale.overflowed(math.inf)
    for _ in range(LossScale.GROWTH_STEPS):
        assert not scale.overflowed(1.0)
    assert scale.value == LossScale.FIRST
    scale.overflowed(1.0)
    other = LossScale()
    other.load_state_dict(scale.state_dict())
    assert vars(other) == vars(scale)
    assert (other.value, other.good_steps) == (LossScale.FIRST, 1)


def test_a_scale_of_next_to_nothing_ends_the_run() -> None:
    scale = LossScale()

    def overflow() -> None:
        for _ in range(100):
            scale.overflowed(math.nan)

    with pytest.raises(UserError, match="--precision bf16"):
        overflow()


def test_a_loss_that_overflows_is_an_error_and_no_question_of_scale() -> None:
    def objective(model, batch) -> Loss:
        loss = causal_lm(model, batch)
        return Loss(loss.sum * math.inf, loss.weight)

    with pytest.raises(UserError, match="nothing was updated"):
        make(objective).step()
