"""What training minimizes. An objective returns a sum and a weight; the loop divides once.

The mean over a batch is not the mean of its parts' means when the parts are unequal (ragged rows, masked turns).
So no objective averages: it returns `Loss(sum, weight)`, and the loop divides the step's gradient once, by the weight
of all its micro-batches on all its ranks. Then 8 x 1, 4 x 2 and 1 x 8 are the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from zero2hero.nn.logprobs import IGNORE, nll_sum


@dataclass
class Loss:
    """`sum` carries the gradient; `sum / weight` is the loss that people read. `metrics` are sums as well."""

    sum: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


Objective = Callable[[nn.Module, Any], Loss]


def causal_lm(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> Loss:
    """Predict each next token (Bengio et al. 2003; Radford et al. 2018): the negative log-likelihood in nats.

    `batch`: ids_BT, targets_BT (-100 for none), positions_BT, document_ids_BT (or None: one document a row).
    `label_smoothing`: see `nll_sum`.
    """
    positions = batch.positions_BT if batch.document_ids_BT is not None else None
    hidden = model(batch.ids_BT, positions=positions, document_ids=batch.document_ids_BT)
    total, count = nll_sum(hidden, model.head_weight, batch.targets_BT, label_smoothing)  # type: ignore[arg-type]
    return Loss(total, count)


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


def seq2seq_lm(model: nn.Module, batch: Any) -> Loss:
    """Write the target given the source (Sutskever et al. 2014; T5's span corruption too): negative log-likelihood.

    `batch`: ids_BS, attention_mask_BS (or None), decoder_ids_BT, targets_BT (-100 for none).
    """
    hidden = model(batch.ids_BS, batch.decoder_ids_BT, attention_mask=batch.attention_mask_BS)
    total, count = nll_sum(hidden, model.head_weight, batch.targets_BT)  # type: ignore[arg-type]
    return Loss(total, count)
