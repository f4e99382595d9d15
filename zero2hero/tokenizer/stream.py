"""Text from tokens as they are generated, never showing half a character.

One character may span several tokens: an emoji is four bytes, and a byte-level vocabulary may know none of
its longer parts. Decoding each token alone would show U+FFFD; decoding everything anew for each token costs
quadratic time. What is correct depends on how the tokenizer spells its tokens:

- *Byte-level* (GPT-2, Llama-3, Qwen): tokens are byte strings, so an incremental UTF-8 decoder is exact: it
  gives out what is complete and keeps at most three bytes.
- *Everything else* (SentencePiece, characters, WordPiece): a token's text depends on what stands before it
  (the first word has no space before it, later ones do), so a token is decoded together with the tokens
  given out just before it, and their text is taken off the front. SentencePiece spells rare characters as
  runs of byte tokens like `<0xE2>`, which are decoded as one piece: such a run is held until it ends.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from zero2hero.tokenizer.patterns import CHAR_TO_BYTE, token_to_bytes

if TYPE_CHECKING:
    from zero2hero.tokenizer.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>").fullmatch


class StreamDecoder:
    """Incremental `tokenizer.decode`: the parts that `push` and `finish` return join to the same text.

    `push` costs the same however long the text has become.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        decoder = str(tokenizer.raw.decoder)  # "Sequence(decoders=[Replace(...), ByteFallback(), ...])"
        self._byte_level = "ByteLevel(" in decoder
        self._byte_fallback = "ByteFallback(" in decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []  # given out already, kept for what they say about the next token
        self._pending: list[int] = []  # not given out yet

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that is now complete, often the empty string."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        if self._byte_level:
            spelled = all(character in CHAR_TO_BYTE for character in token)
            return self._utf8.decode(token_to_bytes(token) if spelled else token.encode())
        self._pending.append(token_id)
        if self._byte_fallback and _BYTE_TOKEN(token):
            return ""
        return self._give_out()

    def finish(self) -> str:
        """The rest: what was held back because more might have come."""
        return self._utf8.decode(b"", final=True) + self._give_out()

    def _give_out(self) -> str:
        if not self._pending:
            return ""
        raw = self._tokenizer.raw
        before = raw.decode(self._context, skip_special_tokens=False)
        text = raw.decode(self._context + self._pending, skip_special_tokens=False)
        self._context, self._pending = self._pending, []
        return text[len(before) :]
