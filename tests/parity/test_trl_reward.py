"""The reward model's loss is that of TRL's RewardTrainer, value and gradient, driven through TRL's own code."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zero2hero.align.reward import Pair, objective, pair_batch
from zero2hero.models import from_pretrained

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same random reward model, TRL's side and ours."""
    config = transformers.Qwen3Config(
        vocab_size=61, max_position_embeddings=64, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForSequenceClassification(config)
    folder = tmp_path_factory.mktemp("trl")
    torch.nn.init.normal_(theirs.score.weight, 0, 0.2)
    theirs.save_pretrained(folder)
    return theirs.train(), from_pretrained(folder).train()


def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    texts = [(rng.integers(1, 61, rng.integers(3, 20)), rng.integers(1, 61, rng.integers(3, 20))) for _ in range(6)]
    return [Pair(*two, margin=float(m)) for two, m in zip(texts, rng.uniform(-1, 2, 6), strict=True)]


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01, 0.7])
def test_loss_and_gradients_are_trls(models, margin, center):
    theirs, ours = models
    some = pairs() if margin else [Pair(p.chosen, p.rejected) for p in pairs()]
    collator = trl.trainer.reward_trainer.DataCollatorForPreference(pad_token_id=0)
    rows = [{"chosen_ids": pair.chosen.tolist(), "rejected_ids": pair.rejected.tolist()} for pair in some]
    inputs = collator([row | {"margin": pair.margin} if margin else row for row, pair in zip(rows, some, strict=True)])
    alone = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=theirs, accelerator=alone, _tp_size=1, _total_train_tokens=0,
        args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )  # fmt: skip
    theirs.zero_grad()
    want = trl.RewardTrainer.compute_loss(trainer, theirs, dict(inputs))
    want.backward()
    ours.zero_grad()
    found = objective(ours, pair_batch(some).to("cpu"), center)
    (found.sum / found.weight).backward()
    assert float(found.sum.detach() / found.weight) == pytest.approx(float(want.detach()), abs=1e-5)
    for name, theirs_name in (("score.weight", "score.weight"), ("embed_tokens.weight", "model.embed_tokens.weight"),
                              ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight")):  # fmt: skip
        got, expected = ours.get_parameter(name).grad, theirs.get_parameter(theirs_name).grad
        assert expected.abs().max() > 1e-4
        assert torch.allclose(got, expected, atol=1e-5 * max(1.0, float(expected.abs().max()))), name
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        shown = float(found.metrics[name] / found.weight)
        assert shown == pytest.approx(trainer._metrics["train"][name][0], abs=1e-5), name
