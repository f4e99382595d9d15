"""Muon, AdamW's groups and the schedules, against plain references."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.models import Decoder, init_weights
from zero2hero.train.optim import POLAR_EXPRESS, Muon, make_optimizers, orthogonalize
from zero2hero.train.schedule import learning_rate_factor, resolve_steps

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(16, 16), (64, 16), (16, 64), (1, 8), (8, 1), (48, 40)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T by the singular value decomposition."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def conditioned(rows: int, columns: int, smallest: float, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values spread evenly (in their logarithms) from 1 down to `smallest`."""
    u, _, vt = torch.linalg.svd(random(rows, columns, seed=seed), full_matrices=False)
    return u * torch.logspace(0, math.log10(smallest), min(rows, columns)) @ vt


# --- the orthogonal factor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_orthogonalize(shape, scale):
    matrix = conditioned(shape[0], shape[1], 0.02) * scale
    found = orthogonalize(matrix[None])[0]
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.8
    assert values.max() < 1.2
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), polar(matrix).float().flatten(), dim=0)
    assert cosine > 0.99


def test_small_directions_are_lifted():
    """A singular value 1/1000 of the largest comes out near 1: it is learned as fast as any other."""
    values = torch.linalg.svdvals(orthogonalize(conditioned(32, 32, 1e-3)[None])[0])
    assert values.min() > 0.5
    assert values.max() < 1.2


def test_each_step_brings_it_nearer():
    matrix = conditioned(24, 32, 0.01)
    errors = [float((orthogonalize(matrix[None], steps)[0] - polar(matrix).float()).norm()) for steps in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_a_batch_is_its_matrices_one_by_one():
    batch = torch.stack([conditioned(12, 20, 0.1, seed) * 10.0**seed for seed in range(4)])
    for matrix, found in zip(batch, orthogonalize(batch)):
        assert (orthogonalize(matrix[None])[0] - found).abs().max() < 1e-4


def test_orthogonalize_turns_with_its_input():
    """The transpose of a matrix, or a rotation of it, gives the transpose, or that rotation, of the answer."""
    matrix, turn = conditioned(12, 20, 0.1), polar(random(12, 12, seed=5)).float()
    found = orthogonalize(matrix[None])[0]
    assert (orthogonalize(matrix.T[None])[0] - found.T).abs().max() < 1e-4
    assert (orthogonalize((turn @ matrix)[None])[0] - turn @ found).abs().max() < 1e-4


def test_nothing_stays_nothing():
    assert (orthogonalize(torch.zeros(2, 4, 5)) == 0).all()


def test_the_polynomials_as_scalars():
    """On a 1 x 1 matrix orthogonalize is the polynomials' composition; all of (0.01, 1] ends near 1."""
    x = torch.linspace(0.01, 1.0, 200, dtype=torch.double)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert (x - 1).abs().max() < 0.25
    one = torch.tensor([[[3.0]]])
    y = 1 / 1.02
    for a, b, c in POLAR_EXPRESS:
        y = a * y + b * y**3 + c * y**5
    assert float(orthogonalize(one)) == pytest.approx(y, abs=1e-4)


# --- Muon ---------------------------------------------------------------------------------------------------


def plain_muon(weight, gradients, lr, momentum, weight_decay):
    """The published algorithm for one matrix: running mean of gradients, Nesterov, U V^T, decay, scaled step."""
    weight, mean = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        ahead = momentum * mean + (1 - momentum) * gradient
        update = orthogonalize(ahead[None])[0] * 0.2 * math.sqrt(max(weight.shape))
        weight = weight - lr * weight_decay * weight - lr * update
    return weight


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_equals_the_plain_algorithm(weight_decay):
    shapes = [(6, 10), (10, 6), (6, 10), (6, 6), (6, 10)]  # three of one shape go as a batch
    weights = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    gradients = [[random(*shape, seed=100 + 10 * i + t) for t in range(4)] for i, shape in enumerate(shapes)]
    expected = [plain_muon(w.detach(), g, 0.05, 0.9, weight_decay) for w, g in zip(weights, gradients)]
    optimizer = Muon(weights, lr=0.05, momentum=0.9, weight_decay=weight_decay)
    assert len(optimizer.param_groups) == 3
    for t in range(4):
        for weight, each in zip(weights, gradients):
            weight.grad = each[t].clone()
        optimizer.step()
    for got, want in zip(weights, expected):
        assert (got - want).abs().max() < 1e-4


def test_muon_passes_over_what_has_no_gradient():
    moved, still = random(4, 4).requires_grad_(), random(4, 4, seed=1).requires_grad_()
    before = still.detach().clone()
    optimizer = Muon([moved, still], lr=0.1, weight_decay=0.1)
    moved.grad = random(4, 4, seed=2)
    optimizer.step()
    assert torch.equal(still.detach(), before)
    assert still not in optimizer.state


def test_an_update_is_of_the_size_of_adamws():
    """Root mean square 0.2 per element, whatever the shape (Liu et al. 2025)."""
    for shape in [(32, 32), (128, 32), (32, 128)]:
        weight = torch.zeros(shape, requires_grad=True)
        optimizer = Muon([weight], lr=1.0)
        weight.grad = conditioned(*shape, 0.1)
        optimizer.step()
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.1)


def test_muon_solves_a_least_squares_problem():
    target, weight = conditioned(8, 8, 0.05), torch.zeros(8, 8, requires_grad=True)
    optimizer = Muon([weight], lr=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).abs().max() < 0.02


# --- groups -------------------------------------------------------------------------------------------------

MODEL = DecoderConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, position="learned", norm="layernorm",
    feedforward="gelu_new", attention_bias=True, output_bias=True, mlp_bias=True, tie_word_embeddings=False,
)  # fmt: skip


def groups_by_name(optim: str, **settings):
    """name -> (kind of optimizer, its group), each parameter exactly once."""
    model = Decoder(MODEL)
    init_weights(model)
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    names = {p: name for name, p in named.items()}
    optimizers = make_optimizers(named, TrainConfig(optim=optim, **settings))
    found = [
        (names[p], (type(o).__name__, {k: v for k, v in g.items() if k != "params"}))
        for o in optimizers
        for g in o.param_groups
        for p in g["params"]
    ]
    assert sorted(name for name, _ in found) == sorted(named)
    return named, dict(found)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_only_matrices_of_the_layers_decay(optim):
    named, groups = groups_by_name(optim, weight_decay=0.25)
    for name, (kind, group) in groups.items():
        matrix = named[name].dim() == 2 and "embed" not in name and "lm_head" not in name
        assert group["weight_decay"] == (0.25 if matrix else 0.0), name
        assert kind == ("Muon" if matrix and optim == "muon" else "AdamW"), name


def test_learning_rates_and_settings_reach_the_optimizers():
    _, groups = groups_by_name(
        "muon", learning_rate=0.01, embedding_lr_scale=0.5, head_lr_scale=0.2,
        adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-5,
    )  # fmt: skip
    rates = {"embed_tokens.weight": 0.005, "embed_positions.weight": 0.005, "lm_head.weight": 0.002}
    for name, (kind, group) in groups.items():
        assert group["lr"] == group["initial_lr"] == pytest.approx(rates.get(name, 0.01))
        if kind == "AdamW":
            assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.7), 1e-5)


def test_a_tied_matrix_is_updated_once():
    model = Decoder(DecoderConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    optimizers = make_optimizers(dict(model.named_parameters()), TrainConfig())
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sum(p is model.embed_tokens.weight for p in parameters) == 1
    assert len(parameters) == len(set(parameters))


# --- schedules ----------------------------------------------------------------------------------------------


def factors(kind: str, total: int = 100, **settings) -> list[float]:
    return [learning_rate_factor(step, total, kind, **settings) for step in range(total)]


@pytest.mark.parametrize("warmup", [10, 0.1])
def test_schedules_in_closed_form(warmup):
    rising = [(step + 1) / 11 for step in range(10)]
    constant = factors("constant", warmup_steps=warmup)
    assert constant == pytest.approx(rising + [1.0] * 90)
    linear = factors("linear", warmup_steps=warmup)
    assert linear == pytest.approx(rising + [(90 - i) / 90 for i in range(90)])
    cosine = factors("cosine", warmup_steps=warmup)
    assert cosine == pytest.approx(rising + [(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)])
    for decay in (40, 0.4):
        stable = factors("warmup_stable_decay", warmup_steps=warmup, decay_steps=decay)
        assert stable == pytest.approx(rising + [1.0] * 50 + [(40 - i) / 40 for i in range(40)])


@given(
    st.sampled_from(["constant", "linear", "cosine", "warmup_stable_decay"]),
    st.integers(1, 60),
    st.floats(0, 0.5) | st.integers(1, 60),
    st.floats(0, 1, exclude_max=True) | st.integers(1, 60),
)
@settings(deadline=None)
def test_every_schedule_rises_then_falls_and_never_stands_at_zero(kind, total, warmup, decay):
    values = factors(kind, total, warmup_steps=warmup, decay_steps=decay)
    assert all(0 < value <= 1 for value in values)
    w = min(resolve_steps(warmup, total), total)
    assert all(a < b for a, b in pairwise(values[:w]))
    assert all(a >= b for a, b in pairwise(values[w:]))


def test_a_share_is_of_the_whole_run():
    assert [resolve_steps(value, 200) for value in (0, 0.25, 1, 1.0, 30)] == [0, 50, 1, 1, 30]


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="polynomial"):
        learning_rate_factor(1, 10, "polynomial")
