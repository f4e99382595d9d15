"""Beam search: keep the few likeliest texts at every step, and in the end choose the best that is finished.

The search goes back to speech recognition (Lowerre 1976); for translation it is the usual way to write (Sutskever et
al. 2014, arXiv 1409.3215). At each step every beam is continued by every token, and the likeliest `num_beams`
continuations that have not ended live on. Those that end compete by log-probability / length ** length_penalty (Wu et
al. 2016, arXiv 1609.08144, in a simpler form): 0 compares whole texts, 1 means per token, more favours long texts.
Which ends compete and when the search stops is as in transformers, so that the texts and scores are the same.

Works for decoders and encoder-decoders alike. With one beam it is greedy decoding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.generate.fast import prepare
from zero2hero.generate.reader import evaluating
from zero2hero.generate.request import checked_prompt
from zero2hero.models.decoder import Decoder
from zero2hero.models.encoder_decoder import EncoderDecoder


class Hypothesis(NamedTuple):
    """A finished text: the tokens written, the end token included where there is one, and what it competes by."""

    ids: list[int]
    score: float


class Rows(Protocol):
    """Sequences in flight: the logits [B, V] of their next tokens, and the two ways in which they change."""

    logits: Tensor

    def reorder(self, rows: list[int]) -> None: ...

    def advance(self, ids: list[int]) -> None: ...


def beam_search(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 64,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    eos_ids: Collection[int] = (),
    min_new_tokens: int = 0,
    no_repeat_ngram_size: int = 0,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt (for an encoder-decoder: answers to each source), best first.

    Args:
        early_stopping: True stops a search when it has `num_beams` finished texts. False also asks that no beam has,
            at its present length, a better score than the worst of them; "never" asks it at every length to come.
        eos_ids: tokens that end a text.
        min_new_tokens: no text ends before it has so many.
        no_repeat_ngram_size: no so many tokens in a row come twice, the prompt of a decoder (or the start token of an
            encoder-decoder) included; 0: they may.

    Raises:
        UserError: a setting out of its range, or a prompt that the model cannot read.
    """
    _check(num_beams, max_new_tokens, early_stopping, num_return_sequences)
    if min_new_tokens < 0 or no_repeat_ngram_size < 0:
        raise UserError(
            f"min_new_tokens and no_repeat_ngram_size are 0 or more, not {min_new_tokens} and {no_repeat_ngram_size}"
        )
    if not prompts:
        return []
    rows: Rows
    if isinstance(model, EncoderDecoder):
        limits = [_limit(model, max_new_tokens)] * len(prompts)
        texts = [[model.config.decoder_start_token_id]] * len(prompts)
        rows = EncoderDecoderRows(model, prompts, limits[0])
    else:
        texts = [checked_prompt(model, prompt, number) for number, prompt in enumerate(prompts)]
        context = model.config.max_position_embeddings
        limits = [min(max_new_tokens, context - len(text) + 1) for text in texts]
        rows = DecoderRows(model, texts, max(len(text) + limit - 1 for text, limit in zip(texts, limits)))
    early = early_stopping if num_beams > 1 else True
    searches = [
        _Search(num_beams, limit, length_penalty, early, frozenset(eos_ids), min_new_tokens, no_repeat_ngram_size, text)
        for limit, text in zip(limits, texts)
    ]
    _run(rows, searches, num_beams)
    return [search.finished[:num_return_sequences] for search in searches]


def _run(rows: Rows, searches: list[_Search], num_beams: int) -> None:
    """Advance all searches together until each is done."""
    vocab_size, beams = rows.logits.shape[1], 1  # all beams of a search begin as one
    candidates = max(2, 1 + len(searches[0].eos_ids)) * num_beams  # so many that num_beams of them have not ended
    if vocab_size < candidates:
        raise UserError(f"num_beams {num_beams} needs a vocabulary of at least {candidates} tokens, not {vocab_size}")
    live = searches
    while True:
        logprobs = torch.log_softmax(rows.logits.float(), -1).view(len(live), beams, vocab_size)
        for i, search in enumerate(live):
            for beam, (ids, _) in enumerate(search.beams):
                if forbidden := search.forbidden(ids):
                    logprobs[i, beam, forbidden] = -torch.inf
        scores = torch.tensor([[score for _, score in search.beams] for search in live], device=logprobs.device)
        values, places = (logprobs + scores[:, :, None]).view(len(live), -1).topk(candidates)
        parents: list[int] = []  # the row that each beam continues
        for i, (search, best, place) in enumerate(zip(live, values.tolist(), places.tolist())):
            found = search.advance([(s, *divmod(p, vocab_size)) for s, p in zip(best, place)])
            parents += [] if search.done else [i * beams + beam for beam in found]
        live = [search for search in live if not search.done]
        if not live:
            return
        if parents != list(range(len(rows.logits))):
            rows.reorder(parents)
        rows.advance([ids[-1] for search in live for ids, _ in search.beams])
        beams = num_beams


class _Search:
    """The beams of one prompt, as (tokens, log-probability), and the texts that have ended, best first."""

    def __init__(
        self, num_beams: int, limit: int, length_penalty: float, early_stopping: bool | str, eos_ids: frozenset[int],
        min_new_tokens: int, no_repeat_ngram_size: int, before: list[int],
    ) -> None:  # fmt: skip
        self.num_beams, self.limit, self.length_penalty = num_beams, limit, length_penalty
        self.early_stopping, self.eos_ids = early_stopping, eos_ids
        self.min_new_tokens, self.no_repeat_ngram_size, self.before = min_new_tokens, no_repeat_ngram_size, before
        self.beams: list[tuple[list[int], float]] = [([], 0.0)]
        self.finished: list[Hypothesis] = []
        self.done = False

    def advance(self, candidates: list[tuple[float, int, int]]) -> list[int]:
        """Take one step; `candidates` are (log-probability, beam, token), best first.

        Returns:
            The beam that each of the new beams continues.
        """
        length = len(self.beams[0][0]) + 1
        beams: list[tuple[list[int], float]] = []
        parents: list[int] = []
        for rank, (score, beam, token) in enumerate(candidates):
            if token not in self.eos_ids and length < self.limit:
                if len(beams) < self.num_beams:
                    beams.append(([*self.beams[beam][0], token], score))
                    parents.append(beam)
            elif rank < self.num_beams:  # an end that is not among the best is no candidate for the final choice
                self.finished.append(Hypothesis([*self.beams[beam][0], token], score / length**self.length_penalty))
        self.finished = sorted(self.finished, key=lambda text: -text.score)[: self.num_beams]
        self.beams = beams
        self.done = length == self.limit or (len(self.finished) == self.num_beams and not self._can_improve(length))
        return parents

    def forbidden(self, ids: list[int]) -> list[int]:
        """Tokens that may not follow a beam: an end that comes too early, and what would repeat an n-gram."""
        found = set(self.eos_ids) if len(ids) < self.min_new_tokens else set()
        if n := self.no_repeat_ngram_size:
            whole = self.before + ids
            last = whole[len(whole) - n + 1 :]
            found |= {whole[i + n - 1] for i in range(len(whole) - n + 1) if whole[i : i + n - 1] == last}
        return sorted(found)

    def _can_improve(self, length: int) -> bool:
        if self.early_stopping is True:
            return False
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.limit
        return self.beams[0][1] / length**self.length_penalty > self.finished[-1].score


class DecoderRows:
    """The texts that a decoder is writing: their cache, their lengths, and the logits [B, V] of their next tokens."""

    @torch.inference_mode()
    def __init__(self, model: Decoder, prompts: list[list[int]], longest: int) -> None:
        self.model, self.prepared = model, prepare(model)
        self.device = model.embed_tokens.weight.device
        self.cache = model.make_cache(len(prompts), longest)
        self.lengths = [len(prompt) for prompt in prompts]
        padded = [prompt + [0] * (max(self.lengths) - len(prompt)) for prompt in prompts]
        hidden_BTD = self._read(torch.tensor(padded, device=self.device))
        last = torch.tensor(self.lengths, device=self.device) - 1
        self.logits = self.prepared.logits(hidden_BTD[torch.arange(len(prompts), device=self.device), last])

    @torch.inference_mode()
    def reorder(self, rows: list[int]) -> None:
        """The texts become these, in this order, possibly repeated."""
        self.cache.select(torch.tensor(rows, device=self.device))
        self.lengths = [self.lengths[row] for row in rows]

    @torch.inference_mode()
    def advance(self, ids: list[int]) -> None:
        """Append one token to each text and compute the next logits."""
        self.cache.truncate(max(self.lengths))
        ragged = min(self.lengths) < self.cache.end
        positions = torch.tensor(self.lengths, device=self.device)[:, None] if ragged else None
        self.logits = self.prepared.logits(self._read(torch.tensor(ids, device=self.device)[:, None], positions)[:, -1])
        self.lengths = [length + 1 for length in self.lengths]

    def _read(self, ids_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of the next tokens, which enter the cache."""
        with evaluating(self.model):
            return self.prepared(self.model, ids_BT, self.cache, positions)


class EncoderDecoderRows:
    """The texts that an encoder-decoder is writing: their sources, cache, and next logits."""

    @torch.inference_mode()
    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]], limit: int) -> None:
        self.model, self.device = model, model.embed_tokens.weight.device
        known = model.config.source_vocab_size or model.config.vocab_size
        for number, source in enumerate(sources):
            if not source or not 0 <= min(source) <= max(source) < known:
                raise UserError(f"source {number} should be token ids from 0 to {known - 1}, not {list(source)[:8]}")
        longest = max(map(len, sources))
        ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sources], device=self.device)
        lengths = torch.tensor([len(s) for s in sources], device=self.device)
        mask = torch.arange(longest, device=self.device) < lengths[:, None]
        with evaluating(model):
            self.source = model.encode(ids, None if bool(mask.all()) else mask.long())
        self.cache = model.make_cache(len(sources), limit)
        self.advance([model.config.decoder_start_token_id] * len(sources))

    @torch.inference_mode()
    def reorder(self, rows: list[int]) -> None:
        """The texts become these, in this order, possibly repeated."""
        chosen = torch.tensor(rows, device=self.device)
        self.source = self.source.select(chosen)
        self.cache.select(chosen)

    @torch.inference_mode()
    def advance(self, ids: list[int]) -> None:
        """Append one token to each text and compute the next logits."""
        with evaluating(self.model):
            hidden = self.model.decode(torch.tensor(ids, device=self.device)[:, None], self.source, self.cache)
            self.logits = self.model.logits(hidden[:, -1])


def _limit(model: EncoderDecoder, max_new_tokens: int) -> int:
    c = model.config
    return min(max_new_tokens, c.max_position_embeddings) if c.position == "sinusoidal" else max_new_tokens


def _check(num_beams: int, max_new_tokens: int, early_stopping: bool | str, num_return_sequences: int) -> None:
    if num_beams < 1 or max_new_tokens < 1:
        raise UserError(f"num_beams and max_new_tokens are at least 1, not {num_beams} and {max_new_tokens}")
    if early_stopping not in (True, False, "never"):
        raise UserError(f"early_stopping is True, False or 'never', not {early_stopping!r}")
    if not 1 <= num_return_sequences <= num_beams:
        raise UserError(f"num_return_sequences is from 1 to num_beams, {num_beams}, not {num_return_sequences}")
