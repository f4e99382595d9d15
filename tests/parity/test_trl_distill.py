"""Distillation's distances are those of TRL's GKD trainer, value and gradient, and never hold all the logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zero2hero.nn.divergence import divergence_sum

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(N: int = 40, V: int = 97, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, 16), (V, 16), (N, 24), (V, 24)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_value_and_gradient_are_trls(beta, temperature):
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    hidden, weight, teacher_hidden, teacher_weight = tensors()
    keep = torch.arange(40) % 3 != 0
    grads = []
    for ours in (True, False):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            found = divergence_sum(states[keep], head, teacher_hidden[keep], teacher_weight, beta=beta,
                                   temperature=temperature) / keep.sum()  # fmt: skip
        else:
            found = trainer.generalized_jsd_loss(
                (states @ head.t())[None], (teacher_hidden @ teacher_weight.t())[None],
                torch.where(keep, 0, -100)[None], beta=beta, temperature=temperature,
            )  # fmt: skip
        (3 * found).backward()
        grads.append((found.detach(), states.grad, head.grad))
    for got, want in zip(*grads, strict=True):
        assert want.abs().max() > 1e-4
        assert (got - want).abs().max() < 1e-5


def test_a_model_is_no_distance_from_itself():
    hidden, weight, *_ = tensors()
    for beta in (0.0, 0.3, 1.0):
        states = hidden.clone().requires_grad_()
        found = divergence_sum(states, weight, hidden, weight, beta=beta)
        found.backward()
        assert abs(float(found.detach())) < 1e-4
        assert states.grad.abs().max() < 1e-5


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has which is made within."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return result


def test_no_tensor_of_all_logits_at_a_vocabulary_of_128k():
    N, V = 2048, 128_000
    hidden, head, teacher = (
        torch.randn(N, 2, requires_grad=True),
        torch.randn(V, 2, requires_grad=True),
        torch.randn(N, 2),
    )
    with Largest() as largest:
        divergence_sum(hidden, head, teacher, torch.randn(V, 2), beta=0.5).backward()
    assert largest.numbers <= 512 * V < N * V / 3
