"""Assembling tokenizers of the `tokenizers` library, which runs text through a pipeline of five parts.

Normalizer (none here: what comes out must be what went in), pre-tokenizer (text to words), model (words to
tokens: merges, or one token per character), post-processor (adds BOS and EOS), decoder (tokens to text).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from zero2hero.errors import UserError
from zero2hero.tokenizer.patterns import SpecialSplitter, check_vocab_size, documents, split_pattern
from zero2hero.tokenizer.unigram import train_pieces


def byte_level(model: models.Model, pattern: str) -> tokenizers.Tokenizer:
    """A byte-level pipeline around `model`: words by the split pattern called `pattern`, then bytes."""
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern(pattern)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def word_piece(
    model: models.WordPiece, lowercase: bool = True, strip_accents: bool | None = None, chinese_characters: bool = True
) -> tokenizers.Tokenizer:
    """BERT's pipeline around `model`: cleaned (and lower-cased) text, words and punctuation, then pieces.

    `strip_accents` None: as `lowercase` says. `chinese_characters`: each is a word of its own.
    """
    raw = tokenizers.Tokenizer(model)
    raw.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese_characters, strip_accents=strip_accents, lowercase=lowercase
    )
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece("##")
    return raw


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str, special: list[str]) -> tokenizers.Tokenizer:
    """Byte-pair encoding by the library; ids are special tokens, the 256 bytes, merges."""
    check_vocab_size(vocab_size, special)
    raw = byte_level(models.BPE(), pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    split_special = SpecialSplitter(special)
    pieces = (piece for text in documents(texts) for piece in split_special(text)[::2])
    raw.train_from_iterator(_not_empty(pieces), trainer)
    return raw


def train_characters(texts: Iterable[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """One token per character of the text, behind the special tokens, in the order of code points."""
    alphabet = sorted(set().union(*_not_empty(documents(texts))))
    if len(special) + len(alphabet) > vocab_size:
        raise UserError(
            f"the text has {len(alphabet)} different characters; with {len(special)} special tokens that is "
            f"more than vocab_size={vocab_size}. Raise vocab_size, or use kind='bpe'."
        )
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    # An unk_token that is not in the vocabulary makes unknown characters an error instead of a silent gap.
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    raw.decoder = decoders.Fuse()
    return raw


def train_word_piece(texts: Iterable[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """BERT's kind of tokenizer, lower-cased: whole words where they are frequent, pieces (`##ing`) elsewhere.

    The library numbers characters in the order of a hash table, which differs from process to process, and of equally
    frequent pairs merges those of lower numbers. So it is asked twice: for the characters, and, these sorted, again.
    """
    known, texts = special, list(_not_empty(documents(texts)))
    for size in (0, vocab_size):
        raw = word_piece(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
        raw.train_from_iterator(texts, trainer)
        vocab = raw.get_vocab()
        known = [*special, *sorted(vocab.keys() - set(special))]
    finished = word_piece(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    finished.add_special_tokens(special)  # and the characters no longer
    return finished


def train_unigram(texts: Iterable[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """T5's kind: the pieces under which the text is likeliest (tokenizer/unigram.py); a space is written ▁."""
    spaces = [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]
    normalizer = normalizers.Sequence([normalizers.NFKC(), *spaces])
    words: Counter[str] = Counter()
    for text in _not_empty(documents(texts)):
        if normal := normalizer.normalize_str(text):
            words.update(re.findall("▁[^▁]*", f"▁{normal}".replace(" ", "▁")))
    pieces = train_pieces(words, vocab_size - len(special))
    vocab = [(token, 0.0) for token in special] + [piece for piece in pieces if piece[0] not in special]
    raw = tokenizers.Tokenizer(models.Unigram(vocab, special.index("<unk>"), False))
    raw.normalizer = normalizer
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens(special)
    return raw


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise UserError("there is no text to train a tokenizer on: every document is empty.")


def surround(raw: tokenizers.Tokenizer, single: list[str], second: list[str]) -> None:
    """Put special tokens around texts: `single` says how one looks, `second` how another one behind it does.

    As in ["[CLS]", "$A", "[SEP]"] and ["$B:1", "[SEP]:1"]; :1 is the type id.
    """
    used = [word.removesuffix(":1") for word in single + second if not word.startswith("$")]
    raw.post_processor = processors.TemplateProcessing(
        single=single, pair=single + second, special_tokens=[(t, raw.token_to_id(t)) for t in dict.fromkeys(used)]
    )
