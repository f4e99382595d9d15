"""A model divided among ranks learns as the whole one does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ranks import difference, plain, together
from runs import make

from zero2hero.train.parallel import ALONE, Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

GPT2 = {
    "position": "learned", "norm": "layernorm", "feedforward": "gelu_new", "attention_bias": True, "output_bias": True,
    "mlp_bias": True, "qk_norm": False, "tie_word_embeddings": False,
}  # fmt: skip


def learn(ranks: Ranks, shape: dict[str, Any], **settings) -> dict[str, Any]:
    """Losses of 20 steps and of an evaluation, norms, and the weights at the end."""
    trainer = make(ranks, shape=shape, max_grad_norm=0.5, **settings)
    trainer.train()
    return vars(trainer.tracker) | {"weights": trainer.masters.gathered()}


def check(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for one in found:
        assert len(one["losses"]) == 20
        assert np.abs(np.subtract(one["losses"], alone["losses"])).max() < 1e-5
        assert one["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert difference(one["weights"], alone["weights"]) < 1e-4
    assert alone["losses"][-1] < alone["losses"][0]


@pytest.mark.parametrize("shape", [{}, GPT2], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize(("size", "tp_size"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_losses_are_those_of_one_process(size, tp_size, shape):
    settings: dict[str, Any] = {"optim": "adamw"}
    alone = plain(learn(ALONE, shape, **settings))
    check(together(size, learn_divided, shape, settings, tp_size=tp_size), alone)


def learn_divided(ranks: Ranks, shape: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return learn(ranks, shape, fsdp=True, tp_size=ranks.tp_size, **settings)
