"""Text to token ids and back: `Tokenizer` for use, `BPE` to see how it works, `StreamDecoder` for streams."""

from zero2hero.tokenizer.bpe import BPE
from zero2hero.tokenizer.stream import StreamDecoder
from zero2hero.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

__all__ = ["BPE", "SPECIAL_TOKENS", "StreamDecoder", "Tokenizer"]
