"""The losses of policy gradients with a clipped ratio, one function for each idea; TRL's names, values and gradients.

A token that turned out better than expected (advantage A > 0) becomes likelier, one that turned out worse less likely.
How far one rollout may push is what these losses differ in, with r the ratio of new to old probability of a token:

  clipped  min(r A, clip(r, 1 - e, 1 + e_high) A): beyond the bounds nothing more is gained (PPO, Schulman et al. 2017,
           arXiv 1707.06347). e_high > e lets unlikely tokens rise (DAPO, Yu et al. 2025, arXiv 2503.14476); `delta`
           bounds r also where A < 0 (INTELLECT-2, arXiv 2505.07291)
  cispo    min(r, e_high) A log p, the factor being a constant: every token keeps its gradient (MiniMax-M1, arXiv
           2506.13585)
  sapo     a sigmoid of r in place of the corner (Gao et al. 2025, arXiv 2511.20347)
  vespo    a weight of the whole sequence that fades where the ratio is far from 1 (arXiv 2602.10693)

`importance_sampling_level` says whose ratio: of each token; of the sequence, the geometric mean of its tokens' (GSPO,
Zheng et al. 2025, arXiv 2507.18071); or "trajectory", their product (RLOO, Ahmadian et al. 2024, arXiv 2402.14740).

What a batch's loss is, given its tokens':

  grpo, sapo           the mean over completions of each one's mean over tokens (Shao et al. 2024, arXiv 2402.03300)
  dapo, cispo, vespo   the mean over all tokens of the rollout: long completions count more
  bnpo                 the mean over all tokens of the step
  dr_grpo              a completion's sum over max_completion_length: no length is favoured (arXiv 2503.20783)
  luspo                the mean over completions of their sums (arXiv 2602.05261)

Each is a sum with a weight, so that micro-batches add up to the whole: a completion weighs 1 (for bnpo, a token does).

K tokens that the policy chose, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zero2hero.align.kl import k3
from zero2hero.alignment_configs import PolicyLossConfig
from zero2hero.train.objectives import Loss


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of the tokens of a micro-batch; whole samples, in any order.

    Attributes:
        logprobs_K: under the policy that learns, with gradient; in nats, as all of them are.
        old_logprobs_K: under the policy that sampled. advantages_K: how much better than expected.
        sample_K: the number of each token's sample.
        num_samples: how many there are, those without a token included.
        ref_logprobs_K: under the reference, where KL is part of the loss.
        entropies_K: of the distribution at each token, where known.
        kept_K: 1.0 where a token counts, 0.0 where its sample is left out. None: all count.
        correction_K: a factor of each token's loss, for a sampler that is not quite the old policy.
        tokens_per_sample: on average, in the whole rollout. None: in these tokens.
    """

    logprobs_K: Tensor
    old_logprobs_K: Tensor
    advantages_K: Tensor
    sample_K: Tensor
    num_samples: int
    ref_logprobs_K: Tensor | None = None
    entropies_K: Tensor | None = None
    kept_K: Tensor | None = None
    correction_K: Tensor | None = None
    tokens_per_sample: float | None = None


def policy_loss(t: Tokens, c: PolicyLossConfig, max_completion_length: int = 1) -> Loss:
    """The loss of a micro-batch. Metrics: kl, entropy, clip_ratio/..., cispo_clip_ratio, under TRL's names."""
    kept_K = torch.ones_like(t.logprobs_K) if t.kept_K is None else t.kept_K
    samples = _Samples(t.sample_K, kept_K)
    log_ratio_K = t.logprobs_K - t.old_logprobs_K
    log_weight_K = LEVELS[c.importance_sampling_level](log_ratio_K, samples)
    ratio_K = log_weight_K.exp()
    if c.loss_type == "vespo":
        loss_K = vespo(t, c, log_ratio_K, samples)
    else:
        loss_K = SURROGATES.get(c.loss_type, clipped)(t, c, ratio_K)
    metrics, weights = _metrics(t, c, ratio_K.detach(), kept_K)
    if c.top_entropy_quantile < 1.0 and t.entropies_K is not None:
        loss_K = loss_K * _undecided(t.entropies_K, kept_K, 1 - c.top_entropy_quantile)
    if t.correction_K is not None and c.loss_type != "vespo":
        loss_K = loss_K * t.correction_K
    if c.beta and t.ref_logprobs_K is not None:
        kl_K = k3(t.logprobs_K, t.ref_logprobs_K)
        if c.use_bias_correction_kl:
            kl_K = kl_K * ratio_K
        loss_K = loss_K + c.beta * kl_K
        metrics["kl"], weights["kl"] = (kl_K.detach() * kept_K).sum(), kept_K.sum()
    share_K = kept_K * _shares(t, c, samples, kept_K, max_completion_length)
    weight = kept_K.sum().clamp(min=1.0) if c.loss_type == "bnpo" else kept_K.new_tensor(float(t.num_samples))
    return Loss((loss_K * share_K).sum(), weight, metrics, weights)


def _shares(t: Tokens, c: PolicyLossConfig, samples: _Samples, kept_K: Tensor, longest: int) -> Tensor | float:
    """What each token counts, where a completion has the weight 1 (bnpo: a token)."""
    if c.loss_type in ("grpo", "sapo"):
        return 1 / samples.lengths_K
    if c.loss_type == "dr_grpo":
        return 1 / longest
    if c.loss_type in ("dapo", "cispo", "vespo"):
        average = t.tokens_per_sample
        return 1 / max(float(kept_K.sum()) / t.num_samples if average is None else average, 1 / t.num_samples)
    return 1.0  # bnpo, luspo


# --- the ratio --------------------------------------------------------------------------------------------------


class _Samples:
    """Sums over the tokens of each sample."""

    def __init__(self, sample_K: Tensor, kept_K: Tensor) -> None:
        found, self.of_K = sample_K.unique(return_inverse=True)
        self.count, self.kept_K = len(found), kept_K
        self.lengths_K = self.sum(torch.ones_like(kept_K)).clamp(min=1.0)

    def sum(self, values_K: Tensor) -> Tensor:
        """For each token [K] the sum over its sample's tokens that count."""
        sums = values_K.new_zeros(self.count).index_add(0, self.of_K, values_K * self.kept_K)
        return sums[self.of_K]


LEVELS: dict[str, Callable[[Tensor, _Samples], Tensor]] = {
    "token": lambda log_ratio_K, samples: log_ratio_K,
    "sequence": lambda log_ratio_K, samples: samples.sum(log_ratio_K) / samples.lengths_K,
    "trajectory": lambda log_ratio_K, samples: samples.sum(log_ratio_K),
}


# --- the surrogates: the loss [K] of each token ------------------------------------------------------------------


def clipped(t: Tokens, c: PolicyLossConfig, ratio_K: Tensor) -> Tensor:
    bounded_K = ratio_K.clamp(1 - c.epsilon, 1 + c.upper)
    if c.delta is not None:
        ratio_K = ratio_K.clamp(max=c.delta)
    return -torch.min(ratio_K * t.advantages_K, bounded_K * t.advantages_K)


def cispo(t: Tokens, c: PolicyLossConfig, ratio_K: Tensor) -> Tensor:
    return -ratio_K.clamp(max=c.upper).detach() * t.advantages_K * t.logprobs_K


def sapo(t: Tokens, c: PolicyLossConfig, ratio_K: Tensor) -> Tensor:
    temperature_K = torch.where(t.advantages_K > 0, c.sapo_temperature_pos, c.sapo_temperature_neg)
    return -torch.sigmoid(temperature_K * (ratio_K - 1)) * 4 / temperature_K * t.advantages_K


def vespo(t: Tokens, c: PolicyLossConfig, log_ratio_K: Tensor, samples: _Samples) -> Tensor:
    """-phi(w) A log p, where phi(w) = e^l w^k e^(-l w) is 1 at w = 1; w is the sequence's ratio, in logarithms here."""
    with torch.no_grad():
        smallest, largest = -18.420680743952367, 20.0  # log 1e-8, as published
        log_w_K = samples.sum(log_ratio_K.clamp(-largest, largest))
        if t.correction_K is not None:
            log_w_K = log_w_K + samples.sum(t.correction_K.log().clamp(smallest, largest))
        log_w_K = log_w_K.clamp(smallest, largest)
        good_K = t.advantages_K >= 0
        k_K = torch.where(good_K, c.vespo_k_pos, c.vespo_k_neg)
        lambda_K = torch.where(good_K, c.vespo_lambda_pos, c.vespo_lambda_neg).clamp(min=1e-4)
        phi_K = (lambda_K + k_K * log_w_K - lambda_K * log_w_K.exp()).exp().nan_to_num(0.0, 0.0, 0.0)
    return -phi_K * t.advantages_K * t.logprobs_K


SURROGATES: dict[str, Callable[[Tokens, PolicyLossConfig, Tensor], Tensor]] = {"cispo": cispo, "sapo": sapo}


# --- what is chosen, and what is told ------------------------------------------------------------------------------


def _undecided(entropies_K: Tensor, kept_K: Tensor, quantile: float) -> Tensor:
    """1.0 for the tokens of highest entropy: the forks in the road (Wang et al. 2025, arXiv 2506.01939)."""
    known = entropies_K[kept_K > 0]
    if not known.numel():
        return kept_K
    return (entropies_K * kept_K >= torch.quantile(known, quantile)).to(kept_K.dtype) * kept_K


@torch.no_grad()
def _metrics(
    t: Tokens, c: PolicyLossConfig, ratio_K: Tensor, kept_K: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over the tokens that count, and how many these are."""
    flags = {}
    if c.loss_type == "cispo":
        flags["cispo_clip_ratio"] = (ratio_K > c.upper) & (t.advantages_K > 0)
    elif c.loss_type not in ("sapo", "vespo"):
        low_K = (ratio_K < 1 - c.epsilon) & (t.advantages_K < 0)
        high_K = (ratio_K > 1 + c.upper) & (t.advantages_K > 0)
        flags = {"clip_ratio/low_mean": low_K, "clip_ratio/high_mean": high_K, "clip_ratio/region_mean": low_K | high_K}
    sums = {name: (flag_K * kept_K).sum() for name, flag_K in flags.items()}
    if t.entropies_K is not None:
        sums["entropy"] = (t.entropies_K * kept_K).sum()
    return sums, dict.fromkeys(sums, kept_K.sum())
