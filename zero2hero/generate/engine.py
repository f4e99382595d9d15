"""The engine: many requests at once, each of any length and settings, joining and leaving at every step.

Continuous batching (Yu et al. 2022, "Orca", OSDI): a step reads one token of every text that is being written, and with
them pieces of the prompts of those that have just come, so that nobody waits for the longest text of a batch. Requests
are served in the order in which they came. Keys and values lie in pages, which texts with the same beginning share
(pages.py): samples of one prompt read it once. A request starts when there is memory for the longest text that it may
become, so nothing that runs is ever put back.

    engine = Engine(lm)
    sequence = engine.submit(Request(ids, SamplingParams(max_new_tokens=64, temperature=0.8, seed=1)))
    while sequence.finish_reason is None:
        for event in engine.step():
            print(event.text, end="")

Every text draws from its own random stream, so the same seed gives the same text whatever else runs. Where
native/decode.c reads the model (a CPU, and a family that it knows) a text's numbers do not depend on the batch, and
this holds to the bit, in fp32 and bf16. Elsewhere rounding depends on the size of the batch: in fp32 by some 1e-6,
which changes a text only where two tokens are as close as that; in bf16 by some hundredths, where it may.

`submit` and `cancel` may be called from any thread, `step` from one at a time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zero2hero.errors import UserError, did_you_mean
from zero2hero.generate import rows
from zero2hero.generate.native_reader import NativeReader
from zero2hero.generate.pages import PAGE, Pages
from zero2hero.generate.reader import Piece, Reader
from zero2hero.generate.request import Event, QueueFull, Request, SamplingParams, Sequence, TokenLogprob, checked_prompt
from zero2hero.generate.rows import Row
from zero2hero.models.decoder import Decoder

if TYPE_CHECKING:
    from zero2hero.generate.decode import Writer
    from zero2hero.generate.speculative import Drafter
    from zero2hero.language_model import LanguageModel

__all__ = ["Engine", "Event", "QueueFull", "Request", "SamplingParams", "Sequence", "TokenLogprob"]

Choice = tuple[int, float, TokenLogprob | None]  # a token, its behaviour log-probability, and what is reported

_MOST_GUESSES = 32  # in a step, of all texts together


class Engine:
    """Writes the texts of many requests.

    Args:
        lm: the model must not change while requests run; after it did, call `forget`.
        max_batch_size: texts written at a time.
        max_cached_tokens: memory for keys and values, in tokens; by default enough for one text of the model's whole
            context and `max_batch_size` of 1,024 tokens.
        prefill_chunk: tokens of prompts read in one step, together.
        max_waiting: requests that wait, at most.
        drafter: guesses tokens ahead; see speculative.py. Texts stay the same, and constrained ones do without.
        adapters: the model's adapters by name, each as a language model with the template and the ends that belong to
            it; a request with an adapter that is not among them ends as the model's own do.
    """

    def __init__(
        self,
        lm: LanguageModel | Writer,
        *,
        max_batch_size: int = 64,
        max_cached_tokens: int | None = None,
        prefill_chunk: int = 256,
        max_waiting: int = 1024,
        drafter: Drafter | None = None,
        adapters: Mapping[str, LanguageModel] | None = None,
    ) -> None:
        self.lm, self.model, self.adapters = lm, lm.model, dict(adapters or {})
        self.context = self.model.config.max_position_embeddings
        self.max_batch_size, self.prefill_chunk, self.max_waiting = max_batch_size, prefill_chunk, max_waiting
        self.drafter = drafter
        if max_cached_tokens is None:
            max_cached_tokens = max(self.context, max_batch_size * min(self.context, 1024)) + PAGE
        self.pages = Pages(self.model, max_cached_tokens)
        self.reader = make_reader(self.model, self.pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._counts = {"steps": 0, "read_tokens": 0, "generated_tokens": 0, "prefix_hits": 0, "finished": 0}
        self._counts |= {"drafted_tokens": 0, "kept_tokens": 0}

    @property
    def counters(self) -> dict[str, int]:
        """How many run and wait; tokens in memory; tokens that a shared beginning saved; totals since the start."""
        cached = self.pages.used * PAGE
        return {"running": len(self.running), "waiting": len(self.waiting), "cached_tokens": cached} | self._counts

    # ---------------------------------------------------------------- coming and going

    def submit(self, request: Request) -> Sequence:
        """Put a request in the queue.

        Raises:
            QueueFull: `max_waiting` requests wait already.
            UserError: a request that cannot be served: a prompt longer than the context or with unknown token ids,
                a text that would not fit into the memory, an unknown adapter.
        """
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests wait already")
        if request.adapter is not None and request.adapter not in self.reader.adapters:
            raise UserError(
                f"unknown adapter '{request.adapter}'.{did_you_mean(request.adapter, self.reader.adapters)}"
            )
        prompt = checked_prompt(self.model, request.prompt_ids, 0)
        if request.embeddings is not None and len(request.embeddings) != len(prompt):
            raise UserError(f"{len(request.embeddings)} embeddings for a prompt of {len(prompt)} tokens")
        # the last token of a text is never read, so the context holds one more than there are positions
        limit = min(request.params.max_new_tokens, self.context - len(prompt) + 1)
        if -(-(len(prompt) + limit) // PAGE) > self.pages.count:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {limit} new ones do not fit into the engine's memory of "
                f"{self.pages.count * PAGE} tokens (max_cached_tokens)"
            )
        sequence = Sequence(request, prompt, limit, self._ends(request), self.lm.tokenizer)
        sequence.history = rows.History(sequence, self.model.config.vocab_size, self.reader.device)
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Stop a text: the next step gives up its memory and reports its end."""
        sequence.cancelled = True

    def forget(self) -> None:
        """The model's weights have changed: no beginning that was read before is used again.

        Raises:
            RuntimeError: texts are being written.
        """
        if self.running:
            raise RuntimeError("the weights changed while texts were being written")
        self.pages.forget()
        self.reader = make_reader(self.model, self.pages)

    def run(self, requests: Iterable[Request]) -> list[Sequence]:
        """Serve these requests to their end; the texts in the order of the requests."""
        left = iter(requests)
        sequences: list[Sequence] = []
        while True:
            room = min(self.max_batch_size, self.max_waiting) - len(self.waiting)
            sequences += [self.submit(request) for request in itertools.islice(left, max(0, room))]
            if not self.waiting and not self.running:
                return sequences
            self.step()

    def wearing(self, adapter: str | None) -> LanguageModel | Writer:
        """The model as it is with this adapter; None: as it is anyway."""
        return self.lm if adapter is None else self.adapters.get(adapter, self.lm)

    def _ends(self, request: Request) -> frozenset[int]:
        """The tokens that end a text. A stop string that is a special token never shows up as text."""
        p, lm = request.params, self.wearing(request.adapter)
        tokenizer = lm.tokenizer
        ends = {tokenizer.token_to_id(stop) for stop in p.stop} & tokenizer.all_special_ids if tokenizer else set()
        return frozenset({*ends, *p.stop_token_ids, *(() if p.ignore_eos else lm.eos_ids)})

    # ---------------------------------------------------------------- a step

    def step(self) -> list[Event]:
        """Take one step with everything that runs.

        Raises:
            UserError: the model's logits are not numbers. What ran is cancelled.
        """
        events = self._drop_cancelled()
        self._admit()
        try:
            work = self._schedule()
            if work:
                logits = self.reader([piece for _, piece in work])
                events += self._advance(work, logits)
        except BaseException:
            for sequence in self.running:
                self._finish(sequence, "cancelled")
            self.running = []
            self.pages.forget()  # some were to be filled in this step
            raise
        self._counts["steps"] += bool(work)
        return events

    def _drop_cancelled(self) -> list[Event]:
        dropped = [s for s in (*self.running, *self.waiting) if s.cancelled]
        for sequence in dropped:
            if sequence in self.running:
                self.running.remove(sequence)
            else:
                self.waiting.remove(sequence)
            self._finish(sequence, "cancelled")
        return [Event(sequence, [], sequence.rest(), [], "cancelled") for sequence in dropped]

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        self.pages.release(sequence.pages)
        sequence.pages = []
        if self.drafter is not None:
            self.drafter.finished(sequence)
        self._counts["finished"] += 1

    def _admit(self) -> None:
        """Start those who wait, in order, as long as there is a place and memory."""
        while self.waiting and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            self._share(sequence)
            needed = -(-(sequence.prompt_length + sequence.limit) // PAGE) - len(sequence.pages)
            if needed > self.pages.available:
                self.pages.release(sequence.pages)
                sequence.pages, sequence.chain, sequence.read = [], [], 0
                return
            sequence.pages += self.pages.take(needed)
            self.running.append(self.waiting.popleft())

    def _schedule(self) -> list[tuple[Sequence, Piece]]:
        """What each text reads in this step: its last token, or a piece of its prompt."""
        budget, work = self.prefill_chunk, []
        for sequence in self.running:
            self._share(sequence)
            left = len(sequence.ids) - sequence.read
            count = min(left, max(budget, 0)) if left > 1 else 1
            if count == 0:
                continue
            if sequence.read < sequence.prompt_length:
                budget -= count
            work.append((sequence, self._piece(sequence, count)))
            if sequence.read < sequence.prompt_length:  # others of this step may share what is read now
                self._know(sequence, min(sequence.read + count, sequence.prompt_length))
        return work

    def _piece(self, sequence: Sequence, count: int) -> Piece:
        start, end, p = sequence.read, sequence.read + count, sequence.params
        ids, vectors, wanted = sequence.ids[start:end], sequence.request.embeddings, int(end == len(sequence.ids))
        if start >= sequence.prompt_length:
            draft, vectors = self._draft(sequence), None
            ids, wanted = ids + draft, 1 + len(draft)
        elif p.prompt_logprobs is not None:
            wanted = count
        vectors = None if vectors is None else vectors[start:end]
        return Piece(ids, start, sequence.pages, wanted, vectors, sequence.request.adapter)

    def _draft(self, sequence: Sequence) -> list[int]:
        """Guesses are for few texts: with many, it is arithmetic that a step costs."""
        left = sequence.limit - (len(sequence.ids) - sequence.prompt_length) - 1
        most = min(left, _MOST_GUESSES // len(self.running))
        if self.drafter is None or sequence.matcher is not None or most < 1:
            return []
        draft = self.drafter.draft(sequence, most)
        self._counts["drafted_tokens"] += len(draft)
        return draft

    def _advance(self, work: list[tuple[Sequence, Piece]], logits: Tensor) -> list[Event]:
        """Choose the next tokens from the logits, and end what has ended."""
        chosen: list[int] = []  # rows of the logits
        texts: list[Row] = []
        writing: list[tuple[Sequence, list[int]]] = []  # with the draft
        events, at = [], 0
        for sequence, piece in work:
            self._counts["read_tokens"] += len(piece.ids)
            if sequence.params.prompt_logprobs is not None and sequence.read < sequence.prompt_length:
                self._score_prompt(sequence, logits[at : at + piece.wanted])
            at += piece.wanted
            sequence.read = min(sequence.read + len(piece.ids), len(sequence.ids))
            if sequence.read < len(sequence.ids):
                continue
            if sequence.limit == 0:
                events.append(Event(sequence, [], "", [], "length"))
                continue
            draft = piece.ids[1:] if piece.start >= sequence.prompt_length else []
            writing.append((sequence, draft))
            chosen += range(at - 1 - len(draft), at)
            texts += [Row(sequence, draft[:count]) for count in range(len(draft) + 1)]
        if writing:
            logits = logits if len(chosen) == len(logits) else logits[chosen]
            tokens, behaviour = rows.choose(logits, texts)
            choices = iter(zip(tokens, behaviour, self._reported(logits, tokens, texts)))
            for sequence, draft in writing:
                events.append(self._write(sequence, draft, list(itertools.islice(choices, len(draft) + 1))))
        for event in events:
            if event.finish_reason:
                self._finish(event.sequence, event.finish_reason)
        self.running = [sequence for sequence in self.running if sequence.finish_reason is None]
        return events

    def _write(self, sequence: Sequence, draft: list[int], choices: list[Choice]) -> Event:
        """Append what was chosen, as long as the draft was that."""
        ids, text, reports = [], "", []
        for guess, (token_id, logprob, report) in zip([*draft, None], choices):
            text += sequence.append(token_id, logprob)
            ids.append(token_id)
            if report is not None:
                reports.append(report)
            sequence.history.add(token_id)
            if sequence.matcher is not None and sequence.finish_reason is None:
                sequence.finish_reason = sequence.matcher.advance(token_id)
                text += sequence.rest() if sequence.finish_reason else ""
            if sequence.finish_reason or token_id != guess:
                break
        kept = len(ids) - 1
        sequence.read += kept
        sequence.logprobs += reports
        if draft and self.drafter is not None:
            self.drafter.learn(sequence, len(draft), kept)
        self._counts["kept_tokens"] += kept
        self._counts["generated_tokens"] += len(ids)
        self._know(sequence, sequence.read)
        return Event(sequence, ids, text, reports, sequence.finish_reason)

    # ---------------------------------------------------------------- log-probabilities

    def _reported(self, logits: Tensor, tokens: list[int], texts: list[Row]) -> list[TokenLogprob | None]:
        """For each row of a text that asks, the chosen token's log-probability under the model."""
        asked = {i: count for i, row in enumerate(texts) if (count := row.sequence.params.logprobs) is not None}
        reports: list[TokenLogprob | None] = [None] * len(texts)
        if asked:
            found = _logprobs(logits[list(asked)], [tokens[i] for i in asked], max(asked.values()))
            for (i, count), report in zip(asked.items(), found):
                reports[i] = report._replace(top=report.top[:count])
        return reports

    def _score_prompt(self, sequence: Sequence, logits: Tensor) -> None:
        """`logits` are those that follow the prompt's tokens `read`, `read` + 1, ..."""
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        following = sequence.ids[sequence.read + 1 : sequence.prompt_length][: len(logits)]
        if following:
            sequence.prompt_logprobs += _logprobs(
                logits[: len(following)], following, sequence.params.prompt_logprobs or 0
            )

    # ---------------------------------------------------------------- shared beginnings

    def _share(self, sequence: Sequence) -> None:
        """Take over pages that others have read, where this text comes to their end; its last token it reads itself."""
        if sequence.params.prompt_logprobs is not None or not self._known_by_ids(sequence):
            return
        while sequence.read % PAGE == 0 and sequence.read + PAGE < sequence.prompt_length:
            found = self.pages.find(self._before(sequence), sequence.ids[sequence.read : sequence.read + PAGE])
            if found is None:
                return
            page, name = found
            number = sequence.read // PAGE
            self.pages.share(page)
            if number < len(sequence.pages):
                self.pages.release([sequence.pages[number]])
            sequence.pages[number : number + 1] = [page]
            sequence.chain.append(name)
            sequence.read += PAGE
            self._counts["prefix_hits"] += PAGE

    def _know(self, sequence: Sequence, end: int) -> None:
        """Make this text's full pages before token `end` known to others."""
        if not self._known_by_ids(sequence):
            return
        while (len(sequence.chain) + 1) * PAGE <= end:
            at = len(sequence.chain)
            ids = sequence.ids[at * PAGE : (at + 1) * PAGE]
            sequence.chain.append(self.pages.know(self._before(sequence), ids, sequence.pages[at]))

    def _known_by_ids(self, sequence: Sequence) -> bool:
        """Whether its ids say all that the model reads: not where vectors, given or learned, stand in their place."""
        return sequence.request.embeddings is None and isinstance(self.model, Decoder)

    def _before(self, sequence: Sequence) -> int | str:
        """The name of the page before: the last one of the chain, or for the first page the adapter's name."""
        return sequence.chain[-1] if sequence.chain else f"adapter {sequence.request.adapter}"


def make_reader(model: Decoder, pages: Pages) -> Reader | NativeReader:
    """The faster of the two that can read this model."""
    return (NativeReader if NativeReader.fits(model) else Reader)(model, pages)


def _logprobs(logits: Tensor, tokens: list[int], count: int) -> list[TokenLogprob]:
    """Log-probability of each row's token, and of the `count` likeliest."""
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (x.tolist() for x in logprobs.topk(min(count, logprobs.shape[-1])))
    tops = [list(zip(*top)) for top in zip(ids, values)]
    return [TokenLogprob(token_id, logprob, top) for token_id, logprob, top in zip(tokens, picked, tops)]
