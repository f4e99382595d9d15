"""Log-probabilities in the two forms of the API, for clients that score texts with them.

A token need not be whole characters: an emoji may be four tokens. So the newer form gives each token's bytes, which
joined are the text, and the older one writes such tokens as `bytes:\\xf0\\x9f`, so that two of them stay two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.patterns import CHAR_TO_BYTE, token_to_bytes

if TYPE_CHECKING:
    from zero2hero.generate.engine import TokenLogprob

LEAST = -9999.0  # what JSON has no number for: a token that cannot come


class TokenSpeller:
    """Token ids as bytes and as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = str(tokenizer.raw.decoder)
        self._byte_level, self._byte_fallback = "ByteLevel(" in decoder, "ByteFallback(" in decoder
        self._begin = tokenizer.raw.decode([0], skip_special_tokens=False)  # before which a word keeps its space

    def bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(character in CHAR_TO_BYTE for character in token):
            return token_to_bytes(token)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        if self._byte_level or token_id in self._tokenizer.all_special_ids:
            return token.encode()
        after = self._tokenizer.raw.decode([0, token_id], skip_special_tokens=False)
        return after.removeprefix(self._begin).encode()

    def text(self, token_id: int) -> str:
        data = self.bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def shown(self, token_id: int) -> str:
        """What the token alone adds to a text that is shown; parts of a character add nothing until it is whole."""
        special = token_id in self._tokenizer.all_special_ids
        return "" if special else self.bytes(token_id).decode(errors="ignore")


def chat_logprobs(speller: TokenSpeller, found: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat completion."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = speller.bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(data)}

    return [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]} for token in found
    ]


def completion_logprobs(
    speller: TokenSpeller, found: Iterable[TokenLogprob | None], offset: int, first: int
) -> dict[str, Any]:
    """`logprobs` of a text completion: four lists with an entry for each token.

    A token is in its own `top_logprobs` under the very number of `token_logprobs`, so that readers can tell whether it
    was the likeliest. The first token of all (id `first`) follows nothing and has no probability. `offset` is how many
    characters came before.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for token in found:
        spelled = speller.text(first if token is None else token.id)
        tokens.append(spelled)
        offsets.append(offset)
        offset += len(speller.shown(first if token is None else token.id))
        logprobs.append(None if token is None else max(token.logprob, LEAST))
        tops.append(None if token is None else {
            speller.text(other): max(logprob, LEAST) for other, logprob in [*token.top, (token.id, token.logprob)]
        })  # fmt: skip
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
