"""`zero2hero tokenizer train` and `tokenizer encode`."""

from __future__ import annotations

from zero2hero.data.sources import open_source
from zero2hero.options import TokenizerEncodeConfig, TokenizerTrainConfig
from zero2hero.progress import track
from zero2hero.tokenizer import Tokenizer


def train(config: TokenizerTrainConfig) -> None:
    """Train on the text that `config.data` names and save; say how well it compresses."""
    source = open_source(config.data, text_column=config.text_column, on_bad_record=config.on_bad_record)  # type: ignore[arg-type]
    tokenizer = Tokenizer.train(
        track(source, "reading text"), vocab_size=config.vocab_size, pattern=config.pattern, kind=config.kind
    )
    tokenizer.save_pretrained(config.output_dir)
    some = [text for text, _ in zip(source, range(200))]
    tokens = sum(map(len, tokenizer.encode_batch(some, add_special_tokens=False)))
    rate = sum(len(text.encode()) for text in some) / max(1, tokens)
    print(f"{config.output_dir}: {tokenizer.vocab_size} tokens, {rate:.2f} bytes of text per token")


def encode(config: TokenizerEncodeConfig) -> None:
    """One line per token: its id and its text."""
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    ids = tokenizer.encode(config.text)
    for token_id in ids:
        print(f"{token_id:>7}  {tokenizer.decode([token_id], skip_special_tokens=False)!r}")
    print(f"{len(ids)} tokens for {len(config.text.encode())} bytes")
