"""Generated tokens as text that is safe to show: whole characters, and no part of a stop string.

A stop string may be spread over several tokens, and begin or end inside one. So text that could be its
beginning is held back until more has come; what is given out is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zero2hero.tokenizer import Tokenizer

# tokens of the prompt that a decoder sees first: whether a word starts with a space depends on what precedes it
_CONTEXT = 8


class TextStream:
    """The text of one generated sequence, piece by piece.

    `pieces` holds what was given out; `stopped` says that a stop string was met, and nothing follows.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        from zero2hero.tokenizer import StreamDecoder

        self._decoder = StreamDecoder(tokenizer)
        for token_id in prompt_ids[-_CONTEXT:]:
            self._decoder.push(token_id)
        self._decoder.finish()
        self._stop = tuple(stop)
        self._held = ""
        self.pieces: list[str] = []
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that may now be shown, often the empty string."""
        return self._give(self._decoder.push(token_id))

    def finish(self) -> str:
        """No more tokens will come: the rest of the text."""
        return self._give(self._decoder.finish(), final=True)

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self.pieces)

    def _give(self, new: str, final: bool = False) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first ends the text, however tokens divide it
            end, self.stopped = min(found)[1], True
        else:
            end = len(self._held) - (0 if final else self._possible_beginning())
        piece, self._held = self._held[:end], self._held[end:]
        self.pieces.append(piece)
        return piece

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
