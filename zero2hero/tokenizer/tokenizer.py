"""The tokenizer that everything here uses: text to ids and back, saved the way that others read.

The work is done by the `tokenizers` library; this file decides what it should do. Three decisions matter:

- *One BOS.* `encode` adds the begin-of-text token through the post-processor stored in `tokenizer.json`, so
  that every reader of the file adds the same one, once. `add_bos_token` in `tokenizer_config.json` changes
  nothing: transformers 5 ignores it too where there is a `tokenizer.json`.
- *Text is text.* With `split_special_tokens=True` the name of a special token inside a document is ordinary
  text; training data is encoded so, or else a web page that mentions `<|im_end|>` would end a turn.
- *The file is the tokenizer.* Nothing is truncated or padded behind the caller's back, and the class name
  written to `tokenizer_config.json` is `PreTrainedTokenizerFast`: transformers (4 and 5) then takes
  `tokenizer.json` as it is, where the names of model-specific classes make it rebuild the pipeline.

Formats: https://huggingface.co/docs/tokenizers and the `tokenizer_config.json` of published models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from zero2hero.config import TOKENIZER_KINDS
from zero2hero.errors import UserError, did_you_mean
from zero2hero.io import atomic_write
from zero2hero.tokenizer.bpe import BPE
from zero2hero.tokenizer.build import byte_level, surround, train_bpe, train_characters, train_unigram, train_word_piece
from zero2hero.tokenizer.chat import Message, render
from zero2hero.tokenizer.files import read_tokenizer_files
from zero2hero.tokenizer.patterns import bytes_to_token, check_special_tokens, check_text

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>")  # ids 0 to 4
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
SENTINELS = 100  # <extra_id_0> ...: what stands for a removed span in T5's training


class Tokenizer:
    """A trained tokenizer. Make one with `train`, `from_bpe` or `from_pretrained`.

    `config` is what `tokenizer_config.json` holds (the roles of special tokens among it), `chat_template`
    the Jinja source of the chat format, if there is one.
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        raw.no_truncation()  # files published by others may truncate or pad: a silent loss of text
        raw.no_padding()
        self.raw = raw
        self.config = dict(config or {})
        self.chat_template = chat_template
        _add_missing_special_tokens(raw, self.config)

    # ---------------------------------------------------------------- making one

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 4096,
        pattern: str = "llama3",
        kind: str = "bpe",
        special_tokens: Sequence[str] | None = None,
        *,
        bos_token: str | None = BOS,
        eos_token: str | None = EOS,
        pad_token: str | None = PAD,
    ) -> Tokenizer:
        """Learn a tokenizer from documents.

        `kind="bpe"`: byte-level, so every text can be encoded; `vocab_size` counts special tokens and bytes.
        `kind="char"`: one token per character seen; other characters raise `UserError` when encoded.
        `kind="wordpiece"`: as BERT's, lower-cased; `kind="unigram"`: as T5's, with its 100 sentinels. Both bring
        special tokens of their own.
        `special_tokens` take the first ids, `SPECIAL_TOKENS` by default; a role whose token is not among
        them is left empty. Raises `UserError` for settings or documents that cannot work.
        """
        if kind in ("wordpiece", "unigram"):
            if special_tokens is not None:
                raise UserError(f"kind='{kind}' has special tokens of its own; leave special_tokens out")
            return (
                cls._train_like_bert(texts, vocab_size)
                if kind == "wordpiece"
                else cls._train_like_t5(texts, vocab_size)
            )
        special = check_special_tokens(SPECIAL_TOKENS if special_tokens is None else special_tokens)
        roles = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        config = {role: token for role, token in roles.items() if token in special}
        for role, token in roles.items():
            if token not in (None, BOS, EOS, PAD) and token not in special:
                raise UserError(f"{role}={token!r} is not among special_tokens {special}.")
        if kind == "bpe":
            raw = train_bpe(texts, vocab_size, pattern, special)
        elif kind == "char":
            raw = train_characters(texts, vocab_size, special)
        else:
            known = ", ".join(TOKENIZER_KINDS)
            raise UserError(f"unknown tokenizer kind '{kind}'; known: {known}.{did_you_mean(kind, TOKENIZER_KINDS)}")
        return cls._finished(raw, special, config)

    @classmethod
    def _train_like_bert(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
                 "mask_token": "[MASK]"}  # fmt: skip
        raw = train_word_piece(texts, vocab_size, list(roles.values()))
        surround(raw, ["[CLS]", "$A", "[SEP]"], ["$B:1", "[SEP]:1"])
        return cls(raw, roles)

    @classmethod
    def _train_like_t5(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]  # the last id is the first sentinel
        raw = train_unigram(texts, vocab_size - SENTINELS, list(roles.values()))
        raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in sentinels])
        surround(raw, ["$A", "</s>"], ["$B", "</s>"])
        return cls(raw, roles)

    @classmethod
    def from_bpe(cls, bpe: BPE, **roles: str) -> Tokenizer:
        """The same tokenizer as `bpe`, run by the library. `roles`: bos_token=..., eos_token=..., ..."""
        vocab = {bytes_to_token(token): i for token, i in bpe.vocab.items()} | bpe.special_tokens
        merges = [(bytes_to_token(left), bytes_to_token(right)) for left, right in bpe.merges]
        raw = byte_level(models.BPE(vocab, merges, ignore_merges=bpe.ignore_merges), bpe.pattern)
        return cls._finished(raw, sorted(bpe.special_tokens, key=bpe.special_tokens.__getitem__), roles)

    @classmethod
    def _finished(cls, raw: tokenizers.Tokenizer, special: Sequence[str], config: dict[str, str]) -> Tokenizer:
        raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        if "bos_token" in config:
            bos = config["bos_token"]
            surround(raw, [bos, "$A"], [f"{bos}:1", "$B:1"])
        return cls(raw, config)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Tokenizer:
        """Read a folder with `tokenizer.json`, or the files of a model on the Hugging Face hub.

        Raises `UserError` when there is no such folder or model, or a file is missing or broken.
        """
        files = read_tokenizer_files(source, revision)
        try:
            raw = tokenizers.Tokenizer.from_str(files.tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{files.where('tokenizer.json')} is not a valid tokenizer: {error}.") from None
        try:
            return cls(raw, files.config, files.chat_template)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{files.where('tokenizer_config.json')}: cannot understand its special tokens: {error!r}."
            ) from None

    # ---------------------------------------------------------------- using it

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Text to ids; special tokens (one BOS) as the post-processor says. See `encode_batch`."""
        with self._explaining([text]):
            raw = self._raw_splitting if split_special_tokens else self.raw
            return raw.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[list[int]]:
        """Many texts to ids, on all cores.

        For training data: `add_special_tokens=False, split_special_tokens=True`. Raises `UserError` for
        anything that is not text, and for a character that a character-level tokenizer does not know.
        """
        if isinstance(texts, str):
            raise UserError("encode_batch takes a list of texts; for one text use encode.")
        texts = list(texts)
        with self._explaining(texts):
            raw = self._raw_splitting if split_special_tokens else self.raw
            return [encoding.ids for encoding in raw.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def encode_with_spans(self, text: str, add_special_tokens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the (begin, end) of the characters of `text` that it stands for.

        A character of several tokens is in the span of each; a token that stands for no character has an empty span.
        """
        with self._explaining([text]):
            plain = self._raw_without_post_processor.encode(text)
            ids, spans = plain.ids, plain.offsets
        if add_special_tokens:
            whole = self.encode(text)
            before = _find(ids, whole)
            spans = [(0, 0)] * before + spans + [(len(text), len(text))] * (len(whole) - before - len(ids))
            ids = whole
        return ids, spans

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tokenize: bool = True, **more: Any
    ) -> Any:
        """A conversation as the model reads it: ids, or (tokenize=False) text. See `chat.render`.

        The template says itself where BOS goes, so encoding adds none.
        """
        if self.chat_template is None:
            raise UserError(
                "this model has no chat template, so it cannot read a conversation; give it plain text, or set a "
                "template (see zero2hero.tokenizer.templates)"
            )
        roles = {role: token for role in ROLES if (token := self.special_token(role)) is not None}
        more |= {"add_generation_prompt": add_generation_prompt, "special_tokens": roles}
        text = render(self.chat_template, messages, **more)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Ids to text; invalid UTF-8 becomes U+FFFD, ids beyond the vocabulary (padding rows) nothing."""
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise UserError(f"cannot decode the negative id {min(ids)}; -100 marks ignored labels, drop it first.")
        if skip_special_tokens:  # the library forgets those that a normalizer changes
            ids = [i for i in ids if i not in self.all_special_ids]
        return self.raw.decode(ids, skip_special_tokens=False)

    @cached_property
    def _raw_splitting(self) -> tokenizers.Tokenizer:
        """A second copy for which special tokens are ordinary text: the library keeps that as a state."""
        raw = tokenizers.Tokenizer.from_str(self.raw.to_str())
        raw.encode_special_tokens = True
        return raw

    @cached_property
    def _raw_without_post_processor(self) -> tokenizers.Tokenizer:
        """A copy that adds no special tokens, and does not take spaces out of the spans, as GPT-2's processor would."""
        return tokenizers.Tokenizer.from_str(json.dumps(json.loads(self.raw.to_str()) | {"post_processor": None}))

    def __getstate__(self) -> dict[str, Any]:
        # The library does not pickle `encode_special_tokens`; a worker process makes its own copies.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_raw_")}

    @contextlib.contextmanager
    def _explaining(self, texts: Sequence[str]) -> Iterator[None]:
        """Look for what is wrong with the texts only when the library has refused them."""
        try:
            yield
        except Exception as error:  # the library raises bare Exception
            for number, text in enumerate(texts):
                what = "the text" if len(texts) == 1 else f"text {number}"
                check_text(text, what)
                if isinstance(self.raw.model, models.WordLevel):
                    self._check_characters(text, what)
            raise UserError(f"the tokenizer cannot encode this text: {error}.") from error

    def _check_characters(self, text: str, what: str) -> None:
        for position, character in enumerate(text):
            if self.raw.token_to_id(character) is None:
                raise UserError(
                    f"{what}: the character {character!r} (U+{ord(character):04X}) at index {position} is "
                    "not in this character-level vocabulary. Train with kind='bpe', which knows every "
                    "character, or on text that contains it."
                )

    # ---------------------------------------------------------------- what is in it

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, special tokens included: the rows that an embedding needs."""
        return max(self.raw.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as files spell it (`"Ġthe"`), or None."""
        return self.raw.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as files spell it, or None beyond the vocabulary."""
        return self.raw.id_to_token(token_id)

    def special_token(self, role: str) -> str | None:
        """The token of a role, `"bos_token"` for one. In files it is a string or an object with `content`."""
        return _content(self.config.get(role))

    def special_token_id(self, role: str) -> int | None:
        """The id of the token of a role, or None."""
        token = self.special_token(role)
        return None if token is None else self.raw.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        return self.special_token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self.special_token_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self.special_token_id("pad_token")

    @cached_property
    def all_special_ids(self) -> frozenset[int]:
        """Ids that `decode` skips."""
        return frozenset(i for i, token in self.raw.get_added_tokens_decoder().items() if token.special)

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens as a text spells them; files may spell them otherwise (`"▁<unk>"`)."""
        return [token.content for token in self.raw.get_added_tokens_decoder().values() if token.special]

    @cached_property
    def special_tokens_pattern(self) -> re.Pattern[str]:
        """Finds special tokens in a text, the longest where several begin."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical `tokenizer.json`: the same fingerprint, the same ids."""
        canonical = json.dumps(json.loads(self.raw.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer({type(self.raw.model).__name__}, vocab_size={self.vocab_size})"

    # ---------------------------------------------------------------- keeping it

    def save_pretrained(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` where there is one.

        `model_max_length` is the longest input of the model, in tokens. Other files of the folder stay.
        """
        directory = Path(directory)
        config = {key: value for key, value in self.config.items() if key not in _NOT_SAVED}
        config |= {role: token for role in ROLES if (token := self.special_token(role)) is not None}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(self.raw.model, models.WordPiece):  # BERT's segments, which this class alone would leave out
            config.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
        config["clean_up_tokenization_spaces"] = False
        config["added_tokens_decoder"] = {
            str(i): {flag: getattr(token, flag) for flag in _TOKEN_FLAGS}
            for i, token in sorted(self.raw.get_added_tokens_decoder().items())
        }
        if model_max_length is not None:
            config["model_max_length"] = int(model_max_length)
        elif (config.get("model_max_length") or 0) > _NO_LIMIT:
            del config["model_max_length"]
        if self.chat_template is not None:  # older readers look into the configuration, newer ones beside it
            config["chat_template"] = self.chat_template
            atomic_write(directory / "chat_template.jinja", self.chat_template)
        atomic_write(directory / "tokenizer.json", self.raw.to_str(pretty=True) + "\n")
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        atomic_write(directory / "tokenizer_config.json", text)


_NO_LIMIT = 10**12  # transformers writes 10^30 for "unknown"
_TOKEN_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
# what a configuration says of the class and code that wrote it, and what is written anew
_NOT_SAVED = {"add_bos_token", "add_eos_token", "auto_map", "backend", "chat_template", "is_local"}
_NOT_SAVED |= {"name_or_path", "processor_class", "tokenizer_file"}


def _find(part: list[int], whole: list[int]) -> int:
    """Where `part` begins in `whole`, which special tokens surround."""
    return next((i for i in range(len(whole) - len(part) + 1) if whole[i : i + len(part)] == part), 0)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _add_missing_special_tokens(raw: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only the configuration names become special tokens of the tokenizer, as in transformers."""
    listed = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if raw.token_to_id(entry["content"]) is None:
            raw.add_tokens([AddedToken(**{flag: entry[flag] for flag in _TOKEN_FLAGS if flag in entry})])
    named = [config.get(role) for role in ROLES]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(key) or []
        named += list(extra.values()) if isinstance(extra, dict) else extra
    special = {token.content for token in raw.get_added_tokens_decoder().values() if token.special}
    missing = [token for token in map(_content, named) if token is not None and token not in special]
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
