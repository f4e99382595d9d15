"""The shapes of the models that are not decoders. Like config.py, without torch: a command line can show them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from zero2hero.config import NO_OPTION, _at_least, _below, _one_of
from zero2hero.errors import UserError

TASKS = ("features", "masked_lm", "sequence_classification", "token_classification", "question_answering")
PLAIN_ACTIVATIONS = ("gelu", "gelu_new", "relu", "relu2", "silu")


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder and the task of its head. Names are those of Hugging Face configurations."""

    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 192  # width of the residual stream
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    intermediate_size: int = 0  # width of the feed-forward; 0: four times hidden_size
    max_position_embeddings: int = 512  # rows of the table of positions
    position_offset: int = 0  # the row of the first token (RoBERTa: 2)
    type_vocab_size: int = 2  # kinds of segments
    norm_eps: float = 1e-12
    feedforward: str = "gelu"  # gelu, gelu_new, relu, relu2, silu
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # none: as hidden_dropout_prob
    initializer_range: float = 0.02  # standard deviation of the first weights
    task: str = "masked_lm"
    """What the head is for: features, masked_lm, sequence_classification, token_classification, question_answering"""
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"}, metadata=NO_OPTION)
    bos_token_id: int | None = field(default=None, metadata=NO_OPTION)
    eos_token_id: int | None = field(default=None, metadata=NO_OPTION)
    pad_token_id: int | None = field(default=None, metadata=NO_OPTION)
    model_type: str | None = field(default=None, metadata=NO_OPTION)  # the family that it was read from
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)  # fields that change no mathematics

    def __post_init__(self) -> None:
        _at_least(self, 1, "hidden_size", "num_hidden_layers", "num_attention_heads", "type_vocab_size")
        _at_least(self, 0, "vocab_size", "intermediate_size", "norm_eps", "hidden_dropout_prob", "initializer_range",
                  "attention_probs_dropout_prob", "position_offset")  # fmt: skip
        _at_least(self, self.position_offset + 1, "max_position_embeddings")
        _below(self, 1, "hidden_dropout_prob", "attention_probs_dropout_prob")
        _one_of(self, "feedforward", PLAIN_ACTIVATIONS)
        _one_of(self, "task", TASKS)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise UserError(f"id2label names the labels 0, 1, 2, ..., not {sorted(self.id2label)}")

    def derived(self) -> EncoderConfig:
        """The same configuration with nothing left at 0: what a model is built from."""
        return dataclasses.replace(self, intermediate_size=self.intermediate_size or 4 * self.hidden_size)

    @property
    def longest(self) -> int:
        """Tokens that a text may have."""
        return self.max_position_embeddings - self.position_offset
