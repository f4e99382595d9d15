"""Alignment on distributions so small that every mean is known exactly."""

from __future__ import annotations

import pytest
import torch

from zero2hero.align.kl import KL_ESTIMATORS


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


def two_distributions(distance: float = 1.0):
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64)
    ref = logits + distance * torch.randn(7, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_kl_estimators_are_unbiased(name):
    """The mean over every outcome, each as often as the policy says it, is the divergence itself."""
    logits, ref = two_distributions()
    logprobs = logits.detach().log_softmax(0)
    mean = (logprobs.exp() * KL_ESTIMATORS[name](logprobs, ref)).sum()
    assert float(mean - exact_kl(logprobs.exp(), ref.exp())) == pytest.approx(0.0, abs=1e-14)


def test_k2_is_biased_by_the_third_power_of_the_distance_and_k3_varies_least():
    biases = []
    for distance in (0.2, 0.1, 0.05):
        logits, ref = two_distributions(distance)
        logprobs = logits.detach().log_softmax(0)
        p, exact = logprobs.exp(), exact_kl(logprobs.exp(), ref.exp())
        biases.append(float((p * KL_ESTIMATORS["k2"](logprobs, ref)).sum() - exact))
        second_moment = {name: float((p * f(logprobs, ref).square()).sum()) for name, f in KL_ESTIMATORS.items()}
        assert second_moment["k3"] < 0.1 * second_moment["k1"]
        assert (KL_ESTIMATORS["k3"](logprobs, ref) >= 0).all()
        assert (KL_ESTIMATORS["k1"](logprobs, ref) < 0).any()
    assert biases[0] / biases[1] == pytest.approx(8, rel=0.2)
    assert biases[1] / biases[2] == pytest.approx(8, rel=0.2)


def test_gradients_of_the_estimators_in_a_loss():
    """k1's is zero on average, k2's that of KL(policy || reference), k3's that of KL(reference || policy)."""
    logits, ref = two_distributions()

    def mean_gradient(estimator):  # samples come from the policy and carry no gradient themselves
        logprobs = logits.log_softmax(0)
        return torch.autograd.grad((logprobs.exp().detach() * estimator(logprobs, ref)).sum(), logits)[0]

    p, q = logits.softmax(0), ref.exp()
    reverse, forward = (
        torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (exact_kl(p, q), exact_kl(q, p))
    )
    torch.testing.assert_close(mean_gradient(KL_ESTIMATORS["k1"]), torch.zeros_like(logits), rtol=0, atol=1e-14)
    torch.testing.assert_close(mean_gradient(KL_ESTIMATORS["k2"]), reverse, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mean_gradient(KL_ESTIMATORS["k3"]), forward, rtol=1e-12, atol=1e-14)
