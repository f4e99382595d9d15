"""A model divided among ranks learns as the whole one does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import difference, plain, together
from runs import make

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder
from zero2hero.train.parallel import ALONE, Ranks
from zero2hero.train.sharding import compile_blocks, parallelize

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


def check(found: Iterable[dict[str, Any]], alone: dict[str, Any]) -> None:
    for one in found:
        assert len(one["losses"]) == 20
        assert np.abs(np.subtract(one["losses"], alone["losses"])).max() < 1e-5
        assert one["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert difference(one["weights"], alone["weights"]) < 1e-4
    assert alone["losses"][-1] < alone["losses"][0]


RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"optim": "muon"}),
    (GPT2, {"optim": "adamw", "gradient_checkpointing": True}),
]


def all_runs(ranks: Ranks) -> list[dict[str, Any]]:
    return [learn(ranks, shape, fsdp=True, tp_size=ranks.tp_size, **settings) for shape, settings in RUNS]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return plain(all_runs(ALONE))


@pytest.mark.parametrize(("size", "tp_size"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_losses_are_those_of_one_process(alone, size, tp_size):
    by_rank = together(size, all_runs, tp_size=tp_size)
    for found, expected in zip(zip(*by_rank), alone):
        check(found, expected)


def test_what_cannot_be_divided_is_refused():
    ranks = Ranks(0, 4, 0, 4)
    model = Decoder(DecoderConfig(vocab_size=29, hidden_size=36, num_attention_heads=6, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"num_attention_heads 6 cannot be divided by train\.tp_size 4"):
        parallelize(model, ranks, TrainConfig(tp_size=4), torch.float32)
    for optim, dtype in (("adafactor", torch.float32), ("adamw_8bit", torch.float32), ("adamw", torch.float16)):
        with pytest.raises(UserError, match="does not work on parts of a weight"):
            parallelize(model, Ranks(0, 2), TrainConfig(fsdp=True, optim=optim), dtype)


@pytest.mark.parametrize("shape", [{}, GPT2 | {"feedforward": "relu2"}], ids=["qwen3", "gpt2"])
def test_each_block_compiles_to_one_graph_and_computes_the_same(shape):
    as_it_is, compiled = make(shape=shape), make(shape=shape)
    compile_blocks(compiled.model, backend="aot_eager", fullgraph=True)
    for trainer in (as_it_is, compiled):
        for p in trainer.model.parameters():
            torch.manual_seed(p.numel())
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
        trainer._backward(trainer.data(0))
    gradients = [plain({n: p.grad for n, p in t.masters.parameters.items()}) for t in (as_it_is, compiled)]
    scale = max(float(np.abs(g).max()) for g in gradients[0].values())
    assert difference(*gradients) < 1e-5 * scale
