"""What the engine is asked for and what it gives back: the settings of a text, a request, its state, its events.

Names and meaning of the settings are those of transformers' `GenerationConfig` and of the OpenAI API. All settings
belong to one request; the engine mixes requests of any settings.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.generate.sampling import SamplingConfig, draw_number, random_stream, require_integer, require_number
from zero2hero.generate.text_stream import TextStream
from zero2hero.models.decoder import Decoder

if TYPE_CHECKING:
    from zero2hero.generate.constrained import Constraint, Matcher
    from zero2hero.generate.rows import History
    from zero2hero.tokenizer import Tokenizer


class QueueFull(RuntimeError):
    """More requests wait than the engine takes: try again later."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one text.

    The logits change in this order: logit_bias; repetition_penalty; presence_penalty and frequency_penalty; what is
    forbidden (bad_words_ids, ends before min_new_tokens, what the constraint excludes); temperature; top_k, top_p and
    min_p.

    Attributes:
        max_new_tokens: write at most this many tokens; 0 reads the prompt alone (for its log-probabilities).
        min_new_tokens: no end-of-text token before this many.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens (0: all), and those that tie with the last of them.
        top_p: keep the likeliest tokens that together reach this probability (1: all).
        min_p: keep tokens at least this fraction as likely as the likeliest (0: all).
        repetition_penalty: divide positive logits of tokens in prompt and text by it, multiply negative ones (1: off).
        presence_penalty: taken off the logit of each token that the text so far has.
        frequency_penalty: taken off a token's logit for each time that the text so far has it.
        logit_bias: token id -> what is added to its logit.
        bad_words_ids: sequences of tokens that are not written.
        stop: texts that end the generation; they are not part of the result.
        stop_token_ids: tokens that end it; they are among the ids, not in the text.
        seed: the same seed gives the same text, whatever else runs; None gives a new one each time.
        logprobs: report this many likeliest alternatives of each new token; 0: only the token itself, None: nothing.
        prompt_logprobs: the same for each token of the prompt.
        ignore_eos: the end-of-text token does not end the text.
        constraint: the form that the text must have; see constrained.py.

    Raises:
        UserError: a value out of its range.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        for name in ("max_new_tokens", "min_new_tokens", "top_k"):
            require_integer(name, getattr(self, name), 0)
        for name in ("seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 0)
        require_number("temperature", self.temperature, 0.0, 1e4)
        require_number("top_p", self.top_p, 0.0, 1.0)
        require_number("min_p", self.min_p, 0.0, 1.0)
        require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for name in ("presence_penalty", "frequency_penalty"):
            require_number(name, getattr(self, name), -1e4, 1e4)
        for token_id, bias in self.logit_bias.items():
            require_integer("a token id of logit_bias", token_id, 0)
            require_number(f"logit_bias of {token_id}", bias, -1e4, 1e4)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be one or several texts, none of them empty, not {self.stop!r}")
        for words in self.bad_words_ids:
            if not words:
                raise UserError("bad_words_ids has an empty sequence, which would forbid everything")
        for token_id in (*self.stop_token_ids, *(i for words in self.bad_words_ids for i in words)):
            require_integer("a token id of stop_token_ids or bad_words_ids", token_id, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5  # a number that logits can still be divided by


def params_of(config: SamplingConfig) -> SamplingParams:
    """The same settings for each single text."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens, temperature=0 if config.greedy else config.temperature,
        top_k=config.top_k, top_p=config.top_p, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
        stop=config.stop, seed=config.seed,
    )  # fmt: skip


@dataclass
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt_ids: token ids; an empty prompt stands for the begin-of-text token alone.
        adapter: the name of the adapter that the model wears for this request; None: what it wears anyway.
        sample: the number of this request among samples of one prompt; with one seed each has its own random stream.
        embeddings: [T, D], what is read in place of the prompt's ids (where they hold images, say).
    """

    prompt_ids: abc.Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    sample: int = 0
    embeddings: Tensor | None = None


class TokenLogprob(NamedTuple):
    """A token's log-probability (nats) under the model itself, before any setting, and the likeliest alternatives.

    `top` holds (token id, log-probability), likeliest first.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Sequence:
    """One text in the making: a request's state. Whoever reads it must not change it.

    Attributes:
        ids: the prompt's tokens and those written; `output_ids` has the latter alone.
        text: what was written so far and may be shown: whole characters, no part of a stop string.
        behaviour_logprobs: of each token written, its log-probability (nats) under the distribution it was drawn from,
            after temperature, penalties and cuts: the behaviour policy's, for policy gradients. Greedy: temperature 1.
        logprobs: where asked for, of each token written; `prompt_logprobs` of the prompt's (None for the first).
        finish_reason: "stop" (an end token or stop string), "length", "cancelled"; None while it runs.
    """

    history: History  # see rows.py

    def __init__(
        self, request: Request, prompt: list[int], limit: int, ends: frozenset[int], tokenizer: Tokenizer | None
    ) -> None:
        self.request, self.params = request, request.params
        self.ids, self.prompt_length = prompt, len(prompt)
        self.limit, self.ends = limit, ends
        self.behaviour_logprobs: list[float] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.finish_reason: str | None = None
        self.cancelled = False
        self.stream = TextStream(tokenizer, prompt, self.params.stop) if tokenizer else None
        # what the engine needs
        self.read = 0  # tokens whose keys and values are in the cache
        self.pages: list[int] = []
        self.chain: list[int] = []  # names of the shared pages so far; see pages.py
        self.matcher: Matcher | None = self.params.constraint.start() if self.params.constraint else None
        self._random = random_stream(self.params.seed, prompt, request.sample)
        self._numbers: list[float] = []

    @property
    def output_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]

    @property
    def text(self) -> str:
        return self.stream.text if self.stream else ""

    def number(self, ahead: int) -> float:
        """The random number that the token `ahead` places from now is drawn with: one for each token."""
        while len(self._numbers) <= ahead:
            self._numbers.append(draw_number(self._random))
        return self._numbers[ahead]

    def append(self, token_id: int, behaviour_logprob: float) -> str:
        """One more token; returns the text that may now be shown."""
        self.number(0)
        self._numbers.pop(0)
        self.ids.append(token_id)
        self.behaviour_logprobs.append(behaviour_logprob)
        written = len(self.ids) - self.prompt_length
        piece = self.stream.push(token_id) if self.stream and token_id not in self.ends else ""
        if token_id in self.ends or (self.stream and self.stream.stopped):
            self.finish_reason = "stop"
        elif written == self.limit:
            self.finish_reason = "length"
        return piece + self.rest() if self.finish_reason else piece

    def rest(self) -> str:
        """No more tokens will come: the text that was held back."""
        return self.stream.finish() if self.stream else ""


@dataclass(frozen=True)
class Event:
    """What a step did to one sequence: new tokens (and their log-probabilities, if asked for), new text, its end."""

    sequence: Sequence
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None


def checked_prompt(model: Decoder, prompt: abc.Sequence[int], number: int) -> list[int]:
    """A prompt that the model can read, or a `UserError` that says why not."""
    c = model.config
    ids = list(prompt)
    if not ids:
        eos = c.eos_token_id[0] if isinstance(c.eos_token_id, list) else c.eos_token_id
        start = c.bos_token_id if c.bos_token_id is not None else eos
        if start is None:
            raise UserError("the prompt is empty and this model has no begin-of-text token: give it some text")
        ids = [start]
    if len(ids) > c.max_position_embeddings:
        raise UserError(
            f"prompt {number} has {len(ids)} tokens; the model's context is {c.max_position_embeddings} "
            "(max_position_embeddings). Shorten the prompt."
        )
    if not 0 <= min(ids) <= max(ids) < c.vocab_size:
        raise UserError(
            f"prompt {number} has token id {max(ids) if max(ids) >= c.vocab_size else min(ids)}; the model knows ids "
            f"0 to {c.vocab_size - 1}. Do the tokenizer and the model belong together?"
        )
    return ids
