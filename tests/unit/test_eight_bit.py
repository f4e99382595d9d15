"""Moments in 8 bits: the same bytes as bitsandbytes, and AdamW up to their rounding."""

from __future__ import annotations

import pytest
import torch

from zero2hero.nn.dynamic_code import BLOCK, decode, dynamic_code, encode
from zero2hero.train.eight_bit import AdamW8bit

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(count: int) -> torch.Tensor:
    """Numbers over eight powers of ten, as moments are."""
    return random(count) * 10 ** (8 * torch.rand(count, generator=torch.Generator().manual_seed(1)) - 8)


@pytest.mark.parametrize("signed", [True, False])
def test_a_byte_has_256_values(signed):
    code = dynamic_code(signed)
    assert code.shape == (256,)
    assert (code.diff() > 0).all()
    assert (float(code[-1]), float(code[127 if signed else 0])) == (1.0, 0.0)
    assert float(code[0]) == (pytest.approx(-0.993, abs=1e-3) if signed else 0.0)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_code_of_each_block(count, signed):
    values = spread(count) if signed else spread(count).abs()
    codes, scales = encode(values, signed)
    assert (codes.dtype, codes.shape, len(scales)) == (torch.uint8, values.shape, -(-count // BLOCK))
    for i, block in enumerate(values.split(BLOCK)):
        scale = block.abs().max()
        assert scales[i] == scale
        distances = (block.double()[:, None] / scale - dynamic_code(signed).double()).abs()
        chosen = distances.gather(1, codes.split(BLOCK)[i].long()[:, None])[:, 0]
        assert (chosen <= distances.min(1).values + 1e-7).all()
    assert (decode(codes, scales, signed) - values).abs().max() <= 0.01 * values.abs().max()


def test_nothing_stays_nothing():
    codes, scales = encode(torch.zeros(3, 200), signed=True)
    assert (decode(codes, scales, signed=True) == 0).all()


def exact_quantize(values: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' definition for all devices. Its library for CPUs looks small values up in a coarse table."""
    operator = torch.ops.bitsandbytes.quantize_blockwise.default
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, values, code, blocksize)


@pytest.mark.parametrize("signed", [True, False])
def test_the_bytes_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    code = functional.create_dynamic_map(signed=signed)
    assert torch.equal(dynamic_code(signed), code)
    values = spread(100_000) if signed else spread(100_000).abs()
    theirs, absmax = exact_quantize(values, code, BLOCK)
    codes, scales = encode(values, signed)
    assert torch.equal(codes, theirs)
    assert torch.equal(scales, absmax)
    decoded = functional.dequantize_blockwise(theirs, absmax=absmax, code=code, blocksize=BLOCK)
    assert torch.equal(decode(codes, scales, signed), decoded)


def test_steps_are_those_of_bitsandbytes(monkeypatch):
    """Weights, bytes and scales after ten steps."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantize(values, code, absmax, out, blocksize):
        for target, value in zip((out, absmax), exact_quantize(values, code, blocksize)):
            target.copy_(value)

    monkeypatch.setattr("bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct", quantize)
    ours, theirs = (random(70, 90).requires_grad_() for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, referee = AdamW8bit([ours], **settings), bitsandbytes.optim.AdamW8bit([theirs], **settings)
    for step in range(10):
        for weight, each in ((ours, optimizer), (theirs, referee)):
            weight.grad = random(70, 90, seed=step) * torch.logspace(-4, 0, 90)
            each.step()
    assert torch.equal(ours, theirs)
    state, expected = optimizer.state[ours], referee.state[theirs]
    for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        assert torch.equal(state[name], expected[f"state{number}"])
        assert torch.equal(state[f"{name}_scale"], expected[f"absmax{number}"])


@pytest.mark.parametrize(("shape", "tolerance"), [((8, 8), 1e-6), ((80, 80), 0.02)])
def test_steps_are_nearly_adamws(shape, tolerance):
    """A small tensor's moments are exact; a large one's rounding changes the path by little."""
    exact, rounded = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    pair = (exact, torch.optim.AdamW([exact], lr=0.01)), (rounded, AdamW8bit([rounded], lr=0.01))
    for step in range(20):
        for weight, optimizer in pair:
            weight.grad = random(*shape, seed=step) + 1
            optimizer.step()
    assert (exact - rounded).abs().mean() <= tolerance * exact.abs().mean()


def test_a_weight_takes_two_bytes_and_two_scales_per_block():
    weight = torch.zeros(128, 128, requires_grad=True)
    optimizer = AdamW8bit([weight])
    weight.grad = random(128, 128)
    optimizer.step()
    tensors = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 128 * 128 * (2 + 2 * 4 / BLOCK)


def test_bytes_stay_bytes_when_loaded():
    weight = random(100, 100).requires_grad_()
    optimizer = AdamW8bit([weight], lr=0.01)
    weight.grad = random(100, 100, seed=1)
    optimizer.step()
    copy = weight.detach().clone().requires_grad_()
    other = AdamW8bit([copy], lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[copy]["exp_avg"].dtype == torch.uint8
    for w, each in ((weight, optimizer), (copy, other)):
        w.grad = random(100, 100, seed=2)
        each.step()
    assert torch.equal(weight, copy)
