"""From logits to the next token: common settings, the transformations of the distribution, and the draw.

The engine applies them in rows.py, each row with its own numbers.

Temperature sharpens or flattens; top-k, top-p (nucleus: Holtzman et al. 2020, arXiv 1904.09751) and min-p
(Nguyen et al. 2024, arXiv 2407.01082) cut off the unreliable tail; the repetition penalty (Keskar et al. 2019,
arXiv 1909.05858) makes seen tokens less likely. Names, meaning, order and the treatment of ties are those of
transformers' `GenerationConfig`, so that settings can be carried over.

Every sequence draws from a random stream of its own, one number per token, made from the seed, the prompt and
the number of the sample. So a text depends on nothing else in its batch, on no global state, and on no device.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zero2hero.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How to continue a text.

    Attributes:
        max_new_tokens: generate at most this many tokens.
        do_sample: draw from the distribution, or (False) take the likeliest token. None: temperature > 0.
        temperature: logits are divided by it; 0 means greedy.
        top_k: keep the k likeliest tokens (0: all), and those that tie with the last of them.
        top_p: keep the likeliest tokens that together reach this probability (1: all).
        min_p: keep tokens at least this fraction as likely as the likeliest (0: all).
        repetition_penalty: divide positive logits of tokens seen before by it, multiply negative ones (1: off).
        stop: texts that end the generation; they are not part of the result.
        seed: the same seed gives the same text; None gives a new one each time.
        num_return_sequences: samples per prompt.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        require_integer("max_new_tokens", self.max_new_tokens, 1)
        require_integer("top_k", self.top_k, 0)
        require_integer("num_return_sequences", self.num_return_sequences, 1)
        require_number("temperature", self.temperature, 0.0)
        require_number("top_p", self.top_p, 0.0, 1.0)
        require_number("min_p", self.min_p, 0.0, 1.0)
        require_number("repetition_penalty", self.repetition_penalty, 0.0)
        if self.repetition_penalty == 0:
            raise UserError("repetition_penalty must be greater than 0, not 0 (1 turns it off)")
        if self.seed is not None:
            require_integer("seed", self.seed, 0)
        if self.do_sample not in (None, True, False):
            raise UserError(f"do_sample must be true, false or none, not {self.do_sample!r}")
        if self.do_sample and self.temperature == 0:
            raise UserError("do_sample=True needs a temperature greater than 0; temperature 0 means greedy")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be one or several texts, none of them empty, not {self.stop!r}")
        if self.greedy and self.num_return_sequences > 1:
            raise UserError(
                f"num_return_sequences={self.num_return_sequences} needs sampling: greedy decoding (temperature 0 "
                "or do_sample=False) would give the same text each time"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, rather than one drawn."""
        return not (self.temperature > 0 if self.do_sample is None else self.do_sample)


def require_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")


def require_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or math.isinf(value):  # type: ignore[operator, arg-type]
        allowed = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise UserError(f"{name} must be a number {allowed}, not {value!r}")


# ---------------------------------------------------------------- transformations of logits [B, V]

Number = float | Tensor  # for all rows, or [B, 1]


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: Number) -> Tensor:
    """Make the tokens marked in `seen` [B, V] (prompt and text so far) less likely."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_temperature(logits: Tensor, temperature: Number) -> Tensor:
    """Divide: below 1 the distribution sharpens, above 1 it flattens."""
    return logits / temperature


def apply_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Remove what is less likely than the k-th likeliest token."""
    k = torch.as_tensor(k, device=logits.device).clamp(max=logits.shape[-1])
    values = logits.topk(int(k.max())).values
    threshold = values.gather(-1, (k - 1).expand(*logits.shape[:-1], 1))
    return logits.masked_fill(logits < threshold, -math.inf)


def apply_top_p(logits: Tensor, p: Number) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability exceeds p; always the likeliest."""
    return cut_tail(logits, 1 - p)


def cut_tail(logits: Tensor, share: Number) -> Tensor:
    """Remove the least likely tokens that together have at most this probability; never the likeliest."""
    ascending, order = torch.sort(logits)
    remove = ascending.softmax(-1).cumsum(-1) <= share
    remove[..., -1] = False
    return logits.masked_fill(remove.scatter(-1, order, remove), -math.inf)


def apply_min_p(logits: Tensor, min_p: Number) -> Tensor:
    """Remove what is less than `min_p` times as likely as the likeliest token."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -math.inf)


# ---------------------------------------------------------------- the draw


def random_stream(seed: int | None, prompt: Sequence[int], sample: int) -> random.Random:
    """The random numbers of one sequence; without a seed, new ones each time."""
    return random.Random(secrets.randbits(64) if seed is None else f"{seed} {sample} {list(prompt)}")


def draw_number(stream: random.Random) -> float:
    """A number from 0 to 1, of 24 bits."""
    return stream.getrandbits(24) / 2**24


def sample(logits: Tensor, numbers: Sequence[float]) -> Tensor:
    """Draw a token id for each row of logits [B, V] by inverting its cumulative distribution. -> [B].

    Each row has a number from 0 to 1, of 24 bits at most, so that in fp32 it stays below 1.
    """
    column = torch.tensor(numbers, dtype=torch.float32, device=logits.device)[:, None]
    cumulative = logits.softmax(-1).cumsum(-1)
    # the first token whose cumulative probability is above the number: never one of probability 0
    return torch.searchsorted(cumulative, column * cumulative[:, -1:], right=True)[:, 0]


def picked_logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """The log-probability (nats) of each row's token [B] under the softmax of logits [B, V].

    Raises:
        UserError: the logits are not numbers.
    """
    # NaN may give a token out of range
    picked = tokens[:, None].clamp(max=logits.shape[-1] - 1)
    logprobs = logits.log_softmax(-1).gather(-1, picked)[:, 0].tolist()
    if any(map(math.isnan, logprobs)):
        raise UserError(
            "the model's logits are not numbers (NaN): its weights are damaged or training diverged. Load an "
            "earlier checkpoint, or train again with a lower learning rate."
        )
    return logprobs
