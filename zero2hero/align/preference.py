"""What preference optimization minimizes: one function for each loss, of log-probabilities of whole answers.

Somebody preferred one answer to another. If a reward r explains it by P(y+ over y-) = sigmoid(r(y+) - r(y-)) (Bradley
and Terry 1952), then the policy that maximizes r - beta KL(policy || reference) is its own reward model:
r(y) = beta log(policy(y) / reference(y)) plus what is equal for both answers. So the policy can be fitted to
preferences as a classifier (DPO, Rafailov et al. 2023, arXiv 2305.18290); everything below is a variation of that:

    another curve      hinge, ipo, sppo_hard, discopop, exo_pair, sigmoid_norm; f-divergences in the place of KL
    doubtful raters    sigmoid with label_smoothing (cDPO), robust
    each for itself    nca_pair, bco_pair, apo_zero, apo_down; kto and apo_zero_unpaired need no pairs at all
    all together       aot, aot_unpaired: sorted over the batch, so micro-batches are not parts of one sum
    no reference       cpo, cpo_hinge, cpo_ipo, simpo, orpo
    imitation          sft, to be mixed with any of them: loss_type [sigmoid, sft], loss_weights [1, 0.5]

Each loss takes `Answers` and the settings (alignment_configs.PreferenceSettings) and gives a number for each pair;
names and conventions are TRL's, and tests/parity/test_trl_preference.py holds value and gradient against it.

B pairs (or, unpaired, answers).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zero2hero.errors import UserError

Settings = Any  # alignment_configs.PreferenceSettings


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of B pairs of answers, each [B], summed over its tokens.

    chosen, rejected: under the policy. reference_chosen, reference_rejected: under the reference (zeros without one).
    chosen_tokens, rejected_tokens: how many tokens each answer has.
    nll: the negative log-likelihood of what is to be imitated: the chosen answer, for orpo with its prompt.
    nll_share: pairs over tokens to be imitated, of the whole step: what turns a sum over tokens into pairs' shares of
        their mean. By default of these pairs.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    nll: Tensor
    nll_share: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log(policy / reference) of the chosen answers."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log(policy / reference) of the rejected answers."""
        return self.rejected - self.reference_rejected


def scores(a: Answers, c: Settings) -> tuple[Tensor, Tensor]:
    """f'(policy / reference) of chosen and rejected: the log-ratio for the reverse KL (f-DPO, arXiv 2309.16240)."""
    return f_score(a.chosen_ratio, c), f_score(a.rejected_ratio, c)


def f_score(ratio: Tensor, c: Settings) -> Tensor:
    """The derivative of the divergence's generator at exp(`ratio`), up to a constant."""
    kind, alpha = c.f_divergence_type, c.f_alpha_divergence_coef
    if kind == "forward_kl":
        return 1 - torch.exp(-ratio)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return (torch.exp(((alpha - 1) * ratio).clamp(max=80.0)) - 1) / (alpha - 1)
    return ratio


def margin(a: Answers, c: Settings) -> Tensor:
    """How far the chosen answer is ahead of the rejected one, in the scores."""
    chosen, rejected = scores(a, c)
    return chosen - rejected


def margin_per_token(a: Answers, c: Settings) -> Tensor:
    """The same of scores for each token."""
    chosen, rejected = scores(a, c)
    return chosen / a.chosen_tokens.clamp(min=1) - rejected / a.rejected_tokens.clamp(min=1)


# --- pairs, against a reference -----------------------------------------------------------------------------


def sigmoid(a: Answers, c: Settings) -> Tensor:
    """DPO: -log P(the chosen one wins). With label_smoothing e cDPO: the label is wrong once in 1/e (Mitchell 2023)."""
    return smoothed(c.beta * margin(a, c), c.label_smoothing)


def smoothed(x: Tensor, e: float) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)."""
    loss = -F.logsigmoid(x)
    return loss if not e else (1 - e) * loss - e * F.logsigmoid(-x)


def robust(a: Answers, c: Settings) -> Tensor:
    """DPO made unbiased for labels that are flipped with probability label_smoothing (rDPO, arXiv 2403.00409)."""
    x, e = c.beta * margin(a, c), c.label_smoothing
    return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


def sigmoid_norm(a: Answers, c: Settings) -> Tensor:
    """DPO with log-ratios per token, so that long answers do not weigh more (LN-DPO, Tulu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(c.beta * margin_per_token(a, c))


def ipo(a: Answers, c: Settings) -> Tensor:
    """The margin per token is to be 1 / (2 beta), and not to grow for ever (IPO, arXiv 2310.12036, eq. 17)."""
    return (margin_per_token(a, c) - 1 / (2 * c.beta)) ** 2


def hinge(a: Answers, c: Settings) -> Tensor:
    """Nothing more to learn from a pair once its margin is 1 / beta (SLiC, arXiv 2305.10425)."""
    return torch.relu(1 - c.beta * margin(a, c))


def exo_pair(a: Answers, c: Settings) -> Tensor:
    """Reverse KL from the policy's preference to the rater's smoothed one (EXO, arXiv 2402.00856, eq. 16)."""
    x, e = c.beta * margin(a, c), torch.tensor(c.label_smoothing)
    win, lose = F.logsigmoid(x), F.logsigmoid(-x)
    return win.exp() * (win - torch.log1p(-e)) + lose.exp() * (lose - torch.log(e))


def sppo_hard(a: Answers, c: Settings) -> Tensor:
    """Self-play: log-ratios are to be 1/(2 beta) for the winner, -1/(2 beta) for the loser (SPPO, arXiv 2405.00675)."""
    return (a.chosen_ratio - 0.5 / c.beta) ** 2 + (a.rejected_ratio + 0.5 / c.beta) ** 2


def discopop(a: Answers, c: Settings) -> Tensor:
    """A blend of logistic and exponential loss that a language model found (DiscoPOP, arXiv 2406.08414, eq. 5)."""
    x = c.beta * margin(a, c)
    mix = torch.sigmoid(x / c.discopop_tau)
    return -F.logsigmoid(x) * (1 - mix) + torch.exp(-x) * mix


def nca_pair(a: Answers, c: Settings) -> Tensor:
    """The chosen one's likelihood may not fall: noise contrastive alignment (NCA, arXiv 2402.05369)."""
    good, bad = c.beta * a.chosen_ratio, c.beta * a.rejected_ratio
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def bco_pair(a: Answers, c: Settings) -> Tensor:
    """A classifier of good and of bad answers, each for itself (BCO, arXiv 2404.04656, without its shift)."""
    return -F.logsigmoid(c.beta * a.chosen_ratio) - F.logsigmoid(-c.beta * a.rejected_ratio)


def apo_zero(a: Answers, c: Settings) -> Tensor:
    """Chosen up, rejected down: for chosen answers better than the model's own (APO, arXiv 2408.06266, eq. 7)."""
    return 1 - torch.sigmoid(c.beta * a.chosen_ratio) + torch.sigmoid(c.beta * a.rejected_ratio)


def apo_down(a: Answers, c: Settings) -> Tensor:
    """Both down, the rejected one more: for chosen answers worse than the model's own (APO, eq. 8)."""
    apart = torch.sigmoid(c.beta * (a.chosen_ratio - a.rejected_ratio))
    return torch.sigmoid(c.beta * a.chosen_ratio) + 1 - apart


def aot(a: Answers, c: Settings) -> Tensor:
    """Margins as a distribution, sorted over the batch, against the reference's (AOT, arXiv 2406.05882)."""
    now, before = a.chosen - a.rejected, a.reference_chosen - a.reference_rejected
    return smoothed(c.beta * (now.sort().values - before.sort().values), c.label_smoothing)


def aot_unpaired(a: Answers, c: Settings) -> Tensor:
    """The same without regard to which answers are a pair: the sorted log-ratios of chosen over those of rejected."""
    return smoothed(c.beta * (a.chosen_ratio.sort().values - a.rejected_ratio.sort().values), c.label_smoothing)


# --- imitation, and what needs no reference -----------------------------------------------------------------


def sft(a: Answers, c: Settings) -> Tensor:
    """The mean negative log-likelihood of the chosen answers' tokens, as pairs' shares of it."""
    return a.nll * a.nll_share


def cpo(a: Answers, c: Settings) -> Tensor:
    """DPO with a uniform reference, and imitation that keeps the model where it is (CPO, arXiv 2401.08417, eq. 3)."""
    return sigmoid(a, c) + c.cpo_alpha * sft(a, c)


def cpo_hinge(a: Answers, c: Settings) -> Tensor:
    return hinge(a, c) + c.cpo_alpha * sft(a, c)


def cpo_ipo(a: Answers, c: Settings) -> Tensor:
    return (margin(a, c) - 1 / (2 * c.beta)) ** 2 + c.cpo_alpha * sft(a, c)


def simpo(a: Answers, c: Settings) -> Tensor:
    """Mean log-probabilities, to be simpo_gamma / beta apart (SimPO, arXiv 2405.14734, eq. 6); with sft: CPO-SimPO."""
    return smoothed(c.beta * (margin(a, c) - c.simpo_gamma / c.beta), c.label_smoothing)


def orpo(a: Answers, c: Settings) -> Tensor:
    """Imitation, and the odds of the chosen answer over those of the rejected one (ORPO, arXiv 2403.07691, eq. 6)."""
    odds = (a.chosen - a.rejected) - (log1mexp(a.chosen) - log1mexp(a.rejected))
    return sft(a, c) - c.beta * F.logsigmoid(odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012)."""
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


# --- answers that were liked or not, without a partner ------------------------------------------------------


def kto(ratio: Tensor, liked: Tensor, kl: Tensor | float, c: Settings) -> Tensor:
    """A good answer is a gain over what the policy gives on average, a bad one a loss (KTO, arXiv 2402.01306, eq. 7).

    Args:
        ratio: [B] log(policy / reference) of each answer.
        liked: [B] bool.
        kl: of policy from reference; see `mismatched_kl`.
    """
    gain = torch.sigmoid(c.beta * torch.where(liked, ratio - kl, kl - ratio))
    return torch.where(liked, c.desirable_weight, c.undesirable_weight) * (1 - gain)


def mismatched_kl(ratio: Tensor) -> Tensor:
    """KTO's estimate of the KL: the mean log-ratio of answers to other prompts, at least 0; it takes no gradient."""
    return ratio.detach().mean().clamp(min=0)


def apo_zero_unpaired(ratio: Tensor, liked: Tensor, kl: Tensor | float, c: Settings) -> Tensor:
    """KTO with zero in the place of the KL (APO, arXiv 2408.06266, eq. 7)."""
    return kto(ratio, liked, 0.0, c)


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A loss, and what it asks for.

    loss: (Answers, settings) -> [B]; of `unpaired` kinds (ratio, liked, kl, settings) -> [B].
    reference: it compares with a reference. per_token: its log-probabilities are means over tokens.
    imitates: what its imitation reads: "" for nothing, "answer", or "all" with the prompt.
    divergence: f_divergence_type changes it. together: depends on what is in a micro-batch together.
    """

    loss: Callable[..., Tensor]
    reference: bool = True
    per_token: bool = False
    imitates: str = ""
    divergence: bool = False
    unpaired: bool = False
    together: bool = False


LOSSES = {
    "sigmoid": Kind(sigmoid, divergence=True),
    "robust": Kind(robust, divergence=True),
    "sigmoid_norm": Kind(sigmoid_norm, divergence=True),
    "ipo": Kind(ipo, divergence=True),
    "hinge": Kind(hinge, divergence=True),
    "exo_pair": Kind(exo_pair, divergence=True),
    "discopop": Kind(discopop, divergence=True),
    "sppo_hard": Kind(sppo_hard),
    "nca_pair": Kind(nca_pair),
    "bco_pair": Kind(bco_pair),
    "apo_zero": Kind(apo_zero),
    "apo_down": Kind(apo_down),
    "aot": Kind(aot, together=True),
    "aot_unpaired": Kind(aot_unpaired, together=True),
    "sft": Kind(sft, reference=False, imitates="answer", divergence=True),
    "cpo": Kind(cpo, reference=False, imitates="answer", divergence=True),
    "cpo_hinge": Kind(cpo_hinge, reference=False, imitates="answer", divergence=True),
    "cpo_ipo": Kind(cpo_ipo, reference=False, per_token=True, imitates="answer", divergence=True),
    "simpo": Kind(simpo, reference=False, per_token=True, divergence=True),
    "orpo": Kind(orpo, reference=False, per_token=True, imitates="all"),
    "kto": Kind(kto, unpaired=True, together=True),
    "apo_zero_unpaired": Kind(apo_zero_unpaired, unpaired=True),
}


def preference_loss(a: Answers, c: Settings) -> Tensor:
    """The loss of each pair [B]: those of `c.loss_type`, each times its weight."""
    total = torch.zeros_like(a.chosen)
    for name, weight in zip(c.loss_types, c.loss_weights or [1.0] * len(c.loss_types)):
        kind = LOSSES[name]
        if kind.unpaired:
            raise UserError(f"loss_type {name} is of single answers, not of pairs")
        total = total + weight * kind.loss(seen_by(kind, a), c)
    return total


def seen_by(kind: Kind, a: Answers) -> Answers:
    """The log-probabilities as a loss wants them: without a reference, per token."""
    if not kind.reference:
        a = dataclasses.replace(a, reference_chosen=torch.zeros_like(a.chosen),
                                reference_rejected=torch.zeros_like(a.rejected))  # fmt: skip
    if kind.per_token:
        a = dataclasses.replace(a, chosen=a.chosen / a.chosen_tokens, rejected=a.rejected / a.rejected_tokens)
    return a
