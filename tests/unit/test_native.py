"""Every native kernel equals the tensor operations beside it, in value and gradient, in fp32 and bf16.

The referee is the plain formula in double under autograd, on the same (rounded) inputs. A second referee is the
fallback: what runs on GPUs and where no compiler is.
"""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zero2hero import machine
from zero2hero.nn import native
from zero2hero.nn.attention import explicit_attention
from zero2hero.nn.feedforward import _SiluProduct, relu2
from zero2hero.nn.linear import joint_linear, side_by_side, weight_gradient
from zero2hero.nn.logprobs import nll_sum, token_logprobs
from zero2hero.nn.masks import Mask, causal_mask
from zero2hero.nn.norms import RMSNorm
from zero2hero.nn.positions import rotate, rotate_queries_and_keys

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # of the largest number
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request, bf16, all_threads):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(all_threads)


@pytest.fixture(params=["native", "fallback"])
def path(request, monkeypatch):
    """Both must equal the formula; the native one only where it can be had."""
    monkeypatch.setattr(native, "_SMALL", 0)  # so that two threads also share small tensors
    if request.param == "fallback":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip("no native kernels here")
    return request.param


def random(*shape: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(dtype)


def agree(function, formula, *inputs: Tensor, roundings: float = 1.0) -> None:
    """function(*inputs) and its gradients, against formula(*inputs) in double."""
    tolerance = roundings * TOLERANCE[inputs[0].dtype]
    results = []
    for f, values in ((function, inputs), (formula, tuple(x.double() for x in inputs))):
        leaves = [x.detach().requires_grad_() for x in values]  # keeps the strides
        y = f(*leaves)
        outputs = y if isinstance(y, tuple) else (y,)
        weights = [random(*o.shape, dtype=inputs[0].dtype, seed=9).to(o.dtype) for o in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, weights)))
    for got, want in zip(*results):
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() <= tolerance * max(1.0, float(want.detach().abs().max()))


def strided(x: Tensor) -> list[Tensor]:
    """The same numbers, contiguous, as columns of a wider tensor, and transposed in memory."""
    wide = torch.cat([x, x + 1, x], -1)[..., : x.shape[-1]]
    return [x, wide, x.transpose(0, -1).contiguous().transpose(0, -1)]


# --- the kernels --------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 33), (1, 1), (300, 130), (2, 3, 4, 6)])
def test_rms_norm(path, dtype, shape):
    norm = RMSNorm(shape[-1], 1e-5)

    def formula(x, w):
        return w * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def ours(x, w):
        return torch.func.functional_call(norm, {"weight": w}, (x,)) if False else type(norm).forward(_with(norm, w), x)

    for x in strided(random(*shape, dtype=dtype)):
        agree(ours, formula, x, random(shape[-1], dtype=dtype, seed=1), roundings=4)


def _with(norm: RMSNorm, weight: Tensor):
    class Stand:
        eps = norm.eps

    Stand.weight = weight
    return Stand


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), c, s = x.chunk(2, -1), cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


@DTYPES
@pytest.mark.parametrize(("B", "T", "H", "K"), [(2, 5, 3, 6), (1, 1, 1, 2), (3, 17, 2, 64), (2, 300, 1, 10)])
def test_rotate(path, dtype, B, T, H, K):
    for batch in (1, B):
        angle = random(batch, T, 1, K // 2, dtype=torch.float32, seed=3)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for x in strided(random(B, T, H, K, dtype=dtype)):
            agree(lambda x, c=cos, s=sin: rotate(x, c, s), lambda x, c=cos, s=sin: turned(x, c, s), x, roundings=2)
        q, k, v = random(B, T, (H + 4) * K, dtype=dtype).view(B, T, H + 4, K).split([H, 2, 2], 2)
        agree(
            lambda q, k, v, c=cos, s=sin: rotate_queries_and_keys(q, k, v, c, s),
            lambda q, k, v, c=cos, s=sin: (turned(q, c, s), turned(k, c, s), v.clone()),
            q, k, v, roundings=2,
        )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 65), (1, 1), (3,), (40, 500)])
def test_silu_product(path, dtype, shape):
    def formula(gate, up):
        return gate * torch.sigmoid(gate) * up

    gate, up = random(*shape, dtype=dtype, size=4.0), random(*shape, dtype=dtype, seed=1)
    for g, u in zip(strided(gate), strided(up)):
        agree(_SiluProduct.apply, formula, g, u, roundings=4)
    agree(_SiluProduct.apply, formula, *torch.cat([gate, up], -1).chunk(2, -1), roundings=4)
    far = torch.tensor([[-1e6, -1000.0, -89.0, -88.0, 0.0, 88.0, 1000.0, 3e38]]).to(dtype)
    torch.testing.assert_close(_SiluProduct.apply(far, torch.ones_like(far)), F.silu(far), atol=1e-30, rtol=1e-6)


@DTYPES
@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 65), (1, 1), (3,), (40, 500)])
def test_relu2(path, dtype, shape):
    for x in strided(random(*shape, dtype=dtype)):
        agree(relu2, lambda x: x.clamp(min=0) ** 2, x, roundings=2)


@DTYPES
@pytest.mark.parametrize(
    ("B", "H", "T", "S", "K"), [(2, 3, 7, 7, 5), (1, 1, 1, 1, 2), (2, 2, 70, 70, 8), (3, 2, 4, 9, 6)]
)
def test_attention(path, dtype, B, H, T, S, K):
    def formula(q, k, v):
        scores = (q @ k.transpose(-1, -2) * 0.7).masked_fill(~allowed[:, None], float("-inf"))
        return scores.softmax(-1) @ v

    some = torch.rand(B, T, S, generator=torch.Generator().manual_seed(0)) < 0.5
    some[..., 0] = True  # every query sees a key
    masks = [Mask(None), Mask(some), Mask(some[:1])] + [causal_mask(T, torch.device("cpu"))] * (T == S)
    for mask in masks:
        allowed = torch.ones(1, T, S, dtype=torch.bool) if mask.allowed is None else mask.allowed
        q, k, v = (random(B, n, H, K, dtype=dtype, seed=i).transpose(1, 2) for i, n in enumerate((T, S, S)))
        agree(lambda q, k, v, m=mask: explicit_attention(q, k, v, m, 0.7), formula, q, k, v, roundings=6)


@DTYPES
@pytest.mark.parametrize(("n", "D", "V"), [(9, 5, 7), (1, 3, 2), (70, 16, 333)])
def test_log_likelihood(path, dtype, n, D, V):
    targets = torch.randint(V, (n,), generator=torch.Generator().manual_seed(0))
    hidden, weight = random(n, D, dtype=dtype), random(V, D, dtype=dtype, seed=1)
    for temperature in (1.0, 0.5):

        def formula(hidden, weight, t=temperature):
            logits = hidden @ weight.t()
            rounded = logits + (logits.detach().to(dtype).double() - logits.detach())  # the logits are kept in dtype
            return torch.log_softmax(rounded / t, -1).gather(-1, targets[:, None])[:, 0]

        agree(
            lambda h, w, t=temperature: token_logprobs(h, w, targets, temperature=t),
            formula,
            hidden,
            weight,
            roundings=4,
        )
    agree(lambda h, w: nll_sum(h, w, targets)[0], lambda h, w: -formula(h, w, 1.0).sum(), hidden, weight, roundings=4)


def test_what_is_not_a_number_stays_so(path):
    """A diverged run must show it, not hide it."""
    for dtype in TOLERANCE:
        x = random(3, 40, dtype=dtype)
        x[1, 7] = float("nan")
        for y in (RMSNorm(40).to(dtype)(x), _SiluProduct.apply(x, x), nll_of_rows(x)):
            assert y[1].isnan().any()
            assert not y[[0, 2]].isnan().any()


def nll_of_rows(logits: Tensor) -> Tensor:
    return token_logprobs(
        logits, torch.eye(logits.shape[1], dtype=logits.dtype).nan_to_num(), torch.zeros(len(logits), dtype=torch.long)
    )


# --- the linear maps ----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("biases", [False, True])
def test_joint_linear_gradients(path, dtype, biases):
    parts = [torch.nn.Linear(6, width, bias=biases).to(dtype) for width in (4, 1, 7)]
    x = random(3, 5, 6, dtype=dtype).requires_grad_()
    leaves = [x, *(p for part in parts for p in part.parameters())]
    for frozen in ([], [0], [1, 3]):
        used = [leaf.requires_grad_(i not in frozen) for i, leaf in enumerate(leaves) if i not in frozen]
        for i in frozen:
            leaves[i].requires_grad_(False)
        results = []
        for ys in (joint_linear(x, *parts), [part(x) for part in parts]):
            weights = [random(*y.shape, dtype=dtype, seed=2) for y in ys]
            results.append([*ys, *torch.autograd.grad(ys, used, weights)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=2 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize(("out", "inner"), [(96, 32), (32, 96), (40, 40), (7, 3)])
def test_weight_gradient(out, inner):
    for rows in (5, 1024):
        grad, x = random(rows, out, dtype=torch.bfloat16), random(rows, inner, dtype=torch.bfloat16)
        got, want = weight_gradient(grad, x), grad.double().t() @ x.double()
        assert got.is_contiguous()
        assert (got.double() - want).norm() < 0.01 * want.norm()


def testside_by_side_copies_only_what_is_apart():
    whole = torch.arange(60.0).view(2, 3, 10)
    parts = whole.split([2, 5, 3], -1)
    assert side_by_side(parts).data_ptr() == whole.data_ptr()
    one = whole[1:, 2:].split([4, 6], -1)
    assert torch.equal(side_by_side(one), whole[1:, 2:])
    for some in (parts[:2], parts[::-1], parts[1:], (parts[0], parts[0]), tuple(p.clone() for p in parts)):
        assert torch.equal(side_by_side(some), torch.cat(some, -1))
    turned = torch.arange(60.0).view(3, 2, 10).transpose(0, 1).split([4, 6], -1)
    assert torch.equal(side_by_side(turned), torch.cat(turned, -1))


# --- sums, threads and where they run -----------------------------------------------------------------------


@DTYPES
def test_accumulate(path, dtype):
    part = random(30, 40, dtype=dtype)
    for total, added in [(torch.ones(30, 40), part), (torch.ones(40, 30).t(), part), (torch.ones(40, 30), part.t())]:
        want = total + added.float()
        native.accumulate_(total, added)
        assert torch.equal(total, want)


@DTYPES
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_and_update(path, dtype, nesterov):
    grad, momentum, weight = (random(30, 41, dtype=torch.float32, seed=i) for i in range(3))
    ahead = torch.empty(30, 41, dtype=dtype)
    mean = 0.9 * momentum.double() + 0.1 * grad.double()
    want = 0.9 * mean + 0.1 * grad.double() if nesterov else mean
    native.momentum_(momentum, grad, ahead, 0.9, nesterov)
    assert (momentum - mean).abs().max() < 1e-6
    assert (ahead.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    for update in (ahead, ahead.t().contiguous().t()):
        want = 0.5 * weight.double() - 0.3 * update.double()
        native.update_(weight, update, 0.5, 0.3)
        assert (weight - want).abs().max() < 1e-6


def test_the_same_twice(path):
    x, w = random(999, 65, dtype=torch.float32), random(65, dtype=torch.float32)
    _, scale = torch.ones(999, 65), x.square().mean(-1, keepdim=True).rsqrt()
    if path == "native":
        first, second = (native.rms_norm_backward(x, w, scale, x.flip(0)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_plain_cpu_tensors_of_one_dtype():
    x = torch.ones(3)
    assert not native.usable(x.double())
    assert not native.usable(x.half())
    assert not native.usable(x, x.bfloat16())
    assert not native.usable(x.to("meta"))


@pytest.mark.parametrize("error", [FileNotFoundError("cc"), subprocess.CalledProcessError(1, "cc", stderr=b"bad flag")])
def test_without_a_compiler(monkeypatch, error):
    """Slower, with one warning when the compiler is there and fails; never broken."""

    def fails(name, *flags):
        raise error

    monkeypatch.setattr(native, "native_library", fails)
    native.kernels.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert not native.usable(torch.ones(2))
            assert not native.usable(torch.ones(2))
            assert RMSNorm(4)(torch.ones(2, 4)).shape == (2, 4)
        fails_loudly = sys.platform == "linux" and not isinstance(error, FileNotFoundError)
        assert [str(w.message).endswith("bad flag") for w in seen] == [True] * fails_loudly
    finally:
        native.kernels.cache_clear()


def test_turned_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("ZERO2HERO_NATIVE", "0")
    native.kernels.cache_clear()
    try:
        assert not native.usable(torch.ones(2))
    finally:
        native.kernels.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_in_the_process():
    """A second one would have threads of its own, fighting for the same cores."""
    if native.kernels() is None:
        pytest.skip("no native kernels here")
    found = "{line.split(maxsplit=5)[-1].strip() for line in open('/proc/self/maps') if 'libgomp' in line}"
    code = f"from zero2hero.nn import native; native.kernels(); print(len({found}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("0", "1"), done.stdout + done.stderr


def test_another_processor_compiles_anew(monkeypatch, tmp_path):
    """A home folder shared by machines must not hand one the other's instructions."""
    if native.kernels() is None:
        pytest.skip("no native kernels here")
    monkeypatch.setenv("ZERO2HERO_CACHE", str(tmp_path))
    commands = []

    def run(command, **_):
        commands.append(command)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(machine.subprocess, "run", run)
    paths = []
    for features in ({"flags: a"}, {"flags: b"}):
        monkeypatch.setattr(machine, "_processor_features", lambda f=features: f)
        with pytest.raises(subprocess.CalledProcessError):
            machine.native_library("fused", "-O3")
        paths.append(commands[-1][-1])
    assert paths[0] != paths[1]
