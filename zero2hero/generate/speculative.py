"""Guess the next tokens cheaply, and let the model check all guesses in one step.

A step costs the reading of the weights, whether it reads one token of a text or five. So a drafter guesses how the text
goes on, and the model reads the guesses along with the last token. Its logits then say what it would have chosen in
each place; guesses that are what it has chosen are kept, and at the first that is not, its own choice stands. That
choice is drawn with the very number of the text's random stream that it would have been drawn with anyway: so the text
is the same, token by token, as without a drafter, greedy or not. (Leviathan et al. 2023, arXiv 2211.17192, accept a
guess more often, by another rule, but only the distribution is then the same.)

`PromptLookup` guesses that what followed the last few tokens before follows them again (Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding): right where a text copies. `DraftModel` asks a smaller model, which
draws by the text's own settings and random numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from zero2hero.errors import UserError
from zero2hero.generate.request import Sequence

if TYPE_CHECKING:
    from zero2hero.models.decoder import Decoder


class Drafter(Protocol):
    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` tokens that may follow."""

    def learn(self, sequence: Sequence, drafted: int, kept: int) -> None:
        """How many of the drafted tokens were right."""

    def finished(self, sequence: Sequence) -> None:
        """The text has ended."""


class _Known:
    """Where each run of tokens of a text was last followed by something, and how the guesses fared."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}
        self.indexed = self.wait = self.failures = 0
        self.size = 4  # of the next guess


class PromptLookup:
    """Guess what followed the last `max_ngram` (or fewer, at least `min_ngram`) tokens before.

    A guess that was right throughout is followed by one twice as long, up to `num_tokens`; one that was not by one
    hardly longer than what was right. Where guesses fail one after the other, they also become rarer and rarer. So a
    text that copies nothing costs nothing.
    """

    def __init__(self, num_tokens: int = 16, max_ngram: int = 4, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram or num_tokens < 1:
            raise UserError("prompt lookup needs 1 <= min_ngram <= max_ngram and num_tokens of at least 1")
        self.num_tokens, self.max_ngram, self.min_ngram = num_tokens, max_ngram, min_ngram
        self._known: WeakKeyDictionary[Sequence, _Known] = WeakKeyDictionary()

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        known, ids = self._known.setdefault(sequence, _Known()), sequence.ids
        sizes = range(self.max_ngram, self.min_ngram - 1, -1)
        for end in range(max(known.indexed, 1), len(ids)):  # what precedes token `end`
            for size in sizes:
                if size <= end:
                    known.places[tuple(ids[end - size : end])] = end
        known.indexed = len(ids)
        if known.wait:
            known.wait -= 1
            return []
        places = (known.places.get(tuple(ids[-size:])) for size in sizes if size <= len(ids))
        place = next((place for place in places if place is not None), len(ids))
        return ids[place : place + min(most, self.num_tokens, known.size)]

    def learn(self, sequence: Sequence, drafted: int, kept: int) -> None:
        known = self._known[sequence]
        known.failures = 0 if kept else known.failures + 1
        known.wait = min(2**known.failures, 64) if known.failures else 0
        known.size = min(2 * known.size, self.num_tokens) if kept == drafted else kept + 2

    def finished(self, sequence: Sequence) -> None:
        self._known.pop(sequence, None)


class DraftModel:
    """Guess what a smaller model with the same vocabulary writes.

    Args:
        memory: tokens whose keys and values the small model keeps; texts beyond it get no drafts.
    """

    def __init__(self, model: Decoder, num_tokens: int = 4, memory: int = 16384) -> None:
        from zero2hero.generate.engine import make_reader
        from zero2hero.generate.pages import Pages

        self.model, self.num_tokens = model, num_tokens
        self.pages = Pages(model, memory)
        self.reader = make_reader(model, self.pages)
        self._read: dict[Sequence, int] = {}
        self._pages: dict[Sequence, list[int]] = {}

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        from zero2hero.generate.pages import PAGE
        from zero2hero.generate.reader import Piece
        from zero2hero.generate.rows import Row, choose

        most = min(most, self.num_tokens, self.model.config.max_position_embeddings - len(sequence.ids))
        pages, read = self._pages.setdefault(sequence, []), self._read.get(sequence, 0)
        missing = -(-(len(sequence.ids) + most) // PAGE) - len(pages)
        if most < 1 or missing > self.pages.available:
            return []
        pages += self.pages.take(max(missing, 0))
        guesses: list[int] = []
        fresh = sequence.ids[read:]
        while len(guesses) < most:
            logits = self.reader([Piece(fresh, read, pages, 1)])
            read += len(fresh)
            fresh, _ = choose(logits, [Row(sequence, guesses)])
            guesses += fresh
        self._read[sequence] = read
        return guesses

    def learn(self, sequence: Sequence, drafted: int, kept: int) -> None:
        # of what it has read, all but the last `drafted` - 1 tokens was the text itself
        self._read[sequence] += min(kept, drafted - 1) - (drafted - 1)

    def finished(self, sequence: Sequence) -> None:
        self.pages.release(self._pages.pop(sequence, []))
        self._read.pop(sequence, None)
