"""token_logprobs and nll_sum equal the cross entropy of all logits, in value and gradient, never holding them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zero2hero.errors import UserError
from zero2hero.nn import logprobs
from zero2hero.nn.logprobs import IGNORE, logprobs_and_entropies, nll_sum, token_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(
    tokens: tuple[int, ...] = (3, 11), width: int = 8, vocabulary: int = 19, ignored: float = 0.3, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, tokens, generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


def reference(hidden, weight, targets, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each target by torch's own cross entropy, in double; 0 where there is none."""
    logits = hidden.double() @ weight.double().t() / temperature
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return -losses.view(targets.shape)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


@pytest.fixture(params=[1 << 20, 64, 7], ids=["one chunk", "chunks of 64", "chunks of 7, the last ragged"])
def chunk(request, monkeypatch):
    """The real chunks hold thousands of tokens; smaller ones exercise the sums over chunks."""

    def chunks(count, vocab_size):
        return (slice(start, min(start + request.param, count)) for start in range(0, count, request.param))

    monkeypatch.setattr(logprobs, "_chunks", chunks)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_token_logprobs(chunk, temperature, ignored):
    hidden, weight, targets = problem((5, 30), ignored=ignored)
    got = token_logprobs(hidden, weight, targets, temperature=temperature)
    want = reference(hidden, weight, targets, temperature)
    assert got.dtype == torch.float32
    assert (got[targets == IGNORE] == 0).all()
    close(got, want)
    each = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))  # DPO and PPO weigh tokens unequally
    gradients = [torch.autograd.grad((values * each).sum(), (hidden, weight)) for values in (got, want)]
    for a, b in zip(*gradients):
        close(a, b)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_head_with_a_soft_cap(chunk, temperature, native, monkeypatch):
    """Value and gradient are those of all logits, capped, made at once; entropies too."""
    if native == "0":
        monkeypatch.setattr(logprobs.native, "usable", lambda *tensors: False)
    hidden, weight, targets = problem((5, 30), ignored=0.3)
    head = logprobs.SoftCappedHead(weight, 1.5)
    capped = 1.5 * torch.tanh(hidden @ weight.t() / 1.5) / temperature
    everything = torch.log_softmax(capped, -1)
    keep = targets != IGNORE
    want = everything.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * keep
    got = token_logprobs(hidden, head, targets, temperature=temperature)
    close(got, want)
    each = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad((v * each).sum(), (hidden, weight), retain_graph=True) for v in (got, want))):
        close(a, b)
    _, entropies = logprobs.logprobs_and_entropies(hidden[keep], head, targets[keep], temperature=temperature)
    close(entropies, -(everything.exp() * everything).sum(-1)[keep])
    if temperature == 1.0:
        total, _ = nll_sum(hidden, head, targets)
        close(total, -want.sum())
        for a, b in zip(*(torch.autograd.grad(v, (hidden, weight)) for v in (total, -want.sum()))):
            close(a, b)
        with torch.no_grad():
            close(nll_sum(hidden, head, targets)[0], -want.sum())


def test_a_soft_cap_and_label_smoothing_do_not_go_together():
    hidden, weight, targets = problem((2, 3))
    with pytest.raises(UserError, match="label smoothing"):
        nll_sum(hidden, logprobs.SoftCappedHead(weight, 2.0), targets, label_smoothing=0.1)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_nll_sum(chunk, ignored, factor):
    hidden, weight, targets = problem((5, 30), ignored=ignored)
    got, count = nll_sum(hidden, weight, targets)
    want = -reference(hidden, weight, targets).sum()
    assert float(count) == int((targets != IGNORE).sum())
    close(got, want)
    gradients = [torch.autograd.grad(value * factor, (hidden, weight)) for value in (got, want)]
    for a, b in zip(*gradients):
        close(a, b)


@pytest.mark.parametrize("tokens", [(1,), (512,), (513,), (7, 9, 2)])
def test_any_shape_and_number_of_tokens(tokens):
    hidden, weight, targets = problem(tokens, vocabulary=1 << 13, width=4)  # real chunks: 512 tokens each
    close(token_logprobs(hidden, weight, targets), reference(hidden, weight, targets))
    got, want = nll_sum(hidden, weight, targets)[0], -reference(hidden, weight, targets).sum()
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want))):
        close(a, b, 1e-4)  # sums of 65,536 products


def test_only_what_needs_a_gradient_gets_one():
    """A frozen head (LoRA) and frozen hidden states (a probe)."""
    hidden, weight, targets = problem()
    want = torch.autograd.grad(-reference(hidden, weight, targets).sum(), (hidden, weight))
    for function in (lambda h, w: nll_sum(h, w, targets)[0], lambda h, w: -token_logprobs(h, w, targets).sum()):
        close(torch.autograd.grad(function(hidden, weight.detach()), hidden)[0], want[0])
        close(torch.autograd.grad(function(hidden.detach(), weight), weight)[0], want[1])
        with torch.no_grad():
            assert not function(hidden, weight).requires_grad


def test_both_are_the_same_number():
    hidden, weight, targets = problem()
    with torch.no_grad():
        each = token_logprobs(hidden, weight, targets)
    assert float(nll_sum(hidden, weight, targets)[0].detach()) == pytest.approx(-float(each.sum()), rel=1e-6)


def test_gradients_against_finite_differences():
    """The functions count in fp32, so the steps are wide and the tolerance is theirs."""
    hidden, weight, targets = problem((6,), width=3, vocabulary=5)
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    for function in (
        lambda h, w: nll_sum(h, w, targets)[0].double(),
        lambda h, w: token_logprobs(h, w, targets, temperature=0.7).double(),
    ):
        assert torch.autograd.gradcheck(function, inputs, eps=3e-3, atol=2e-3, rtol=1e-2)


def test_a_gradient_may_be_asked_for_twice():
    hidden, weight, targets = problem()
    loss, _ = nll_sum(hidden, weight, targets)
    first = [g.clone() for g in torch.autograd.grad(loss, (hidden, weight), retain_graph=True)]
    loss.backward(retain_graph=True)
    loss.backward()
    close(hidden.grad, 2 * first[0])
    close(weight.grad, 2 * first[1])


def test_a_tied_head_gets_both_gradients():
    """The embedding's gradient and the head's add up, whichever comes first."""
    weight = torch.randn(11, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([[1, 2, 3, 3]])
    targets = torch.tensor([[2, 3, 3, IGNORE]])
    got = torch.autograd.grad(nll_sum(F.embedding(ids, weight).tanh(), weight, targets)[0], weight)[0]
    hidden = F.embedding(ids, weight).tanh()
    close(got, torch.autograd.grad(-reference(hidden, weight, targets).sum(), weight)[0])


def test_large_logits_do_not_overflow():
    hidden, weight, targets = problem()
    hidden, weight = hidden.detach() * 1e3, weight.detach() * 1e3
    hidden.requires_grad_()
    loss, _ = nll_sum(hidden, weight, targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
    assert float(loss.detach()) == pytest.approx(-float(reference(hidden, weight, targets).detach().sum()), rel=1e-5)


@pytest.mark.usefixtures("bf16")
def test_bf16_is_near_and_sums_in_fp32(chunk):
    hidden, weight, targets = problem((40, 50), width=32, vocabulary=101)
    with torch.no_grad():  # the hidden states of a model are of size 1 and logits of a few
        weight *= 0.2
    exact = reference(hidden.bfloat16(), weight.bfloat16(), targets)
    halves = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    loss, _ = nll_sum(halves[0], halves[1], targets)
    each = token_logprobs(halves[0], halves[1], targets)
    assert loss.dtype == each.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(-float(exact.detach().sum()), rel=1e-3)
    assert (each - exact).abs().max() < 0.05
    want = torch.autograd.grad(-exact.sum(), (hidden, weight))
    for got in (torch.autograd.grad(loss, halves), torch.autograd.grad(-each.sum(), halves)):
        for a, b in zip(got, want):
            assert a.dtype == torch.bfloat16
            assert (a.float() - b).norm() < 0.02 * b.norm()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("train", [True, False])
def test_all_logits_are_never_made(train):
    tokens, vocabulary, width = 2000, 30_000, 8
    hidden, weight, targets = problem((tokens,), vocabulary=vocabulary, width=width)
    for function in (
        lambda: nll_sum(hidden, weight, targets)[0],
        lambda: token_logprobs(hidden, weight, targets).sum(),
    ):
        with Largest() as seen, torch.set_grad_enabled(train):
            loss = function()
            if train:
                loss.backward()
        assert seen.numel >= vocabulary * width  # it does watch
        assert seen.numel <= 512 * vocabulary  # whatever the number of tokens


def test_positions_without_a_target_are_not_computed(monkeypatch):
    """A conversation whose answer is a tenth of it costs a tenth."""
    rows = []
    original = logprobs._scores

    def counted(hidden, *rest, **options):
        rows.append(len(hidden))
        return original(hidden, *rest, **options)

    monkeypatch.setattr(logprobs, "_scores", counted)
    hidden, weight, _ = problem((100,))
    targets = torch.full((100,), IGNORE)
    targets[90:] = 3
    nll_sum(hidden, weight, targets)
    token_logprobs(hidden, weight, targets)
    assert sum(rows) == 20


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_label_smoothing_is_that_of_torch(chunk, smoothing, ignored):
    hidden, weight, targets = problem((5, 30), ignored=ignored)
    got, count = nll_sum(hidden, weight, targets, smoothing)
    logits = hidden.double() @ weight.double().t()
    want = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    assert float(count) == int((targets != IGNORE).sum())
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(2.5 * value, (hidden, weight)) for value in (got, want))):
        close(a, b)
    with torch.no_grad():
        close(nll_sum(hidden, weight, targets, smoothing)[0], want)


def test_label_smoothing_in_bf16(bf16):
    hidden, weight, targets = (t.detach() if t.is_floating_point() else t for t in problem((5, 30)))
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    got = nll_sum(hidden, weight, targets, 0.2)[0]
    logits = hidden.double() @ weight.double().t()
    want = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=0.2
    )
    assert got.dtype == torch.float32
    close(got, want, 0.01)
    for a, b in zip(*(torch.autograd.grad(value, (hidden, weight)) for value in (got, want))):
        close(a, b, 0.02)


def test_label_smoothing_with_a_frozen_head():
    hidden, weight, targets = problem()
    frozen = torch.autograd.grad(nll_sum(hidden, weight.detach(), targets, 0.3)[0], hidden)[0]
    close(frozen, torch.autograd.grad(nll_sum(hidden, weight, targets, 0.3)[0], hidden)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_entropies_come_with_the_log_probabilities(chunk, temperature):
    hidden, weight, targets = problem((60,), ignored=0.0)
    got, entropies = logprobs_and_entropies(hidden, weight, targets, temperature=temperature)
    close(got, reference(hidden, weight, targets, temperature))
    distributions = torch.distributions.Categorical(logits=hidden @ weight.t() / temperature)
    close(entropies, distributions.entropy())
    assert not entropies.requires_grad
    each = torch.randn(60, generator=torch.Generator().manual_seed(1))
    want = token_logprobs(hidden, weight, targets, temperature=temperature)
    gradients = [torch.autograd.grad((values * each).sum(), (hidden, weight)) for values in (got, want)]
    for a, b in zip(*gradients):
        close(a, b)
