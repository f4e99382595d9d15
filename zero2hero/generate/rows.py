"""The next tokens of many texts at once, each by the settings of its own request.

The transformations are those of sampling.py, in the order of transformers; each is applied to the rows that ask for it,
with every row's own numbers. The penalties on tokens that a text already has (`presence_penalty` once,
`frequency_penalty` for each time) are those of the OpenAI API: they count what was written, not the prompt.

R rows (a text with a draft has one more row for each token of it), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.generate import request, sampling


class Row(NamedTuple):
    """A text whose next token is to be chosen, supposing that it goes on with `draft`."""

    sequence: request.Sequence
    draft: list[int]


class History:
    """What a text's settings need to know of its tokens, as vectors over the vocabulary; None if nothing."""

    def __init__(self, sequence: request.Sequence, vocab_size: int, device: torch.device) -> None:
        p = sequence.params
        ids = [*p.logit_bias, *p.stop_token_ids, *(i for words in p.bad_words_ids for i in words)]
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"token id {max(ids)} of logit_bias, stop_token_ids or bad_words_ids: the model knows ids "
                f"0 to {vocab_size - 1}"
            )
        self.bias = self.seen = self.counts = None
        if p.logit_bias:
            self.bias = torch.zeros(vocab_size, device=device)
            self.bias[list(p.logit_bias)] = torch.tensor([float(b) for b in p.logit_bias.values()], device=device)
        if p.repetition_penalty != 1:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[sequence.ids] = True
        if p.presence_penalty or p.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)

    def add(self, token_id: int) -> None:
        """The text has one more token."""
        if self.seen is not None:
            self.seen[token_id] = True
        if self.counts is not None:
            self.counts[token_id] += 1


def choose(logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """The next token of each row of logits [R, V], and its log-probability (nats) under what it was drawn from.

    Raises:
        UserError: the model's logits are not numbers.
    """
    logits = transform(logits, rows)
    tokens = logits.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if not row.sequence.params.greedy]
    if drawn:
        numbers = [rows[i].sequence.number(len(rows[i].draft)) for i in drawn]
        tokens[drawn] = sampling.sample(logits if len(drawn) == len(rows) else logits[drawn], numbers)
    return tokens.tolist(), sampling.picked_logprobs(logits, tokens)


def transform(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits [R, V] of the distributions that are drawn from."""
    params = [row.sequence.params for row in rows]
    logits = _bias(logits, rows)
    logits = _penalize(logits, rows)
    logits = _forbid(logits, rows)
    drawn = [not p.greedy for p in params]
    for function, values, off in (
        (sampling.apply_temperature, [p.temperature for p in params], 1.0),
        (sampling.apply_top_k, [min(p.top_k, logits.shape[-1]) for p in params], 0),
        (sampling.cut_tail, [1 - p.top_p for p in params], 0.0),
        (sampling.apply_min_p, [p.min_p for p in params], 0.0),
    ):
        logits = _where(logits, [draw and value != off for draw, value in zip(drawn, values)], function, values)
    return logits


def _where(logits: Tensor, asked: Sequence[bool], function: Callable[..., Tensor], values: Sequence[Any]) -> Tensor:
    """Apply a function to the rows that ask for it, with a column of their values."""
    chosen = [i for i, yes in enumerate(asked) if yes]
    if not chosen:
        return logits
    column = torch.tensor([values[i] for i in chosen], device=logits.device)[:, None]
    if len(chosen) == len(logits):
        return function(logits, column)
    return logits.index_copy(0, torch.tensor(chosen, device=logits.device), function(logits[chosen], column))


def _bias(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    biases = [(i, bias) for i, row in enumerate(rows) if (bias := row.sequence.history.bias) is not None]
    if not biases:
        return logits
    where = torch.tensor([i for i, _ in biases], device=logits.device)
    return logits.index_add(0, where, torch.stack([bias for _, bias in biases]))


def _penalize(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    asked = [i for i, row in enumerate(rows) if row.sequence.history.seen is not None]
    if asked:
        seen = torch.stack([_with_draft(rows[i].sequence.history.seen, rows[i].draft, "seen") for i in asked])
        penalties = torch.tensor([rows[i].sequence.params.repetition_penalty for i in asked], device=logits.device)
        logits = logits.clone()
        logits[asked] = sampling.apply_repetition_penalty(logits[asked], seen, penalties[:, None])
    asked = [i for i, row in enumerate(rows) if row.sequence.history.counts is not None]
    if asked:
        counts = torch.stack([_with_draft(rows[i].sequence.history.counts, rows[i].draft, "counts") for i in asked])
        both = [(rows[i].sequence.params.presence_penalty, rows[i].sequence.params.frequency_penalty) for i in asked]
        presence, frequency = torch.tensor(both, device=logits.device).T
        logits = logits.clone()
        logits[asked] -= presence[:, None] * (counts > 0) + frequency[:, None] * counts
    return logits


def _with_draft(vector: Any, draft: list[int], kind: str) -> Tensor:
    if draft:
        vector = vector.clone()
        for token_id in draft:
            vector[token_id] = True if kind == "seen" else vector[token_id] + 1
    return vector


def _forbid(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Minus infinity for what may not come next. Where nothing would be left, a constraint alone counts."""
    masks = [(i, matcher.allowed()) for i, row in enumerate(rows) if (matcher := row.sequence.matcher) is not None]
    if masks:
        logits = logits.clone()
        for i, allowed in masks:
            logits[i].masked_fill_(~allowed.to(logits.device), -math.inf)
    pairs = [(i, token_id) for i, row in enumerate(rows) for token_id in _forbidden(row)]
    if pairs:
        left = logits.clone()
        left[[i for i, _ in pairs], [token_id for _, token_id in pairs]] = -math.inf
        logits = torch.where(left.isneginf().all(-1, keepdim=True), logits, left)
    return logits


def _forbidden(row: Row) -> list[int]:
    sequence, p = row.sequence, row.sequence.params
    written = len(sequence.ids) - sequence.prompt_length + len(row.draft)
    found = list(sequence.ends) if written < p.min_new_tokens else []
    if p.bad_words_ids:
        text = sequence.ids[-max(map(len, p.bad_words_ids)) :] + row.draft
        for *beginning, last in p.bad_words_ids:
            if not beginning or text[-len(beginning) :] == beginning:
                found.append(last)
    return found
