"""The log-probability of each token, without ever holding all the logits.

For N tokens and a vocabulary of V the logits are N x V numbers: at a 128k vocabulary a batch of 4,096 tokens is 2 GB in
fp32, several times over with their gradient. Every training loss and every evaluation of the road needs only one
number of each row: the target's logit minus the logarithm of the row's sum. So the product with the head runs over
chunks of tokens and each chunk is thrown away (Wijmans et al. 2024, "Cut your losses", arXiv 2411.09009).
Positions without a target are dropped before the product. Logarithms and sums are in fp32 whatever the weights are.

Two ways back:
  token_logprobs  any gradient per token (DPO, PPO, GRPO); its backward pass makes each chunk again
                  (`logprobs_and_entropies`: the same, and how undecided the model was).
  nll_sum         the summed negative log-likelihood (pretraining, SFT), whose gradient is known before it is asked for:
                  the forward pass makes it from the chunk at hand, three products in all instead of four.

N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.nn import native

IGNORE = -100  # the target of a position that has none


class SoftCappedHead(NamedTuple):
    """A head whose logits never leave (-cap, cap): `softcap` of the product with its matrix [V, D] (Gemma 2)."""

    weight_VD: Tensor
    cap: float


Head = Tensor | SoftCappedHead


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(x / cap)`: nearly x where it is small, never beyond the cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def _chunks(count: int, vocab_size: int) -> Iterator[slice]:
    """Slices of tokens whose fp32 logits take about 8 MB, what stays in a core's cache, or of 512 tokens where the
    vocabulary is large: every slice reads the head twice and adds to its whole gradient, which should pay.
    """
    size = max(512, (2 << 20) // vocab_size)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _scores(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, grad: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One chunk's log-probabilities of the targets [n] in fp32; with `grad` [n] also the product's gradient [n, V]."""
    weight, cap = _parts(head)
    product = hidden @ weight.t()
    if cap is None:
        return _scores_of_logits(product, targets, temperature, grad)
    logits = softcap(product.float(), cap)
    if grad is None:
        return _scores_of_logits(logits, targets, temperature, None)
    slope = 1 - (logits / cap) ** 2
    logprobs, gradient = _scores_of_logits(logits, targets, temperature, grad)
    assert gradient is not None
    return logprobs, gradient.mul_(slope).to(weight.dtype)


def _scores_of_logits(
    logits: Tensor, targets: Tensor, temperature: float, grad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The log-probabilities [n] and, with `grad` [n], the gradient of the logits, whose memory may be taken for it.

    Of a log-probability it is (onehot(target) - softmax(logits / temperature)) / temperature, times the token's `grad`.
    """
    if native.usable(logits):
        weights = None if grad is None else grad.float() / -temperature
        logprobs = native.log_likelihood_(
            logits, targets, gradient=grad is not None, weights=weights, scale=1.0 / temperature
        )
        return logprobs, None if grad is None else logits
    scaled = logits if temperature == 1.0 else logits.float().div(temperature)
    everything = torch.log_softmax(scaled, -1, dtype=torch.float32)
    logprobs = everything.gather(-1, targets[:, None])[:, 0]
    if grad is None:
        return logprobs, None
    gradient = everything.exp_()
    gradient.scatter_add_(-1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    return logprobs, gradient.mul_(-grad[:, None] / temperature).to(logits.dtype)


def _entropies(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One chunk's log-probabilities of the targets [n], and the entropies [n] of their distributions, in fp32.

    With z the logits and Z the logarithm of their exponentials' sum, log p = z - Z and H = -sum of p log p.
    """
    weight, cap = _parts(head)
    logits = hidden @ weight.t()
    if cap is not None:
        logits = softcap(logits.float(), cap)
    if native.usable(logits):
        logprobs = native.log_likelihood_(logits, targets, gradient=False, scale=1.0 / temperature)
        everything = logits.float() if temperature == 1.0 else logits.float().div_(temperature)
        everything -= everything.gather(-1, targets[:, None]) - logprobs[:, None]
    else:
        everything = torch.log_softmax(logits.float() / temperature, -1)
        logprobs = everything.gather(-1, targets[:, None])[:, 0]
    return logprobs, -torch.bmm(everything.exp()[:, None], everything[:, :, None])[:, 0, 0]


class _TokenLogprobs(torch.autograd.Function):
    """The log-probabilities; with `entropy` also the entropies, which have no gradient."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, cap: float | None, entropy: bool
    ):
        head = weight if cap is None else SoftCappedHead(weight, cap)
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        entropies = torch.empty_like(logprobs) if entropy else None
        for c in _chunks(len(targets), len(weight)):
            if entropies is None:
                logprobs[c], _ = _scores(hidden[c], head, targets[c], temperature)
            else:
                logprobs[c], entropies[c] = _entropies(hidden[c], head, targets[c], temperature)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.cap = temperature, cap
        if entropies is None:
            return logprobs
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, *no_grads: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        head = weight if ctx.cap is None else SoftCappedHead(weight, ctx.cap)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for c in _chunks(len(targets), len(weight)):
            _, gradient = _scores(hidden[c], head, targets[c], ctx.temperature, grad[c])
            assert gradient is not None
            grad_hidden[c] = gradient @ weight
            _accumulate(grad_weight, gradient, hidden[c])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


class _NLLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | None, smoothing: float, cap: float | None
    ) -> Tensor:
        head = weight if cap is None else SoftCappedHead(weight, cap)
        total = hidden.new_zeros((), dtype=torch.float32)
        minus_ones = hidden.new_full((len(targets),), -1.0, dtype=torch.float32)
        grads = minus_ones if counts is None else -counts
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for c in _chunks(len(targets), len(weight)):
            logprobs, gradient = _scores(hidden[c], head, targets[c], grad=grads[c])
            assert gradient is not None
            total -= (logprobs if counts is None else logprobs * counts[c]).sum()
            torch.mm(gradient, weight, out=grad_hidden[c])
            _accumulate(grad_weight, gradient, hidden[c])
        if smoothing:
            grads_so_far = (grad_hidden, grad_weight, smoothing)
            total += smoothing * _smoothing(hidden, weight, targets, counts, *grads_so_far)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, *grad_weight = ctx.saved_tensors
        factor = float(grad)  # as a tensor of fp16, a large loss scale would be infinite
        scaled = [g * factor if factor != 1.0 else g for g in (grad_hidden, *grad_weight)]
        return scaled[0], scaled[1].to(ctx.weight_dtype) if grad_weight else None, None, None, None, None


def _smoothing(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    counts: Tensor | None,
    grad_hidden: Tensor | None = None,
    grad_weight: Tensor | None = None,
    factor: float = 0.0,
) -> Tensor:
    """The sum of h (w_target - w_mean), each times its count: how far the targets' logits are above the mean of all.

    `factor` times its gradients is added to what is given.
    """
    ahead = weight[targets] - weight.mean(0, dtype=torch.float32)
    if counts is not None:
        ahead *= counts[:, None]
    if grad_hidden is not None:
        grad_hidden += factor * ahead
    if grad_weight is not None:
        counted = hidden.float() if counts is None else hidden.float() * counts[:, None]
        grad_weight.index_add_(0, targets, counted, alpha=factor)
        grad_weight -= counted.sum(0) * (factor / len(weight))
    return ahead.mul_(hidden).sum()


def _accumulate(grad_weight: Tensor | None, gradient: Tensor, hidden: Tensor) -> None:
    """grad_weight += gradient^T hidden, summed over chunks in fp32."""
    if grad_weight is None:
        return
    if gradient.dtype == torch.float32:
        grad_weight.addmm_(gradient.t(), hidden)
    else:
        native.accumulate_(grad_weight, gradient.t() @ hidden)


def _parts(head: Head) -> tuple[Tensor, float | None]:
    """(matrix [V, D], cap of the logits)."""
    return (head, None) if isinstance(head, Tensor) else (head.weight_VD, head.cap)


def _with_targets(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flatten to [N, D] and [N] and keep the positions that have a target; the third is which, or None for all."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    keep = targets != IGNORE
    if bool(keep.all()):
        return hidden, targets, None
    return hidden[keep], targets[keep], keep


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log p(target) in nats at each position; 0 where the target is -100. fp32, of the targets' shape.

    Args:
        hidden: [..., D] hidden states; position t's predict targets[t].
        head: its matrix [V, D], or that with a soft cap.
        targets: [...] token ids, -100 for none.
        temperature: divides the logits first, as sampling does.
    """
    kept_hidden, kept_targets, keep = _with_targets(hidden, targets)
    weight, cap = _parts(head)
    logprobs = _TokenLogprobs.apply(kept_hidden, weight, kept_targets, temperature, cap, False)
    if keep is None:
        return logprobs.view(targets.shape)
    flat = logprobs.new_zeros(targets.numel())
    return flat.masked_scatter(keep, logprobs).view(targets.shape)


def logprobs_and_entropies(
    hidden_KD: Tensor, head: Head, targets_K: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` [K] of tokens that all have a target, and the entropy [K] in nats that each was drawn from.

    Both come from one pass; the entropies carry no gradient.
    """
    weight, cap = _parts(head)
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden_KD, weight, targets_K, temperature, cap, True)
    return found


def nll_sum(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    label_smoothing: float = 0.0,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed negative log-likelihood in nats, and how many targets it sums over. Both scalars.

    Equal to `-token_logprobs(...).sum()`, a quarter cheaper to train with. `counts`, of the targets' shape, says how
    often each target counts (None: once); the second scalar is then the sum of the counts.

    `label_smoothing` e (Szegedy et al. 2015, arXiv 1512.00567) takes e of the target's share and spreads it over the
    vocabulary, so that the model does not grow ever more certain. What it adds, e (z_target - mean of z), is linear
    in the logits z: it needs one row of the head for each token, and no logits.

    Raises:
        UserError: `label_smoothing` of soft-capped logits, in which it is not linear.
    """
    weight, cap = _parts(head)
    if label_smoothing and cap is not None:
        raise UserError("label smoothing is not possible with soft-capped logits (Gemma 2): leave it at 0")
    hidden, targets, keep = _with_targets(hidden, targets)
    if counts is not None:
        counts = counts.reshape(-1).float()
        counts = counts if keep is None else counts[keep]
    count = torch.tensor(float(len(targets)), device=targets.device) if counts is None else counts.sum()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _NLLSum.apply(hidden, weight, targets, counts, label_smoothing, cap), count
    logprobs = _TokenLogprobs.apply(hidden, weight, targets, 1.0, cap, False)
    total = -(logprobs.sum() if counts is None else logprobs @ counts)
    return total + label_smoothing * _smoothing(hidden, weight, targets, counts) if label_smoothing else total, count
