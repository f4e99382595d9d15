"""Muon: the orthogonal factor, its step against the plain algorithm, and against torch's."""

from __future__ import annotations

import math

import pytest
import torch

from zero2hero.train import muon_native
from zero2hero.train.muon import POLYNOMIALS, Muon, orthogonalize

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(16, 16), (64, 16), (16, 64), (1, 8), (8, 1), (48, 40), (40, 48)]


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
    matrix = conditioned(shape[0], shape[1], 0.03) * scale
    found = orthogonalize(matrix[None])[0]
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.8
    assert values.max() < 1.2
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), polar(matrix).float().flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (160, 64)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-4])
def test_rounding_to_bf16_makes_no_direction_too_large(shape, smallest, bf16):
    matrix = conditioned(*shape, smallest)
    values = torch.linalg.svdvals(orthogonalize(matrix[None].bfloat16())[0].float())
    assert 0.85 < values.max() < 1.4
    if smallest > 0.02:
        assert values.min() > 0.85


def test_small_directions_are_lifted():
    """A singular value 1/100 of the largest comes out above a third."""
    values = torch.linalg.svdvals(orthogonalize(conditioned(32, 32, 1e-2)[None])[0])
    assert values.min() > 0.33
    assert values.max() < 1.2


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
def test_it_is_nearer_to_the_orthogonal_factor_than_torchs(shape):
    """For a random gradient, by the cosine; torch's own polynomials leave singular values between 0.7 and 1.2."""
    gradient = random(*shape)
    exact, updates = polar(gradient).flatten(), []
    for make in (Muon, torch.optim.Muon):
        weight = torch.zeros(shape, requires_grad=True)
        weight.grad = gradient.clone()
        make([weight], lr=1.0, momentum=0.95, weight_decay=0.0).step()
        updates.append(torch.nn.functional.cosine_similarity(-weight.detach().double().flatten(), exact, dim=0))
    ours, torchs = updates
    assert ours > 0.99 > torchs > 0.97


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


def test_a_zero_matrix_beside_others_stays_zero():
    batch = torch.stack([torch.zeros(6, 9), conditioned(6, 9, 0.5), 1e-12 * conditioned(6, 9, 0.5)])
    nothing, found, tiny = orthogonalize(batch)
    assert (nothing == 0).all()
    assert (found - tiny).abs().max() < 1e-4


def test_the_polynomials_as_scalars():
    """On a 1 x 1 matrix orthogonalize is the polynomials' composition; all of [0.025, 1] ends near 1."""

    def composed(x):
        for a, b, c in POLYNOMIALS:
            x = a * x + b * x**3 + c * x**5
        return x

    assert (composed(torch.linspace(0.025, 1.0, 500, dtype=torch.double)) - 1).abs().max() < 0.1
    assert float(orthogonalize(torch.tensor([[[3.0]]]))) == pytest.approx(composed(1 / 1.03), abs=1e-4)


# --- Muon ---------------------------------------------------------------------------------------------------


def plain_muon(weight, gradients, lr, momentum, weight_decay, nesterov=True):
    """The published algorithm for one matrix: running mean of gradients, Nesterov, U V^T, decay, scaled step."""
    weight, mean = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        ahead = momentum * mean + (1 - momentum) * gradient if nesterov else mean
        update = orthogonalize(ahead[None])[0] * 0.2 * math.sqrt(max(weight.shape))
        weight = weight - lr * weight_decay * weight - lr * update
    return weight


@pytest.mark.parametrize(("weight_decay", "nesterov"), [(0.0, True), (0.3, True), (0.3, False)])
def test_muon_equals_the_plain_algorithm(weight_decay, nesterov):
    shapes = [(6, 10), (10, 6), (6, 10), (6, 6), (6, 10)]  # three of one shape go as a batch
    weights = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    gradients = [[random(*shape, seed=100 + 10 * i + t) for t in range(4)] for i, shape in enumerate(shapes)]
    expected = [plain_muon(w.detach(), g, 0.05, 0.9, weight_decay, nesterov) for w, g in zip(weights, gradients)]
    optimizer = Muon(weights, lr=0.05, momentum=0.9, weight_decay=weight_decay, nesterov=nesterov)
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


# --- native/muon.c ------------------------------------------------------------------------------------------

KERNEL_SHAPES = [(16, 16), (48, 48), (64, 64), (80, 80), (96, 112), (112, 96), (64, 160), (176, 48), (192, 512)]


@pytest.fixture
def kernel(bf16):
    if muon_native._library() is None:
        pytest.skip("native/muon.c needs a C compiler and a processor with bf16 products (AVX-512)")


def two_steps(shape, monkeypatch, by_kernel: bool, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(how far a weight moved, its momentum) in two steps with different gradients, which have that rank."""
    if not by_kernel:
        monkeypatch.setattr(muon_native, "usable", lambda params: False)
    weights = [random(*shape, seed=seed).requires_grad_() for seed in range(2)]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.1, dtype=torch.bfloat16)
    for step in range(2):
        for seed, weight in enumerate(weights):
            weight.grad = random(*shape, seed=10 * step + seed + 5)
            if rank is not None:
                weight.grad = random(shape[0], rank, seed=10 * step + seed) @ random(rank, shape[1], seed=seed)
        optimizer.step()
    monkeypatch.undo()
    return weights[1].detach() - random(*shape, seed=1), optimizer.state[weights[1]]["momentum"]


@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_the_kernel_takes_the_same_step(shape, kernel, monkeypatch):
    (plain, plain_momentum), (found, momentum) = (two_steps(shape, monkeypatch, by) for by in (False, True))
    assert (momentum - plain_momentum).abs().max() < 1e-5
    assert (found - plain).norm() < 0.04 * plain.norm()


@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (160, 64)])
def test_the_kernel_makes_no_direction_of_a_low_rank_gradient_too_large(shape, kernel, monkeypatch):
    moved, _ = two_steps(shape, monkeypatch, True, rank=3)
    assert moved.isfinite().all()
    assert torch.linalg.svdvals(moved).max() < 3 * 0.1 * 0.2 * max(shape) ** 0.5


def test_the_kernel_leaves_what_it_cannot_take(kernel):
    def usable(*shapes):
        weights = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        return muon_native.usable(weights)

    assert usable((16, 32))
    assert not usable((16, 24))
    assert not usable((16, 32), (8, 16))
    assert not usable()


def test_the_kernel_and_a_gradient_of_zeros(kernel):
    weight = random(32, 64).requires_grad_()
    weight.grad = torch.zeros(32, 64)
    Muon([weight], lr=0.1, weight_decay=0.5, dtype=torch.bfloat16).step()
    assert (weight - 0.95 * random(32, 64)).abs().max() < 1e-6
