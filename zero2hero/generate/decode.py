"""Token ids from token ids: the engine, for those who need no text.

Text, streaming and stop strings are language_model.py's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from zero2hero.generate.engine import Engine, Event, Request
from zero2hero.generate.pages import PAGE
from zero2hero.generate.request import params_of
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.models.decoder import Decoder
from zero2hero.tokenizer import Tokenizer

if TYPE_CHECKING:
    from zero2hero.language_model import LanguageModel


class Token(NamedTuple):
    """One generated token.

    `row` numbers the sequence: prompt * num_return_sequences + sample. `logprob` is in nats, under the
    distribution it was drawn from. `finish_reason` is set on a sequence's last token: "stop" for an
    end-of-text token or a stop string, "length" when max_new_tokens or the model's context is used up.
    """

    row: int
    id: int
    logprob: float
    finish_reason: str | None


@dataclass(frozen=True)
class Writer:
    """What an engine needs of a language model."""

    model: Decoder
    eos_ids: frozenset[int]
    tokenizer: Tokenizer | None = None


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    eos_ids: Collection[int] = (),
    embeddings: Sequence[Tensor] | None = None,
) -> Iterator[Token]:
    """Continue each prompt; yield the tokens as they come, step by step, all sequences of a step in turn.

    Args:
        model: a decoder; its weights must not change while the generation runs.
        prompts: token ids. An empty prompt stands for the begin-of-text token alone.
        config: how to sample; see `SamplingConfig`. Its `stop` is not used here.
        eos_ids: tokens that end a sequence; they are yielded too.
        embeddings: [T, D] for each prompt, what is read in place of its ids (where they hold images, say).

    Raises:
        UserError: a prompt longer than the model's context, or with an id that the model does not know.
    """
    config = config or SamplingConfig()
    writer = Writer(model, frozenset(eos_ids))
    for event, row in events(writer, prompts, config, embeddings):
        for token_id, logprob in zip(event.token_ids, event.sequence.behaviour_logprobs[-len(event.token_ids) :]):
            yield Token(row, token_id, logprob, event.finish_reason)


def events(
    writer: Writer | LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    embeddings: Sequence[Tensor] | None = None,
) -> Iterator[tuple[Event, int]]:
    """What happens in each step, and to which row, while an engine of just the right size continues the prompts."""
    copies, context = config.num_return_sequences, writer.model.config.max_position_embeddings
    pages = [-(-(max(len(prompt), 1) + min(config.max_new_tokens, context)) // PAGE) for prompt in prompts]
    count = len(prompts) * copies
    engine = Engine(
        writer, max_batch_size=count, max_waiting=count, prefill_chunk=512, max_cached_tokens=sum(pages) * copies * PAGE
    )
    rows: dict[object, int] = {}
    for number, prompt in enumerate(prompts):
        vectors = None if embeddings is None else embeddings[number]
        for sample in range(copies):
            request = Request(prompt, params_of(config), sample=sample, embeddings=vectors)
            rows[engine.submit(request)] = len(rows)
    while engine.waiting or engine.running:
        for event in engine.step():
            yield event, rows[event.sequence]
