"""Reward modelling: from which of two answers people preferred to a number for any answer. `zero2hero reward`.

    preferences  ->  the tokens of prompt + chosen and prompt + rejected  ->  a score each  ->  the loop

Bradley and Terry (1952): the chosen answer wins with the probability sigmoid(r_chosen - r_rejected), whose negative
logarithm is the loss (Christiano et al. 2017, arXiv 1706.03741; Ouyang et al. 2022, arXiv 2203.02155, section 3.5).
A record's `margin` is subtracted from the difference first: what is much better should be scored much higher (Touvron
et al. 2023, arXiv 2307.09288, section 3.2.2). Differences say nothing of where 0 is; `center_rewards_coefficient` puts
it in the middle (Eisenstein et al. 2023, arXiv 2312.09244). Loss and metrics are those of TRL's RewardTrainer.

What is reported of held-out pairs beside accuracy: whether probabilities mean what they say (calibration), and whether
the score is but a measure of length (Singhal et al. 2023, arXiv 2310.03716).

P pairs, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.align.reward_model import read_part, scores_of_batch, scores_of_ids, whole_text, with_score_head
from zero2hero.alignment_configs import RewardConfig
from zero2hero.data.conversations import Record
from zero2hero.data.labelled import RowsByLength
from zero2hero.data.pairs import moved, padded
from zero2hero.errors import UserError
from zero2hero.fetch import find_folder
from zero2hero.io import atomic_write
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template
from zero2hero.train.intervals import wilson
from zero2hero.train.objectives import Loss
from zero2hero.train.run import Place, Task, micro_batches, steps_of, training
from zero2hero.train.sft import base_model, split_records
from zero2hero.train.text_tasks import save_model
from zero2hero.train.tracking import Units

BINS = 10  # of confidence, for the calibration


@dataclass(frozen=True)
class Pair:
    """Two whole texts in tokens, the better one first; `margin`: by how much, 0 where the record does not say."""

    chosen: np.ndarray
    rejected: np.ndarray
    margin: float = 0.0

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass
class Pairs:
    """The pairs of many records, and what was left out, by the names of the records."""

    pairs: list[Pair] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)

    def report(self, max_length: int) -> str:
        """What was left out, as a sentence; empty when nothing was."""
        reasons = ((self.same, "chosen and rejected are the same"),
                   (self.too_long, f"one of them is longer than max_length {max_length}"))  # fmt: skip
        return "; ".join(f"{len(names)} left out for {why} (the first: {names[0]})" for names, why in reasons if names)


@dataclass(frozen=True)
class PairBatch:
    """2 P texts, those that were chosen first, padded on the right; arrays are numpy or (after `to`) torch."""

    ids_BT: Any
    attention_mask_BT: Any
    margin_P: Any

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return self.ids_BT.shape[0] * self.ids_BT.shape[1]

    def to(self, device: Any) -> PairBatch:
        """The same batch as torch tensors on `device`."""
        return moved(self, device)


def _begin(config: RewardConfig, place: Place) -> Task:
    train = config.train
    folder = find_folder(config.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    learn, held_out = split_records(config)
    if any(isinstance(record.prompt, list) for record in (*learn, *held_out)):
        set_chat_template(tokenizer, config.chat_template)
    model = base_model(config, folder, place)
    if not model.classifies:
        model = with_score_head(model, tokenizer, train.seed)
    max_length = min(train.max_length, model.config.max_position_embeddings)
    training, validation = (encode_pairs(records, tokenizer, max_length, model) for records in (learn, held_out))
    size, together = train.per_device_train_batch_size, train.gradient_accumulation_steps * place.ranks.data_size
    rows = RowsByLength([len(pair) for pair in training.pairs], size, together, train.seed)
    left_out = "".join(f"; {words}" for found in (training, validation) if (words := found.report(max_length)))
    evaluate = evaluation(model, validation.pairs, place)

    def save(finished: nn.Module) -> None:
        save_model(finished, tokenizer=tokenizer, config=config, max_length=model.config.max_position_embeddings)  # type: ignore[arg-type]
        found = measured(scores_of(finished, validation.pairs), validation.pairs)
        atomic_write(Path(config.output_dir) / "reward.json", json.dumps(found, indent=2) + "\n")

    return Task(
        model, lambda model, batch: objective(model, batch, config.center_rewards_coefficient),
        steps_of(config, len(training.pairs), place.ranks.data_size),
        micro_batches(config, place, lambda i: pair_batch([training.pairs[j] for j in rows[i]])),
        save=save,
        announce=f"{len(training.pairs)} pairs to learn from, {len(validation.pairs)} held out{left_out}",
        evaluate=evaluate,
        baseline=evaluate,
        made_with={"tokenizer": tokenizer.fingerprint, "base": str(folder)},
        flops_per_token=lambda _: model.config.training_flops_per_token(max_length),
        units=Units("pair"),
    )  # fmt: skip


reward = training(_begin)


# --- data -----------------------------------------------------------------------------------------------------


def encode_pairs(records: Sequence[Record], tokenizer: Tokenizer, max_length: int, model: Any) -> Pairs:
    """The texts of preference records in tokens, as TRL has them: pairs with a text that is too long are left out.

    Raises:
        UserError: a record that holds no preference, or none that is left.
    """
    found = Pairs()
    for record in records:
        if record.kind != "preference":
            raise UserError(f"{record.where}: this record ({record.shape}) holds no preference: it needs prompt, "
                            "chosen and rejected")  # fmt: skip
        try:
            texts = [whole_text(record.prompt, answer, tokenizer, record.tools)
                     for answer in (record.chosen, record.rejected)]  # fmt: skip
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from None
        chosen, rejected = (read_part(model, text) for text in texts)
        if np.array_equal(chosen, rejected):
            found.same.append(record.where)
        elif max(len(chosen), len(rejected)) > max_length:
            found.too_long.append(record.where)
        else:
            found.pairs.append(Pair(chosen, rejected, record.margin or 0.0))
    if not found.pairs:
        raise UserError(f"no preference to learn from: {found.report(max_length) or 'the data holds no record'}")
    return found


def pair_batch(pairs: Sequence[Pair]) -> PairBatch:
    """Pairs as a batch."""
    ids, mask = padded([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], 0)
    return PairBatch(ids, mask, np.array([pair.margin for pair in pairs], dtype=np.float32))


# --- what is minimized ----------------------------------------------------------------------------------------


def reward_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    margin_P: Tensor | float = 0.0,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    """-ln of the probability that the chosen answer wins, for each pair: [P], in nats (with centering, more)."""
    losses = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (chosen_P + rejected_P) ** 2
    return losses


def objective(model: nn.Module, batch: PairBatch, center_rewards_coefficient: float | None = None) -> Loss:
    """The loss of a batch of pairs, without dropout; with TRL's metrics (minimum and maximum are of a micro-batch)."""
    model.eval()  # the backward pass too, which may compute blocks again
    scores = scores_of_batch(model, batch.ids_BT, batch.attention_mask_BT)
    chosen, rejected = scores.chunk(2)
    losses = reward_loss(chosen, rejected, batch.margin_P, center_rewards_coefficient)
    count, known = len(losses), scores.detach()
    metrics = {
        "accuracy": (chosen > rejected).sum(), "margin": (chosen - rejected).detach().sum(),
        "min_reward": known.min() * count, "mean_reward": known.mean() * count, "max_reward": known.max() * count,
    }  # fmt: skip
    return Loss(losses.sum(), torch.tensor(float(count), device=losses.device), metrics)


# --- evaluation -----------------------------------------------------------------------------------------------


def evaluation(model: nn.Module, pairs: Sequence[Pair], place: Place) -> Callable[[], dict[str, float]]:
    """() -> loss and measures of all held-out pairs, divided over the ranks."""
    rank, size = place.part

    def evaluate() -> dict[str, float]:
        mine = scores_of(model, pairs[rank::size]).tolist()
        scores = torch.empty(len(pairs), 2)
        for part, found in enumerate(place.ranks.gather(mine)):
            scores[part::size] = torch.tensor(found).view(-1, 2)
        return {f"eval_{n}": value for n, value in measured(scores, pairs).items() if isinstance(value, float)}

    return evaluate


def scores_of(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """The scores [P, 2] of the chosen and the rejected texts."""
    return scores_of_ids(model, [text for pair in pairs for text in (pair.chosen, pair.rejected)]).view(-1, 2)


def measured(scores_P2: Tensor, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What a reward model is worth on pairs that it has not seen.

    accuracy (with its 95 % interval), loss, margin, rewards; calibration_error, the mean distance between how sure the
    model is and how often it is right; length_correlation of score and length; accuracy_shorter, over those pairs in
    which people preferred the shorter answer; calibration: bins of (confidence, accuracy, pairs).
    """
    scores = scores_P2.double().numpy()
    lengths = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs], dtype=float)
    right, difference = scores[:, 0] > scores[:, 1], scores[:, 0] - scores[:, 1]
    low, high = wilson(float(right.mean()), len(right))
    shorter, longer = lengths[:, 0] < lengths[:, 1], lengths[:, 0] > lengths[:, 1]
    bins = calibration(difference)
    margin = torch.tensor([pair.margin for pair in pairs])
    found: dict[str, Any] = {
        "loss": float(reward_loss(scores_P2[:, 0], scores_P2[:, 1], margin).mean()),
        "accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high,
        "margin": float(difference.mean()), "mean_reward": float(scores.mean()),
        "min_reward": float(scores.min()), "max_reward": float(scores.max()),
        "calibration_error": float(sum(n * abs(sure - accurate) for sure, accurate, n in bins) / len(right)),
        "length_correlation": _correlation(scores.ravel(), lengths.ravel()),
    }  # fmt: skip
    found |= {f"accuracy_{name}": float(right[some].mean())
              for name, some in (("shorter", shorter), ("longer", longer)) if some.any()}  # fmt: skip
    return found | {"calibration": bins, "pairs": len(pairs), "pairs_shorter": int(shorter.sum())}


def calibration(difference_P: np.ndarray) -> list[tuple[float, float, int]]:
    """Bins of pairs by how sure the model is of its preference, 0.5 to 1: (mean confidence, share right, pairs)."""
    confidence, right = 1 / (1 + np.exp(-np.abs(difference_P))), difference_P > 0
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return [(float(confidence[some].mean()), float(right[some].mean()), int(some.sum()))
            for some in (place == i for i in range(BINS)) if some.any()]  # fmt: skip


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0
