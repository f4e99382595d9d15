"""What training minimizes. An objective returns a sum and a weight; the loop divides once.

The mean over a batch is not the mean of its parts' means when the parts are unequal (ragged rows, masked turns).
So no objective averages: it returns `Loss(sum, weight)`, and the loop divides the step's gradient once, by the weight
of all its micro-batches on all its ranks. Then 8 x 1, 4 x 2 and 1 x 8 are the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.nn.logprobs import IGNORE, nll_sum
from zero2hero.nn.moe import load_balancing_loss, router_logits


@dataclass
class Loss:
    """`sum` carries the gradient; `sum / weight` is the loss that people read. `metrics` are sums as well.

    `weights`: what a metric is divided by, where that is not the loss's weight.
    """

    sum: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


Objective = Callable[[nn.Module, Any], Loss]


def causal_lm(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> Loss:
    """Predict each next token (Bengio et al. 2003; Radford et al. 2018): the negative log-likelihood in nats.

    `batch`: ids_BT, targets_BT (-100 for none), positions_BT, document_ids_BT (or None: one document a row), weights_BT
    (or None: every target counts once).
    `label_smoothing`: see `nll_sum`.
    """
    positions = batch.positions_BT if batch.document_ids_BT is not None else None
    hidden = model(batch.ids_BT, positions=positions, document_ids=batch.document_ids_BT)
    weights = getattr(batch, "weights_BT", None)
    total, count = nll_sum(hidden, model.head_weight, batch.targets_BT, label_smoothing, weights)  # type: ignore[arg-type]
    return Loss(total, count)


def with_balanced_experts(objective: Objective, top_k: int, coefficient: float) -> Objective:
    """`objective` plus `coefficient` times the load-balancing loss of a mixture of experts (see nn/moe.py).

    The balance is that of each micro-batch on each rank, as in transformers, and it alone makes the same step in other
    micro-batches a slightly different one: it is a product of two means, the experts' shares of the choices and their
    probabilities, and a product of means is no sum over parts. To have it of the whole step, every share must be
    known before the first gradient, which is a second forward pass over all of the step. The effect is `coefficient`,
    a thousandth by default, times how far the shares of a micro-batch are from those of the step.
    """

    def balanced(model: nn.Module, batch: Any) -> Loss:
        with router_logits(model) as logits:
            loss = objective(model, batch)
        penalty = load_balancing_loss(logits, top_k) * loss.weight
        metrics = {**loss.metrics, "expert_balance": penalty.detach()}
        return Loss(loss.sum + coefficient * penalty, loss.weight, metrics, loss.weights)

    return balanced


def masked_lm(model: nn.Module, batch: Any) -> Loss:
    """Guess the masked words from both sides (Devlin et al. 2018): the negative log-likelihood in nats.

    `batch`: as `causal_lm`'s, with -100 as target of every word that is not to be guessed.
    """
    hidden = model(batch.ids_BT, positions=batch.positions_BT, document_ids=batch.document_ids_BT)
    guessed = batch.targets_BT != IGNORE
    head: Any = model.head
    features, weight = head.as_product(hidden[guessed])
    total, count = nll_sum(features, weight, batch.targets_BT[guessed])
    return Loss(total, count)


def seq2seq_lm(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> Loss:
    """Write the target given the source (Sutskever et al. 2014; T5's span corruption too): negative log-likelihood.

    `batch`: ids_BS, attention_mask_BS (or None), decoder_ids_BT, targets_BT (-100 for none).
    """
    hidden = model(batch.ids_BS, batch.decoder_ids_BT, attention_mask=batch.attention_mask_BS)
    total, count = nll_sum(hidden, model.head_weight, batch.targets_BT, label_smoothing)  # type: ignore[arg-type]
    return Loss(total, count)


def vision_language_lm(model: nn.Module, batch: Any) -> Loss:
    """Predict each next token of texts with images in them (Liu et al. 2023): the negative log-likelihood in nats.

    `batch`: as `causal_lm`'s, image tokens expanded and without targets; pixels_ICHW, the images in their order.
    """
    more = {} if batch.branch_ids_BT is None else {"branch_ids": batch.branch_ids_BT}
    positions = batch.positions_BT if batch.document_ids_BT is not None else None
    hidden = model(batch.ids_BT, batch.pixels_ICHW, positions=positions, document_ids=batch.document_ids_BT, **more)
    total, count = nll_sum(hidden, model.head_weight, batch.targets_BT)  # type: ignore[arg-type]
    return Loss(total, count)


def classification(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> Loss:
    """Choose a label: cross entropy, in nats per labelled thing, be it an image, a text or each token of one.

    `batch`: inputs, the model's arguments; labels [...] (-100 for none) where the model's logits are [..., C].
    `label_smoothing`: share of each label that is spread over all of them (Szegedy et al. 2015, arXiv 1512.00567).
    """
    logits, labels = label_logits(model, batch), batch.labels
    total = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    labelled = labels != IGNORE
    right = (logits.argmax(-1) == labels) & labelled
    return Loss(total, labelled.sum().float(), {"accuracy": right.sum()})


def regression(model: nn.Module, batch: Any) -> Loss:
    """Predict a number: the square of how far it is off. `batch`: as `classification`'s, labels [B] numbers."""
    total = F.mse_loss(label_logits(model, batch)[:, 0], batch.labels.float(), reduction="sum")
    return Loss(total, _count(batch.labels))


def answer_span(model: nn.Module, batch: Any) -> Loss:
    """Where an answer begins and where it ends (Devlin et al. 2018, section 4.2): the mean of both, in nats.

    `batch`: as `classification`'s, labels [B, 2] the numbers of the two tokens where logits are [B, T, 2];
    attention_mask_BT (or None), since no answer is in the padding.
    """
    logits = label_logits(model, batch)
    if batch.attention_mask_BT is not None:
        logits = logits.masked_fill(batch.attention_mask_BT[..., None] == 0, float("-inf"))
    total = F.cross_entropy(logits, batch.labels, reduction="sum") / 2
    return Loss(total, _count(batch.labels), {"accuracy": (logits.argmax(1) == batch.labels).all(-1).sum()})


def label_logits(model: Any, batch: Any) -> Tensor:
    """What the model's head says of the batch's inputs, in fp32."""
    return model.logits(model(*batch.inputs)).float()


def softmax_contrastive(model: nn.Module, batch: Any) -> Loss:
    """Which of the texts belongs to an image, and which image to a text (CLIP; Radford et al. 2021): nats per pair.

    `batch`: ids_BT and pixels_BCHW, row by row a pair. The texts and images to choose from are those of all ranks, so
    the loss depends on what is in a batch together: micro-batches are not parts of one sum.
    """
    texts, images = (x.float() for x in model(batch.ids_BT, batch.pixels_BCHW))  # bf16 has 3 digits: too few to compare
    logits: Any = model.logits
    (all_texts, all_images), own = _of_all_ranks(texts, images)
    per_image, per_text = logits(all_texts, images), logits(texts, all_images).t()
    total = (F.cross_entropy(per_image, own, reduction="sum") + F.cross_entropy(per_text, own, reduction="sum")) / 2
    return Loss(total, _count(own), {"accuracy": (per_image.argmax(-1) == own).sum()})


def sigmoid_contrastive(model: nn.Module, batch: Any) -> Loss:
    """Does this text belong to this image, for each of the pairs (SigLIP; Zhai et al. 2023): nats per image.

    `batch`: as `softmax_contrastive`'s.
    """
    texts, images = (x.float() for x in model(batch.ids_BT, batch.pixels_BCHW))  # bf16 has 3 digits: too few to compare
    logits: Any = model.logits
    (all_texts, _), own = _of_all_ranks(texts, images)
    per_image = logits(all_texts, images)
    belongs = F.one_hot(own, per_image.shape[1]).to(per_image.dtype)
    total = F.binary_cross_entropy_with_logits(per_image, belongs, reduction="sum")
    return Loss(total, _count(own), {"accuracy": (per_image.argmax(-1) == own).sum()})


def _of_all_ranks(*features: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each [B, P] of all ranks together, [ranks * B, P], gradients included; and the numbers [B] of one's own rows."""
    count, first = len(features[0]), 0
    gathered = list(features)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_gather

        gathered, first = [torch.cat(all_gather(x.contiguous())) for x in features], dist.get_rank() * count
    return gathered, torch.arange(first, first + count, device=features[0].device)


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(float(len(rows)), device=rows.device)
