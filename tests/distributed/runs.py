"""A small model, ragged data and a trainer, as each rank makes them for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.cache import Corpus
from zero2hero.models import Decoder, init_weights
from zero2hero.train.activation_checkpointing import checkpoint_blocks
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import causal_lm
from zero2hero.train.parallel import ALONE, Ranks
from zero2hero.train.pretrain import causal_data
from zero2hero.train.sharding import parallelize

SHAPE: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "qk_norm": True,
}  # fmt: skip


def ragged_corpus(documents: int = 200) -> Corpus:
    """Documents of 1 to 29 tokens; the next token is mostly one more, so that there is something to learn."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, documents)
    ends = np.cumsum(lengths)
    tokens = np.cumsum(np.where(rng.random(ends[-1]) < 0.8, 1, rng.integers(0, 29, ends[-1]))) % 29
    return Corpus(tokens.astype(np.uint16), np.stack([ends - lengths, ends], 1))


class Record:
    """Stands where a tracker does and keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def log(self, step: int, metrics: Any) -> None:
        if "loss" in metrics:
            self.losses.append(metrics["loss"])
            self.norms.append(metrics["grad_norm"])

    def state_dict(self) -> dict[str, Any]:
        return {}


def make(ranks: Ranks = ALONE, output_dir: Path | None = None, shape: dict[str, Any] | None = None, **settings) -> Any:
    """A trainer whose losses are recorded at every step."""
    defaults: dict[str, Any] = {"max_steps": 20, "learning_rate": 0.001, "logging_steps": 1, "max_length": 16,
                                "per_device_train_batch_size": 8 // ranks.data_size, "warmup_steps": 0}  # fmt: skip
    config = TrainConfig(**defaults | settings)
    model = Decoder(DecoderConfig(**SHAPE | (shape or {})))
    init_weights(model)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    parallelize(model, ranks, config, torch.float32)
    total, data = causal_data(ragged_corpus(), config, torch.device("cpu"), ranks.data_rank, ranks.data_size)
    return Trainer(model, causal_lm, data, config, total, output_dir, ranks=ranks, tracker=Record())  # type: ignore
