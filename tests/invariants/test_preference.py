"""Preference optimization: a shared prompt changes nothing, ln 2 at the start, equal micro-batches, no big tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zero2hero.align.dpo import PreferenceData, objective, wilson
from zero2hero.align.pairs import Tree, answer_batch, answer_logprobs, encode
from zero2hero.align.preference import LOSSES
from zero2hero.align.reference import Reference
from zero2hero.alignment_configs import UNPAIRED, DpoConfig, PreferenceSettings
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.conversations import read_records, recognize
from zero2hero.errors import UserError
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.nn import logprobs
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.parallel import ALONE
from zero2hero.train.run import Place

PLACE = Place(ALONE, torch.device("cpu"), torch.float32, 0.0)
pytestmark = pytest.mark.usefixtures("one_thread")


def policy(seed=1, vocab_size=50, **more):
    model = Decoder(
        DecoderConfig(vocab_size=vocab_size, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **more)
    )
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def trees(count=8, seed=0, vocab_size=50):
    rng = np.random.default_rng(seed)
    return [Tree(rng.integers(0, vocab_size, rng.integers(1, 20)),
                 tuple(rng.integers(0, vocab_size, rng.integers(1, 12)) for _ in range(2)), i, bool(i % 3))
            for i in range(count)]  # fmt: skip


def alone(model, tree):
    """The log-probabilities of a tree's answers, each in a row of its own."""
    sums = []
    for answer in tree.answers:
        ids = torch.from_numpy(np.concatenate([tree.prompt, answer]))
        logits = model.logits(model(ids[None, :-1]))[0].log_softmax(-1)
        sums.append(logits.gather(1, ids[1:, None])[len(tree.prompt) - 1 :].sum())
    return sums


SHAPES = [
    {},
    {"sliding_window": 5},
    {"num_key_value_heads": 2, "qk_norm": True},
    {"position": "learned", "norm": "layernorm", "feedforward": "gelu"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [True, False, None])
def test_shared_prompt_equals_separate_sequences(shape, share):
    model, some = policy(**shape), trees()
    batch = answer_batch(some, share=share).to("cpu")
    found, _ = answer_logprobs(model, batch)
    expected = torch.stack([logprob for tree in some for logprob in alone(model, tree)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, len(found))
    gradients = [torch.autograd.grad(x @ weights, list(model.parameters())) for x in (found, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    assert (batch.branch_ids_BT is None) == (share is False)


def test_rows_hold_several_trees_and_little_padding():
    some = trees(64)
    shared, apart = (answer_batch(some, share=share) for share in (True, False))
    assert shared.num_tokens < 1.2 * sum(map(len, some))
    assert shared.num_tokens < 0.85 * apart.num_tokens
    assert shared.tokens_N.tolist() == [len(a) for tree in some for a in tree.answers]


def config_of(kind, size=8, together=1, **more):
    smoothing = {"label_smoothing": 0.1} if kind in ("exo_pair", "robust") else {}
    train = TrainConfig(per_device_train_batch_size=size, gradient_accumulation_steps=together)
    return DpoConfig(model="x", loss_type=kind, train=train, **(smoothing | more))


def gradient_of_step(kind, size, together, model, reference, **more):
    config = config_of(kind, size, together, **more)
    data = PreferenceData(trees(8), config, PLACE)
    data.refer(Reference(reference), model, data.order(1))
    model.zero_grad()
    total = weight = 0.0
    for index in range(together):
        loss = objective(model, data[index].to("cpu"), config)
        loss.sum.backward()
        total, weight = total + float(loss.sum), weight + float(loss.weight)
    return total / weight, torch.cat([p.grad.flatten() for p in model.parameters()]) / weight


@pytest.mark.parametrize("kind", list(LOSSES))
def test_micro_batches_are_parts_of_one_sum(kind):
    """8 x 1, 4 x 2, 1 x 8; but for those losses that say they depend on what is together."""
    model, reference = policy(1), policy(2).requires_grad_(False)
    found = [gradient_of_step(kind, 8 // n, n, model, reference) for n in (1, 2, 8)]
    same = [math.isclose(loss, found[0][0], rel_tol=1e-5) and torch.allclose(grad, found[0][1], atol=1e-5, rtol=1e-3)
            for loss, grad in found[1:]]  # fmt: skip
    assert all(same) or LOSSES[kind].together
    assert found[0][1].abs().sum() > 0


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "kto"])
def test_first_loss(kind):
    """With the policy as its own reference: ln 2 for DPO, exactly."""
    model, config = policy(), config_of(kind)
    data = PreferenceData(trees(8), config, PLACE)
    data.refer(Reference.of(model), model, data.order(1))
    loss = objective(model, data[0].to("cpu"), config)
    assert float(loss.sum / loss.weight) == pytest.approx(0.5 if kind == "kto" else math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "orpo", "kto"])
def test_no_tensor_of_batch_time_vocabulary(kind, monkeypatch):
    """With 128k words the logits of the batch would be 200 MB; nothing is as large as a tenth of them."""
    vocab_size, largest = 128_000, [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.shape[-1:] == (vocab_size,) and x.is_contiguous():
                    largest[0] = max(largest[0], x.numel())
            return out

    monkeypatch.setattr(logprobs, "_chunks", lambda n, v: (slice(i, min(i + 16, n)) for i in range(0, n, 16)))
    model = policy(vocab_size=vocab_size, max_position_embeddings=64)
    config = config_of(kind)
    data = PreferenceData(trees(8, vocab_size=vocab_size), config, PLACE)
    batch = data[0].to("cpu")
    with Watch():
        objective(model, batch, config).sum.backward()
    assert 0 < largest[0] <= 16 * vocab_size < batch.num_tokens * vocab_size / 10


def test_kinds_and_settings_agree():
    assert {name for name, kind in LOSSES.items() if kind.unpaired} == set(UNPAIRED)
    for name, kind in LOSSES.items():
        more = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        divergent = lambda: PreferenceSettings(loss_type=name, f_divergence_type="js_divergence", **more)  # noqa: B023, E731
        if kind.divergence:
            divergent()
        else:
            with pytest.raises(UserError, match="knows no f_divergence_type"):
                divergent()


@pytest.mark.parametrize(("options", "words"), [
    ({"loss_type": "sigmoidd"}, "Did you mean 'sigmoid'"), ({"loss_type": ["kto", "sft"]}, "stand alone"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 losses"), ({"beta": 0.0}, "beta"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"), ({"loss_type": "exo_pair"}, "above 0"),
    ({"ld_alpha": 1.5}, "ld_alpha"), ({"loss_type": "kto", "ld_alpha": 0.5}, "no pairs"),
])  # fmt: skip
def test_bad_settings(options, words):
    with pytest.raises(UserError, match=words):
        PreferenceSettings(**options)


# --- data -----------------------------------------------------------------------------------------------------


def words():
    return Tokenizer.train(["What is it? It is a cat. No, a dog. Yes"] * 3, 300)


def test_what_cannot_be_used_is_counted_and_named():
    rows = [{"prompt": "What", "chosen": " is it?", "rejected": " it"},
            {"prompt": "No", "chosen": " dog", "rejected": " dog"},
            {"prompt": "What is it?" * 9, "chosen": " cat", "rejected": " dog"},
            {"prompt": "It", "chosen": " is a cat." * 5 + " Yes", "rejected": " is a cat." * 5 + " No"}]  # fmt: skip
    found = encode([recognize(row, i + 1) for i, row in enumerate(rows)], words(), 12)
    assert [tree.number for tree in found.trees] == [1]
    said = found.report(12)
    assert "2 left out for chosen and rejected are the same (the first: record 2)" in said
    assert "1 left out for the prompt leaves no room for an answer in max_length 12 (the first: record 3)" in said
    assert "1 records are longer than max_length 12" in said
    with pytest.raises(UserError, match=r"no preference to learn from: 1 left out for chosen"):
        encode([recognize(rows[1])], words(), 12)
    with pytest.raises(UserError, match=r"holds no preference.*--loss_type kto learns from single answers"):
        encode([recognize({"prompt": "a", "completion": " b", "label": True})], words(), 12)


def test_single_answers_and_pairs_for_kto():
    rows = [{"prompt": "What", "completion": " is it?", "label": True},
            {"prompt": "No", "chosen": " dog", "rejected": " cat"},
            {"prompt": "It", "completion": " is", "label": False}]  # fmt: skip
    found = encode([recognize(row, i + 1) for i, row in enumerate(rows)], words(), 40, unpaired=True)
    assert [(t.number, t.liked) for t in found.trees] == [(1, True), (2, True), (2, False), (3, False)]
    answers = [tree.answers[0].tolist() for tree in found.trees]
    assert [tree.answers[1].tolist() for tree in found.trees] == [answers[i] for i in (3, 0, 0, 2)]


def test_real_preferences_become_trees(shared_data):
    tokenizer = Tokenizer.from_pretrained(shared_data / "tinystories656k")
    from zero2hero.tokenizer.templates import set_chat_template

    set_chat_template(tokenizer, "alpaca")
    records = [r for i, r in zip(range(100), read_records(shared_data / "llamafactory" / "dpo_en_demo.json"))]
    found = encode(records, tokenizer, 512)
    assert len(found.trees) > 30
    assert len(found.trees) + len(found.too_long) + len(found.same) == 100
    assert max(len(t.prompt) + max(map(len, t.answers)) for t in found.trees) <= 512


def test_wilson_interval():
    """Brown, Cai and DasGupta 2001: 0 of 10 gives 0 to 0.278."""
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-3))
    low, high = wilson(0.6, 100)
    assert (round(low, 3), round(high, 3)) == (0.502, 0.691)
