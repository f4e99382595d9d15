"""Each illness is given to a tiny model for real, and exactly that finding must be made; a healthy run has none."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from zero2hero.command_line import describe
from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig
from zero2hero.data.batches import Batch, evaluation_windows
from zero2hero.data.cache import Corpus
from zero2hero.data.worlds import world
from zero2hero.data.worlds.symbolic import SYMBOLS
from zero2hero.errors import UserError
from zero2hero.machine import Machine
from zero2hero.models import Decoder, init_weights
from zero2hero.nn.logprobs import nll_sum
from zero2hero.train import vitals
from zero2hero.train.diagnosis import CHECKS, Diagnosis, Finding, diagnose, medians, verdict
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import causal_lm
from zero2hero.train.pretrain import causal_data, pretrain
from zero2hero.train.tracking import Tracker, read_metrics
from zero2hero.train.vitals import Vitals, share_unused

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
V = 17  # sixteen symbols, and the one that begins a document
SHAPE = DecoderConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
LEARN = TrainConfig(
    max_steps=160, logging_steps=4, eval_steps=16, learning_rate=0.01, max_length=64, per_device_train_batch_size=8
)


def corpus(split: str, count: int) -> Corpus:
    texts = list(world("markov").documents(split, count))  # type: ignore[call-arg]
    rows = [[V - 1, *(SYMBOLS.index(symbol) for symbol in text)] for text in texts]
    ends = np.cumsum([len(row) for row in rows])
    return Corpus(
        np.fromiter(itertools.chain(*rows), dtype=np.uint16), np.stack([ends - [len(r) for r in rows], ends], 1)
    )


def noise(like: Corpus) -> Corpus:
    return Corpus(np.random.default_rng(0).integers(0, V - 1, len(like.tokens)).astype(np.uint16), like.spans)


def ill(
    folder: Any,
    *,
    training: Corpus | None = None,
    shape: dict[str, Any] | None = None,
    treat: Callable[[Trainer], None] = lambda trainer: None,
    ngram: float | None = None,
    told: list[str] | None = None,
    **settings: Any,
) -> list[Finding]:
    """Train, with whatever `treat` does to the trainer before, and return what is found wrong."""
    config = dataclasses.replace(LEARN, **settings)
    model = Decoder(dataclasses.replace(SHAPE, **shape or {}))
    init_weights(model)
    total, data = causal_data(training or corpus("train", 2000), config, CPU)
    windows = [rows.to(CPU) for rows in evaluation_windows(corpus("validation", 100), 64, 50)]

    def evaluate() -> dict[str, float]:
        sums = [nll_sum(model(b.ids_BT), model.head_weight, b.targets_BT) for b in windows]
        return {"eval_loss": float(sum(s for s, _ in sums) / sum(w for _, w in sums))}

    watchers = [Vitals(), Diagnosis(folder, {"vocab_size": V}, (told if told is not None else []).append)]
    with Tracker(folder, tensorboard=False) as tracker:
        if ngram:
            tracker.log(0, {"ngram_nll": ngram, "ngram_order": 3})
        trainer = Trainer(
            model, causal_lm, data, config, total, evaluate=evaluate, tracker=tracker, watchers=watchers
        )  # fmt: skip
        treat(trainer)
        trainer.train()
    return diagnose(read_metrics(folder), {"vocab_size": V})


def only(findings: list[Finding], name: str) -> Finding:
    assert [finding.name for finding in findings] == [name], verdict(findings)
    return findings[0]


# --- illnesses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedforward", ["swiglu", "relu2", "gelu"])
@pytest.mark.parametrize(("optim", "rate"), [("muon", 0.01), ("adamw", 0.005)])
def test_a_healthy_run_has_no_finding(tmp_path, feedforward, optim, rate):
    told: list[str] = []
    floor = world("markov").floor()  # type: ignore[attr-defined]
    findings = ill(
        tmp_path, optim=optim, learning_rate=rate, shape={"feedforward": feedforward}, told=told, ngram=floor + 0.2
    )
    assert findings == [], verdict(findings)
    assert told == []


@pytest.mark.parametrize(("optim", "rate"), [("muon", 3.0), ("adamw", 3.0)])
def test_learning_rate_far_too_high(tmp_path, optim, rate):
    told: list[str] = []
    finding = only(ill(tmp_path, optim=optim, learning_rate=rate, told=told), "learning rate too high")
    assert finding.serious
    assert f"--train.learning_rate {rate / 10:g}" in finding.advice
    assert len(told) == 1, told  # while it trained, and once
    assert "learning rate too high" in told[0]


def test_a_run_that_ended_in_nan_is_judged_by_what_it_left(tmp_path):
    with pytest.raises(UserError, match="the loss is nan"):
        ill(tmp_path, learning_rate=30.0)
    only(diagnose(read_metrics(tmp_path), {"vocab_size": V}), "learning rate too high")


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_learning_rate_far_too_low(tmp_path, optim):
    finding = only(ill(tmp_path, optim=optim, learning_rate=1e-7), "learning rate too low")
    assert "1e-06" in finding.advice


def test_over_fitting(tmp_path):
    settings: dict[str, Any] = {"lr_scheduler_type": "constant", "weight_decay": 0.0}
    finding = only(ill(tmp_path, training=corpus("train", 8), **settings), "over-fitting")
    steps = [int(step) for step in re.findall(r"at step (\d+)", finding.evidence)]
    evaluations = {row["step"]: row["eval_loss"] for row in read_metrics(tmp_path) if "eval_loss" in row}
    assert steps[0] == min(evaluations, key=evaluations.__getitem__)
    assert steps[1] == 160


@pytest.mark.parametrize("feedforward", ["relu", "relu2"])
def test_dead_units(tmp_path, feedforward):
    def kill(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.layers[1].mlp.up_proj.bias[:64] = -100.0  # type: ignore[index,union-attr]

    shape = {"feedforward": feedforward, "mlp_bias": True}
    finding = only(ill(tmp_path, treat=kill, shape=shape), "dead units")
    assert "in 1 of 2 layers" in finding.what
    assert "layers.1: 50%" in finding.evidence


def test_a_spike_by_a_corrupted_batch(tmp_path):
    def corrupt(trainer: Trainer) -> None:
        data = trainer.data
        trainer.data = lambda step: [broken(b) for b in data(step)] if step == 101 else data(step)

    def broken(batch: Batch) -> Batch:
        targets = torch.randint(0, V, batch.targets_BT.shape, generator=torch.Generator().manual_seed(0))
        return dataclasses.replace(batch, targets_BT=targets)

    finding = only(ill(tmp_path, treat=corrupt), "loss spike")
    assert finding.evidence.startswith("Step 102: loss ")
    assert "a single step" in finding.what


def test_a_loss_that_stands_still(tmp_path):
    """There is nothing to learn in noise."""
    finding = only(ill(tmp_path, training=noise(corpus("train", 2000))), "loss stands still")
    assert f"{math.log(V):.3f}" in finding.evidence


def test_no_better_than_counting(tmp_path):
    """Healthy, but stopped long before it is better than a 3-gram model of the same text."""
    floor = world("markov").floor()  # type: ignore[attr-defined]
    finding = only(
        ill(tmp_path, max_steps=30, logging_steps=1, learning_rate=0.003, ngram=floor), "not yet better than counting"
    )
    assert "--train.max_steps 60" in finding.advice


def test_slow_data(tmp_path):
    def slow(trainer: Trainer) -> None:
        data = trainer.data

        def late(step):
            time.sleep(0.05)
            return data(step)

        trainer.data = late

    only(ill(tmp_path, treat=slow, max_steps=40), "slow data")


def test_a_run_ends_with_the_verdict_on_screen_and_on_its_page(tmp_path, monkeypatch, capsys):
    """The whole road: `zero2hero pretrain` with a learning rate at which nothing moves."""
    monkeypatch.setattr("zero2hero.machine.prepare", lambda: Machine("a processor", 1, 1e9, 0.0, "as is"))
    (tmp_path / "text.txt").write_text("\n\n".join(world("markov").documents(count=120)))
    train = TrainConfig(max_steps=24, logging_steps=2, max_length=32, per_device_train_batch_size=2, learning_rate=1e-8)
    config = PretrainConfig(
        data=str(tmp_path / "text.txt"), output_dir=str(tmp_path / "run"), precision="fp32", device="cpu", report_to=[],
        tokenizer=TokenizerConfig(kind="char"), model=dataclasses.replace(SHAPE, vocab_size=0), train=train,
    )  # fmt: skip
    pretrain(config)
    shown = capsys.readouterr().out
    assert "diagnosis: learning rate too low: The weights hardly move" in shown
    assert "Try: --train.learning_rate 1e-07 or more" in shown
    assert shown.index("step 24/24") < shown.index("peak memory:") < shown.index("diagnosis:")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Learning rate too low" in page
    assert "<code>--train.learning_rate 1e-07</code>" in page


# --- what is measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedforward", ["relu", "relu2"])
def test_dead_units_are_those_that_never_fire(feedforward):
    """Against the activations themselves, with `down_proj` still at zero and with several micro-batches."""
    model = Decoder(dataclasses.replace(SHAPE, feedforward=feedforward, mlp_bias=True))
    init_weights(model)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.mlp.up_proj.bias[: 30 + 20 * i] = -100.0
            layer.mlp.up_proj.bias[60:] -= torch.linspace(0, 0.3, 68)  # some fire now and then
    fired = [torch.zeros(128, dtype=torch.bool) for _ in model.layers]

    def look(i: int, x: torch.Tensor) -> None:
        fired[i] |= (model.layers[i].mlp.up_proj(x) > 0).flatten(0, 1).any(0)

    for i, layer in enumerate(model.layers):
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, x, i=i: look(i, x))
    config = dataclasses.replace(LEARN, gradient_accumulation_steps=2, logging_steps=1)
    total, data = causal_data(corpus("train", 100), config, CPU)
    watcher = Vitals()
    Trainer(model, causal_lm, data, config, total, watchers=[watcher]).step()
    found = watcher.metrics()
    for i in range(2):
        assert 30 + 20 * i <= int((~fired[i]).sum()) < 128
        assert found[f"dead_units/layers.{i}"] >= float((~fired[i]).float().mean())
        assert found[f"dead_units/layers.{i}"] <= float((~fired[i]).float().mean()) + 0.05  # hardly any fires once


def test_a_layer_without_gradient_is_all_unused():
    assert float(share_unused(torch.zeros(4, 6))) == 1.0
    grad = torch.ones(4, 6)
    grad[:, :3] *= 1e-6  # saturated: not zero, and nothing
    assert float(share_unused(grad)) == 0.5


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_update_ratios_are_those_of_the_weights(monkeypatch, optim):
    ratios = {}
    for size in (4096, 300):
        monkeypatch.setattr(vitals, "SAMPLE", size)
        model = Decoder(dataclasses.replace(SHAPE, tie_word_embeddings=False))
        init_weights(model)
        config = dataclasses.replace(LEARN, optim=optim, logging_steps=3)
        total, data = causal_data(corpus("train", 200), config, CPU)
        watcher = Vitals()
        trainer = Trainer(model, causal_lm, data, config, total, watchers=[watcher])
        trainer.step()
        trainer.step()
        watcher.metrics()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.step()
        ratios[size] = watcher.metrics()
    for kind, part in {"attention": "attn", "feedforward": "mlp", "embeddings": "embed", "head": "lm_head"}.items():
        pairs = [(p.detach() - before[n], before[n]) for n, p in model.named_parameters() if part in n and p.dim() == 2]
        exact = math.sqrt(sum(float((u**2).sum()) for u, _ in pairs) / sum(float((w**2).sum()) for _, w in pairs))
        assert ratios[4096][f"update_ratio/{kind}"] == pytest.approx(exact, rel=1e-4)
        assert ratios[300][f"update_ratio/{kind}"] == pytest.approx(exact, rel=0.2)
    assert ratios[4096]["update_ratio/vectors"] > 0


def test_the_worst_step_of_a_window_is_kept_over_a_resume():
    model = Decoder(SHAPE)
    init_weights(model)
    total, data = causal_data(corpus("train", 200), LEARN, CPU)
    trainer = Trainer(model, causal_lm, data, LEARN, total, watchers=[Vitals()])
    losses, norms = [], []
    for _ in range(3):
        trainer.step()
        losses.append(trainer.step_loss)
        norms.append(trainer.metrics["grad_norm"])
    resumed = Vitals()
    resumed.load_state_dict(trainer.watchers[0].state_dict())
    found = resumed.metrics()
    assert (found["loss_max"], found["loss_max_step"]) == (max(losses), 1 + losses.index(max(losses)))
    assert found["grad_norm_max"] == max(norms)
    assert resumed.metrics() == {}


# --- how it is judged -----------------------------------------------------------------------------------------


def test_records_that_lack_things_are_judged_without_fuss():
    assert diagnose([]) == []
    odd: list[dict[str, Any]] = [{"step": i, "loss": math.nan, "grad_norm": math.inf} for i in range(30)]
    assert diagnose(odd) == []
    odd += [{"step": 30, "samples": []}, {"step": 31, "machine": {"processor": "x"}}, {"step": 32, "loss": "text"}]
    assert diagnose(odd, {"vocab_size": V}) == []
    assert diagnose([{"step": i, "loss": 2.0 - i / 100} for i in range(30)]) == []
    negative = [{"step": i, "loss": -i / 10, "loss_max": -i / 10, "learning_rate": 0.0} for i in range(30)]
    assert diagnose(negative) == []


def test_one_worse_evaluation_is_no_over_fitting():
    falling = [{"step": 10 * i, "loss": 2.0 - i / 50} for i in range(1, 21)]
    held_out = [2.0, 1.9, 1.8, 1.85]
    rows = falling + [{"step": 50 * i, "eval_loss": loss} for i, loss in enumerate(held_out, start=1)]
    assert diagnose(rows) == []
    only(diagnose([*rows, {"step": 200, "eval_loss": 1.84}]), "over-fitting")


def test_what_it_advises_can_be_typed():
    """Every option that any advice names is one of `zero2hero pretrain`."""
    import inspect

    from zero2hero.train import diagnosis

    options = set(re.findall(r"--([\w.]+)", inspect.getsource(diagnosis)))
    assert options >= {"train.learning_rate", "model.dropout", "train.early_stopping_patience"}
    assert options <= {option.name for option in describe(PretrainConfig)}


def test_verdict_says_what_was_checked():
    assert all(name in verdict([]) for name in CHECKS)
    finding = Finding("over-fitting", "It learns by heart.", "Step 3.", "`--model.dropout 0.1`")
    assert verdict([finding]) == "diagnosis: over-fitting: It learns by heart. Step 3. Try: --model.dropout 0.1"


def test_running_medians():
    np.testing.assert_array_equal(medians(np.array([1.0, 9.0, 2.0, 3.0, 3.0])), [1, 2, 3, 3, 3])
    np.testing.assert_array_equal(medians(np.array([4.0])), [4.0])
