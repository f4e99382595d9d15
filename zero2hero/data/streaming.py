"""Text that fits neither the memory nor the disk twice: tokenized as it is read, never stored, resumed at the record.

    source -> shards -> lanes -> rows
              files     each reads documents of its own, shuffles them in a buffer, and
                        lays them end to end; a step takes the same number of rows from each

Order. The number of lanes depends on the rows of a whole step and on the shards, never on the ranks, and lane l gives
the same rows of every step: so the samples and their order are the same for any number of ranks. A rank reads only the
lanes that its rows come from. (Where ranks outnumber lanes, several read the same one and each keeps its part.)

Balance. A lane begins anew when it has read all that is its own, so lanes must own equal amounts. Shards go to groups
of lanes, as many groups as can be made equal in bytes; within a group of m lanes, every lane reads the group's shards
and takes one of each m successive records. With many equal shards m is 1. With one file, every lane parses it whole
and tokenizes its part: parsing is much the cheaper of the two, and at most 8 lanes are made so.

Shuffling. A buffer is filled with up to 1,000 documents, permuted, emptied, and filled again; each epoch permutes the
shards. All is a function of the seed and of where the buffer begins. So a lane's state is five integers: epoch, place
in the order of shards, and record at which the buffer begins; document in the buffer; token in the document. To resume
is to skip to that record (its shard is parsed from the start), fill the buffer, and go on at that very token.
"""

from __future__ import annotations

import heapq
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from zero2hero.data.batches import Batch, batch_of_rows
from zero2hero.data.cache import CHARACTERS_PER_BATCH, Corpus, encode_documents, is_held_out, sections
from zero2hero.data.files import Document
from zero2hero.data.sources import Shard, Source
from zero2hero.errors import UserError

BUFFER_DOCUMENTS = 1_000  # that a lane holds, or CHARACTERS_PER_BATCH characters if that is less
LANES = 8  # at most where lanes share shards, because each parses them all
MOST_LANES = 64  # at most, because each holds a buffer
UNEQUAL = 1.1  # largest over smallest group of shards, in bytes
SAMPLE_TOKENS = 2_000_000  # of the stream's beginning, that are kept in memory to measure by

Cursor = tuple[int, int, int]  # epoch, place in the epoch's order of shards, record of that shard


class Stream:
    """What all lanes read: shards, which of their documents are trained on, and how these become tokens.

    Args:
        source: what `open_source` gave.
        tokenizer: as for `tokenize_to_cache`.
        validation_fraction: of the documents, where the source has no validation split of its own.
        seed: of the draw of held-out documents, the same as `split_documents` makes.
        skip: pass over a shard that cannot be read (and say so), instead of raising.
    """

    def __init__(
        self, source: Source, tokenizer: Any, validation_fraction: float = 0.05, seed: int = 0, skip: bool = False
    ):
        self.tokenizer, self.seed, self.skip = tokenizer, seed, skip
        self.name = source.name
        self.passed_over: set[str] = set()  # names of shards
        self._sections = [
            (part.shards, {None: validation_fraction, "train": 0.0, "validation": 1.0}[split])
            for part, split in sections(source)
        ]
        parts = [(shard, fraction) for shards, fraction in self._sections for shard in shards if fraction < 1]
        self.shards = [shard for shard, _ in parts]
        self.fractions = [fraction for _, fraction in parts]

    def expect(self, described: list[tuple[str, int | None]]) -> None:
        """Take the shards of an earlier run, (name, bytes) of each: its order of records hangs on them.

        Raises:
            UserError: a shard is missing, new or of another size. With `skip`, a missing one counts as broken, a new
                one is left out, and a changed one is read as it is.
        """
        found = {shard.name: (shard, fraction) for shard, fraction in zip(self.shards, self.fractions)}
        now = {name: shard.size for name, (shard, _) in found.items()}
        was = dict(described)
        faults = [f"{name} is gone" for name in was if name not in now]
        faults += [f"{name} is new" for name in now if name not in was]
        faults += [f"{name} had {was[name]} bytes and has {now[name]}" for name in was
                   if name in now and was[name] != now[name]]  # fmt: skip
        if faults and not self.skip:
            raise UserError(
                f"the data are not those that the run began with: {faults[0]}"
                + f" (and {len(faults) - 1} more)" * (len(faults) > 1)
                + ". The checkpoint is intact: put the data back and resume again, or add --on_bad_record skip to "
                "go on with what is there."
            )
        for fault in faults:
            warnings.warn(f"the data have changed: {fault}; going on with what is there", stacklevel=2)
        parts = [found.get(name, (_missing(name), 0.0)) for name, _ in described]
        self.shards = [Shard(name, shard.records, size) for (name, size), (shard, _) in zip(described, parts)]
        self.fractions = [fraction for _, fraction in parts]

    def read(self, shard: Shard, first: int = 0) -> Iterator[tuple[int, Document]]:
        """(number, document) of a shard, from number `first` on."""
        reached = 0
        try:
            for document in shard.records():
                reached += 1
                if reached > first:
                    yield reached - 1, document
            if reached < first:
                raise UserError(f"{shard.name} ends after {reached} records, but {first} had been read: it was cut")
        except UserError as error:
            place = f"shard {shard.name}, after record {reached}"
            if not self.skip:
                hint = " To go on without this shard, add --on_bad_record skip."
                hint *= "--on_bad_record" not in str(error)  # a record's own error has said so
                raise UserError(f"{str(error).rstrip('.')} ({place}).{hint}") from error
            if shard.name not in self.passed_over:
                self.passed_over.add(shard.name)
                warnings.warn(
                    f"passing over {place}: {error} ({len(self.passed_over)} of {len(self.shards)} shards so far)",
                    stacklevel=2,
                )

    def is_held_out(self, document: Document, fraction: float) -> bool:
        return fraction >= 1 or (fraction > 0 and is_held_out(document[0], fraction, self.seed))

    def encode(self, documents: list[Document]) -> tuple[Corpus, np.ndarray]:
        """Their tokens in memory, framed, and where each stands; without those that the tokenizer makes nothing of."""
        tokens, ends = [np.zeros(0, dtype=np.int32)], [0]
        length = 0
        for ids, ended in encode_documents(documents, self.tokenizer):
            tokens.append(ids.astype(np.int32))
            ends += [length + end for end, _ in ended]
            length += len(ids)
        spans = np.stack([ends[:-1], ends[1:]], axis=1)
        kept = spans[:, 0] < spans[:, 1]
        places = np.array([place for _, place in documents], dtype=object)
        return Corpus(np.concatenate(tokens), spans[kept]), places[kept]

    def sample(self) -> tuple[Corpus, Corpus]:
        """(training, held-out) documents from where each source begins, about SAMPLE_TOKENS, to measure by.

        Training never sees held-out documents, not even those that this sample does not hold.

        Raises:
            UserError: there is none of either.
        """
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        budget = SAMPLE_TOKENS // len(self._sections)
        share = next((fraction for _, fraction in self._sections if 0 < fraction < 1), 0.05)
        for shards, fraction in self._sections:
            if fraction < 1:
                sides[0].extend(self._front(shards, fraction, False, budget))
            if fraction > 0:
                sides[1].extend(self._front(shards, fraction, True, max(1, int(budget * share))))
        for side, what in zip(sides, ("to learn from", "among those held out")):
            if not side:
                raise UserError(
                    f"{self.name} has no document {what}. Streaming is for very much text: leave out --streaming"
                    ", or set another --validation_fraction."
                )
        ends = [np.cumsum([len(document) for document in side]) for side in sides]
        spans = [np.stack([np.append(0, end[:-1]), end], axis=1) for end in ends]
        return Corpus(np.concatenate(sides[0]), spans[0]), Corpus(np.concatenate(sides[1]), spans[1])

    def _front(self, shards: list[Shard], fraction: float, held_out: bool, budget: int) -> list[np.ndarray]:
        documents: list[np.ndarray] = []
        for shard in shards:
            for _, document in self.read(shard):
                if self.is_held_out(document, fraction) == held_out:
                    tokens = self.encode([document])[0].tokens[:budget]
                    documents += [tokens] * bool(len(tokens))
                    budget -= len(tokens)
                    if budget <= 0:
                        return documents
        return documents


def _missing(name: str) -> Shard:
    def records() -> Iterator[Document]:
        raise UserError(f"{name} is gone")

    return Shard(name, records)


# --- lanes --------------------------------------------------------------------------------------------------


class Lane:
    """An endless sequence of tokens: a part of the stream's documents, shuffled, end to end.

    Args:
        stream: what is read.
        shards: indices of the shards that this lane's group reads.
        number: of the lane, for its own order.
        member, members: this lane takes one of each `members` successive records of a shard.
        buffer: documents that are shuffled at a time.
        seed: of the order.
    """

    def __init__(
        self, stream: Stream, shards: list[int], number: int, member: int, members: int, buffer: int, seed: int
    ):
        self.stream, self.shards, self.number, self.member, self.members = stream, shards, number, member, members
        self.buffer_size, self.seed = buffer, seed % 2**64
        self._blocks = self._fill((0, 0, 0))
        self._begin: Cursor = (0, 0, 0)  # of the buffer
        self._buffer: Corpus | None = None
        self._places = np.zeros(0, dtype=object)  # of its documents
        self._document = self._offset = 0  # of the token that is next

    def take(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
        """Tokens and document starts [rows, length + 1], and which documents are in each row.

        The last token of a row is the first of the next.
        """
        need = rows * length + 1
        tokens, starts = np.empty(need, dtype=np.int64), np.zeros(need, dtype=bool)
        records: list[list[str]] = [[] for _ in range(rows)]
        filled = 0
        while filled < need:
            part = self._rest_of_document()[: need - filled]
            tokens[filled : filled + len(part)] = part
            starts[filled] = self._offset == 0
            for row in range(filled // length, min(rows, -(-(filled + len(part)) // length))):
                records[row].append(self._places[self._document])
            filled += len(part)
            self._offset += len(part)
        self._offset -= 1  # the last token is read again
        place = np.arange(rows)[:, None] * length + np.arange(length + 1)
        return tokens[place], starts[place], records

    def _rest_of_document(self) -> np.ndarray:
        while True:
            if self._buffer is not None and self._document < self._buffer.num_documents:
                if len(rest := self._buffer.document(self._document)[self._offset :]):
                    return rest
                self._document, self._offset = self._document + 1, 0
            else:
                self._begin, self._buffer, self._places = next(self._blocks)
                self._document = self._offset = 0

    def state(self) -> list[int]:
        """Epoch, place in the order of shards, record; document of the buffer that begins there; token."""
        return [*self._begin, self._document, self._offset]

    def load_state(self, state: list[int]) -> None:
        epoch, place, record, document, offset = state
        self._blocks = self._fill((epoch, place, record))
        self._begin, self._buffer, self._places = next(self._blocks)
        self._document, self._offset = document, offset
        lengths = self._buffer.spans[:, 1] - self._buffer.spans[:, 0]
        there = (document, offset) == (0, 0) or (document < len(lengths) and offset < lengths[document])
        if not there and not self.stream.skip:
            raise UserError(
                f"lane {self.number} had read further in {self.stream.name} than there is now: the data have changed "
                "since the checkpoint. Put them back, or start a new run."
            )

    def _fill(self, begin: Cursor) -> Iterator[tuple[Cursor, Corpus, np.ndarray]]:
        """(where it begins, permuted documents, where they stand) of buffer after buffer; none spans two epochs."""
        while True:
            found = begin[1:] != (0, 0)
            documents: list[Document] = []
            characters = 0
            for behind, document in self._epoch(*begin):
                documents.append(document)
                characters += len(document[0])
                if len(documents) == self.buffer_size or characters >= CHARACTERS_PER_BATCH:
                    block, documents, characters = self._permuted(documents, begin), [], 0
                    yield begin, *block
                    begin, found = behind, True
            if documents:
                block, documents = self._permuted(documents, begin), []
                yield begin, *block
            elif not found and self.stream.passed_over and len(self.shards) < len(self.stream.shards):
                self.shards = list(range(len(self.stream.shards)))  # all that is its own is broken: help the others
            elif not found:
                raise UserError(
                    f"too little text to stream: lane {self.number} of {self.stream.name} found no document to learn "
                    "from. Leave out --streaming, or train with fewer rows a step."
                )
            begin = (begin[0] + 1, 0, 0)

    def _epoch(self, epoch: int, place: int, record: int) -> Iterator[tuple[Cursor, Document]]:
        """This lane's training documents of an epoch from there on, each with where the next one is looked for."""
        order = np.random.default_rng([self.seed, self.number, epoch]).permutation(self.shards).tolist()
        for here in range(place, len(order)):
            shard = order[here]
            for number, document in self.stream.read(self.stream.shards[shard], record if here == place else 0):
                # rounds of `members` records are dealt out one to a lane, beginning with another lane each time
                turn = zlib.crc32(b"%d %d" % (shard, number // self.members))
                mine = (number + turn) % self.members == self.member
                if mine and not self.stream.is_held_out(document, self.stream.fractions[shard]):
                    yield (epoch, here, number + 1), document

    def _permuted(self, documents: list[Document], begin: Cursor) -> tuple[Corpus, np.ndarray]:
        corpus, places = self.stream.encode(documents)
        order = np.random.default_rng([self.seed, self.number, *begin]).permutation(corpus.num_documents)
        return Corpus(corpus.tokens, corpus.spans[order]), places[order]


def arrange(sizes: Sequence[int | None], rows: int) -> tuple[int, list[list[int]]]:
    """(number of lanes, shards of each group of lanes) for a step of `rows` rows; see the top of this file.

    Lanes divide the rows and groups the lanes. Shards whose size is not known count as equal.
    """
    most = max(LANES, min(len(sizes), MOST_LANES))
    lanes = max(n for n in range(1, most + 1) if rows % n == 0)
    known = [size for size in sizes if size is not None]
    weights = [size or 0 for size in sizes] if len(known) == len(sizes) else [1] * len(sizes)
    largest_first = sorted(range(len(sizes)), key=lambda shard: (-weights[shard], shard))
    for count in (n for n in range(lanes, 0, -1) if lanes % n == 0):
        groups: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, group) for group in range(count)]
        for shard in largest_first:
            load, group = heapq.heappop(loads)
            groups[group].append(shard)
            heapq.heappush(loads, (load + weights[shard], group))
        if all(groups) and max(loads)[0] <= UNEQUAL * min(loads)[0]:
            break
    return lanes, [sorted(group) for group in groups]


# --- batches ------------------------------------------------------------------------------------------------


class StreamingBatches:
    """step -> the micro-batches of that step for this rank, as `Trainer` takes them.

    A step has batch_size * accumulation * world_size rows in all, and rank r has the r-th part of them. Which rows a
    step has depends on that product alone. Steps are quick one after the other; any other step is reached by reading
    on from the beginning, or at once by `load_state_dict`.

    Args:
        stream: the documents.
        max_length: T, inputs per row.
        batch_size: B, rows of a micro-batch at max_length.
        accumulation: micro-batches of a step on each rank.
        seed: of the order.
        document_mask: see `Batches`.
        rank, world_size: which part of each step is made here.
        length_of: step -> row length, where it changes on the way; rows then grow so that the tokens stay the same.
        prepare: what is done to each batch at last (move it to a device).
        buffer: documents that each lane shuffles at a time.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        max_length: int,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        document_mask: bool = True,
        rank: int = 0,
        world_size: int = 1,
        length_of: Callable[[int], int] | None = None,
        prepare: Callable[[Batch], Any] = lambda batch: batch,
        buffer: int = BUFFER_DOCUMENTS,
    ):
        self.stream, self.max_length, self.batch_size, self.accumulation = stream, max_length, batch_size, accumulation
        self.seed, self.document_mask, self.buffer = seed, document_mask, buffer
        self.rank, self.world_size = rank, world_size
        self.length_of, self.prepare = length_of or (lambda step: max_length), prepare
        self.rows = batch_size * accumulation * world_size
        self._start()

    def _start(self) -> None:
        self.step = 0
        self.num_lanes, groups = arrange([shard.size for shard in self.stream.shards], self.rows)
        members = self.num_lanes // len(groups)
        per_lane, own = self.rows // self.num_lanes, self.rows // self.world_size
        self.lanes = {
            number: Lane(
                self.stream, groups[number // members], number, number % members, members, self.buffer, self.seed
            )
            for number in range(self.rank * own // per_lane, -(-(self.rank + 1) * own // per_lane))
        }

    def __call__(self, step: int) -> list[Any]:
        if step < self.step:
            self._start()
        while True:
            batches = self._next()
            if self.step > step:
                return batches

    def _next(self) -> list[Any]:
        length = self.length_of(self.step)
        size = self.batch_size * self.max_length // length
        own = size * self.accumulation
        per_lane = own * self.world_size // self.num_lanes
        try:
            parts = [lane.take(per_lane, length) for lane in self.lanes.values()]
        except UserError as error:
            if self.step == 0:
                raise
            hint = "The last checkpoint is intact, and --resume goes on from it."
            raise UserError(f"step {self.step + 1}: {error} {hint}") from error
        self.step += 1
        skipped = self.rank * own - min(self.lanes) * per_lane  # rows of the first lane that are another rank's
        tokens, starts = (np.concatenate(arrays)[skipped:] for arrays in list(zip(*parts))[:2])
        records = list(chain.from_iterable(names for _, _, names in parts))[skipped:]
        cuts = [slice(first, first + size) for first in range(0, own, size)]
        batches = [batch_of_rows(tokens[cut], starts[cut], self.document_mask, records[cut]) for cut in cuts]
        return [self.prepare(batch) for batch in batches]

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the step that is next, and where each lane of this rank stands."""
        return {
            "step": self.step,
            "rows": self.rows,
            "shards": [[shard.name, shard.size] for shard in self.stream.shards],
            "lanes": {str(number): lane.state() for number, lane in self.lanes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; on another number of ranks, give what `merge_states` made.

        Where the state says nothing of a lane that is read here, the step is reached from the beginning instead.

        Raises:
            UserError: steps have another number of rows now, or the data have changed.
        """
        if state["rows"] != self.rows:
            raise UserError(
                f"the checkpoint's steps have {state['rows']} rows and this run's {self.rows}: set "
                f"per_device_train_batch_size x gradient_accumulation_steps x ranks to {state['rows']}."
            )
        self.stream.expect([(name, size) for name, size in state["shards"]])
        self._start()
        if unknown := [number for number in self.lanes if str(number) not in state["lanes"]]:
            warnings.warn(
                f"the checkpoint does not say where lane {unknown[0]} of the data stands; reading on from the "
                "beginning to there, which gives the same but takes its time",
                stacklevel=2,
            )
            return
        for number, lane in self.lanes.items():
            lane.load_state(state["lanes"][str(number)])
        self.step = state["step"]


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state that every rank can load, whatever their number, from those of all ranks at the same step."""
    if len({state["step"] for state in states}) != 1:
        raise ValueError(f"states of different steps: {sorted({state['step'] for state in states})}")
    return states[0] | {"lanes": {number: place for state in states for number, place in state["lanes"].items()}}
