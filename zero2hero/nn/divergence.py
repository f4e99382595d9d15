"""How far two models' predictions lie apart, at each token, without ever holding all the logits of either.

As in logprobs.py the products with both heads run over chunks of tokens, and each chunk is thrown away. The gradient of
a divergence is known before it is asked for, so the forward pass makes it from the chunk at hand.

    beta 0        KL(teacher || student): the student covers all that the teacher says (Hinton et al. 2015, 1503.02531)
    beta 1        KL(student || teacher): it says nothing that the teacher would not (Gu et al. 2023, arXiv 2306.08543)
    in between    beta KL(teacher || mixture) + (1 - beta) KL(student || mixture), where the mixture is beta teacher +
                  (1 - beta) student: the generalized Jensen-Shannon divergence (Agarwal et al. 2023, arXiv 2306.13649)

N tokens, D width (each model has its own), V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zero2hero.nn.logprobs import _accumulate, _chunks


def _divergence(q_log: Tensor, p_log: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of student q and teacher p [n, V]: the divergence of each row [n], and its gradient by the student's logits."""
    q = q_log.exp()
    if beta == 0:
        p = p_log.exp()
        return (p * (p_log - q_log)).sum(-1), q - p
    if beta == 1:
        slope = q_log - p_log
        value = (q * slope).sum(-1)
        return value, q * (slope - value[:, None])
    mixture_log = torch.logaddexp(q_log + math.log1p(-beta), p_log + math.log(beta))
    slope = q_log - mixture_log
    to_mixture = (q * slope).sum(-1)
    value = beta * (p_log.exp() * (p_log - mixture_log)).sum(-1) + (1 - beta) * to_mixture
    return value, (1 - beta) * q * (slope - to_mixture[:, None])


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, beta: float,
        temperature: float,
    ) -> Tensor:  # fmt: skip
        total = hidden.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for c in _chunks(len(hidden), len(weight)):
            q_log, p_log = (
                torch.log_softmax((states[c] @ head.t()).float() / temperature, -1)
                for states, head in ((hidden, weight), (teacher_hidden, teacher_weight))
            )
            values, gradient = _divergence(q_log, p_log, beta)
            total += values.sum()
            if grad_hidden is not None:
                gradient = (gradient / temperature).to(weight.dtype)
                grad_hidden[c] = gradient @ weight
                _accumulate(grad_weight, gradient, hidden[c])
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_weight) if g is not None))
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, *grad_weight = ctx.saved_tensors
        factor = float(grad)  # as a tensor of fp16, a large loss scale would be infinite
        of_weight = (grad_weight[0] * factor).to(ctx.weight_dtype) if grad_weight else None
        return grad_hidden * factor, of_weight, None, None, None, None


def divergence_sum(
    hidden: Tensor, weight_VD: Tensor, teacher_hidden: Tensor, teacher_weight_VD: Tensor, *, beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The summed divergence in nats of the predictions at N tokens; a scalar with a gradient for the student alone.

    Args:
        hidden, weight_VD: the student's states [N, D] and head.
        teacher_hidden, teacher_weight_VD: the teacher's, of the same tokens and vocabulary.
        beta: 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence.
        temperature: divides both models' logits.
    """
    return _DivergenceSum.apply(
        hidden, weight_VD, teacher_hidden.detach(), teacher_weight_VD.detach(), beta, temperature
    )
