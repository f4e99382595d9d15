"""How text becomes the raw material of byte-pair encoding: words, and bytes written as characters.

Three small conventions that every byte-level tokenizer of the GPT family shares:

1. *The split pattern.* A merge may never cross a word border, so that `dog`, `dog.` and `dog!` share a
   token. The border is drawn by a regular expression. Three are known to every other tool of the field
   (llama.cpp, for one, accepts no others): GPT-2's, Llama-3's (the same as OpenAI's cl100k) and Qwen2's.
   They differ in three ways: GPT-2 keeps digits of a number together and knows only lower-case
   contractions; Llama-3 cuts numbers into groups of three digits, Qwen2 into single digits.
2. *The alphabet.* Text is handled as UTF-8 bytes, 256 of them, so no text is ever unknown. Files are JSON,
   which cannot hold raw bytes, so GPT-2 writes each byte as one printable character: printable Latin-1
   bytes as themselves, the other 68 (space, newline, ...) shifted up to U+0100..U+0143. A space shows
   as `Ġ`.
3. *Special tokens* are cut out of the text first and never take part in a merge.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (section 2.2); the
`tokenizer.json` files published with GPT-2, Llama-3 and Qwen2.
"""

from __future__ import annotations

from collections.abc import Iterable

import regex

from zero2hero.errors import UserError, did_you_mean

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACE}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS_AND_SPACE}",
}


def split_pattern(name: str) -> str:
    """The regular expression called `name`; `UserError` when there is no such pattern."""
    if name not in PATTERNS:
        raise UserError(f"unknown split pattern '{name}'; known: {', '.join(PATTERNS)}.{did_you_mean(name, PATTERNS)}")
    return PATTERNS[name]


def _byte_characters() -> list[str]:
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = [chr(byte) if byte in printable else "" for byte in range(256)]
    shifted = iter(range(256, 512))
    return [character or chr(next(shifted)) for character in characters]


BYTE_TO_CHAR: list[str] = _byte_characters()
CHAR_TO_BYTE: dict[str, int] = {character: byte for byte, character in enumerate(BYTE_TO_CHAR)}


def bytes_to_token(data: bytes) -> str:
    """A token as files spell it: `b" the"` -> `"Ġthe"`."""
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


def token_to_bytes(token: str) -> bytes:
    """The inverse of `bytes_to_token`; raises `KeyError` for a character that stands for no byte."""
    return bytes(CHAR_TO_BYTE[character] for character in token)


def documents(texts: Iterable[str]) -> Iterable[str]:
    """`texts`, checked one by one: every document must be a string that UTF-8 can hold."""
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        check_text(text, f"document {number}")
        yield text


def check_text(text: object, what: str = "the text") -> None:
    """Raise `UserError` unless `text` is a string of real characters (no lone surrogates)."""
    if not isinstance(text, str):
        raise UserError(f"{what} is of type {type(text).__name__}, not a string; pass str (decode bytes first).")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half a character (the lone surrogate U+{ord(text[error.start]):04X} at index "
            f"{error.start}); it was decoded wrongly: read the file as UTF-8 with errors='replace'."
        ) from None


class SpecialSplitter:
    """Cuts text at special tokens, leftmost first and the longest where several begin at one place."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._regex = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")") if longest_first else None

    def __call__(self, text: str) -> list[str]:
        """Ordinary text at even positions (perhaps empty), special tokens at odd ones."""
        return self._regex.split(text) if self._regex else [text]


def check_special_tokens(special_tokens: Iterable[str]) -> list[str]:
    """The list, after making sure that each is a distinct string that no ordinary token could be."""
    special_tokens = list(special_tokens)
    for token in special_tokens:
        check_text(token, f"special token {token!r}")
        if len(token) < 2:
            raise UserError(f"special token {token!r} is too short to tell from text; use a form like '<|name|>'.")
        if not token.isascii() and all(character in CHAR_TO_BYTE for character in token):
            raise UserError(
                f"special token {token!r} is how files spell the bytes {token_to_bytes(token)!r}; rename it."
            )
        if special_tokens.count(token) > 1:
            raise UserError(f"special token {token!r} is listed twice.")
    return special_tokens


def check_vocab_size(vocab_size: int, special_tokens: list[str]) -> None:
    """A byte-level vocabulary holds the 256 bytes, the special tokens, and more than bytes alone."""
    minimum = max(257, 256 + len(special_tokens))
    if vocab_size < minimum:
        raise UserError(
            f"vocab_size={vocab_size} is too small: a byte-level vocabulary needs at least {minimum} "
            f"(256 bytes + {len(special_tokens)} special tokens; what is above that becomes merges)."
        )
