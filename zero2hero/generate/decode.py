"""The decoding loop: read the prompts once, then one token per sequence and step.

The prompts are read together, padded on the right ("prefill"); their keys and values stay in the cache, so that
each further token costs one step. A sequence that has finished leaves the batch at once, and several samples of
one prompt share its prefill. Since a token's slot in the cache is its position and each sequence draws from its
own random stream, a text does not depend on what else is in the batch.

The loop knows token ids only; text, streaming and stop strings are in text_stream.py.

B sequences in flight, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zero2hero.errors import UserError
from zero2hero.generate.fast import NativeStep, PlainDecoder, prepare
from zero2hero.generate.sampling import SamplingConfig, choose, random_stream
from zero2hero.models.decoder import Decoder
from zero2hero.nn.kv_cache import KVCache


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


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    eos_ids: Collection[int] = (),
    stopped: Callable[[int, int], bool] | None = None,
    embeddings: Sequence[Tensor] | None = None,
) -> Iterator[Token]:
    """Continue each prompt; yield the tokens as they come, step by step, all sequences of a step in turn.

    Args:
        model: a decoder; its weights must not change while the generation runs.
        prompts: token ids. An empty prompt stands for the begin-of-text token alone.
        config: how to sample; see `SamplingConfig`. Its `stop` is not used here.
        eos_ids: tokens that end a sequence; they are yielded too.
        stopped: called with each new (row, token id); True ends that sequence.
        embeddings: [T, D] for each prompt, what is read in place of its ids (where they hold images, say).

    Raises:
        UserError: a prompt longer than the model's context, or with an id that the model does not know.
    """
    config = config or SamplingConfig()
    texts = [checked_prompt(model, prompt, number) for number, prompt in enumerate(prompts)]
    if not texts:
        return
    # The last token of a text is never read, so the context holds one more than there are positions.
    context, copies = model.config.max_position_embeddings, config.num_return_sequences
    left = [min(config.max_new_tokens, context - len(text) + 1) for text in texts for _ in range(copies)]
    streams = [random_stream(config.seed, text, i) for text in texts for i in range(copies)]
    rows = list(range(len(streams)))  # the sequences in flight
    longest = max(len(text) + left[i * copies] - 1 for i, text in enumerate(texts))
    batch = DecoderRows(model, texts, copies, longest, embeddings)
    seen = _seen(model, texts, copies) if config.repetition_penalty != 1.0 else None
    while True:
        ids, logprobs = choose(batch.logits, config, [streams[row] for row in rows], seen)
        finished = []
        for i, (row, token_id, logprob) in enumerate(zip(rows, ids, logprobs)):
            left[row] -= 1
            ended = token_id in eos_ids or (stopped is not None and stopped(row, token_id))
            reason = "stop" if ended else None if left[row] else "length"
            if reason:
                finished.append(i)
            yield Token(row, token_id, logprob, reason)
        order = list(range(len(rows)))  # the rows that stay: a finished row's place is taken by the last one
        for i in reversed(finished):
            order[i] = order[-1]
            order.pop()
        if not order:
            return
        rows, ids = [rows[i] for i in order], [ids[i] for i in order]
        if seen is not None:
            seen = seen[order]
            seen[range(len(ids)), ids] = True
        batch.advance(ids, order)


class DecoderRows:
    """The sequences in flight: their cache, their lengths, and the logits [B, V] of their next tokens."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Decoder,
        prompts: list[list[int]],
        copies: int,
        longest: int,
        embeddings: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.native = model, NativeStep.fits(model)
        alone = self.native and len(prompts) * copies == 1  # then only the prompt is read here: no need to prepare
        self.prepared = PlainDecoder(model) if alone else prepare(model)
        self.step: NativeStep | None = None
        self.device = model.embed_tokens.weight.device
        self.cache = model.make_cache(len(prompts), longest)
        self.lengths = [len(prompt) for prompt in prompts]
        padded = [prompt + [0] * (max(self.lengths) - len(prompt)) for prompt in prompts]
        given = torch.tensor(padded, device=self.device)
        hidden_BTD = self._read(given if embeddings is None else pad_sequence(list(embeddings), batch_first=True))
        last = torch.tensor(self.lengths, device=self.device) - 1
        self.logits = self.prepared.logits(hidden_BTD[torch.arange(len(prompts), device=self.device), last])
        if copies > 1:  # several samples share one prefill
            repeated = [row for row in range(len(prompts)) for _ in range(copies)]
            self.logits = self.logits[repeated]
            self.reorder(repeated)

    @torch.inference_mode()
    def reorder(self, rows: list[int]) -> None:
        """The sequences become these, in this order, possibly repeated: samples share a prompt, beams branch."""
        self.cache.select(torch.tensor(rows, device=self.device))
        self.lengths = [self.lengths[row] for row in rows]

    @torch.inference_mode()
    def advance(self, ids: list[int], order: list[int]) -> None:
        """Keep the sequences `order`, append one token to each, and compute the next logits."""
        if len(order) < len(self.lengths):
            self.lengths = [self.lengths[i] for i in order]
            _keep(self.cache, order)
        self.cache.truncate(max(self.lengths))
        if self.native and len(ids) == 1:
            self.step = self.step or NativeStep(self.model, self.cache)
            self.logits, self.lengths = self.step(ids[0]), [self.lengths[0] + 1]
            return
        ragged = min(self.lengths) < self.cache.end
        positions = torch.tensor(self.lengths, device=self.device)[:, None] if ragged else None
        self.logits = self.prepared.logits(self._read(torch.tensor(ids, device=self.device)[:, None], positions)[:, -1])
        self.lengths = [length + 1 for length in self.lengths]

    def _read(self, ids_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of the next tokens, which enter the cache."""
        with evaluating(self.model):
            return self.prepared(self.model, ids_BT, self.cache, positions)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model writes without dropout, also in the middle of its training."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _keep(cache: KVCache, order: list[int]) -> None:
    """Shrink a cache to the rows `order`; only rows that change their place are copied."""
    for buffers in (cache.keys, cache.values):
        for layer, buffer in enumerate(buffers):
            for place, row in enumerate(order):
                if place != row:
                    buffer[place, :, : cache.end] = buffer[row, :, : cache.end]
            buffers[layer] = buffer[: len(order)]


def _seen(model: Decoder, prompts: list[list[int]], copies: int) -> Tensor:
    """[B, V] bool: the tokens of each prompt."""
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen.repeat_interleave(copies, 0).to(model.embed_tokens.weight.device)


def checked_prompt(model: Decoder, prompt: Sequence[int], number: int) -> list[int]:
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
