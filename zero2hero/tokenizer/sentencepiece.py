"""SentencePiece models (`spiece.model`, `tokenizer.model`) as tokenizers of the `tokenizers` library.

SentencePiece (Kudo & Richardson 2018, arXiv 1808.06226) treats text as a stream of characters in which a space is one
more character, written ▁. Its file is a protocol buffer, of which only a few fields matter here; they are read by hand
(https://protobuf.dev/programming-guides/encoding, sentencepiece_model.proto), so no code and no library is needed.

Two kinds of models exist. Unigram (Kudo 2018, arXiv 1804.10959; T5, ALBERT) has a log-probability for each piece and
takes the likeliest cut of a text. BPE (Llama, Gemma) merges the pair whose result has the highest score first; the
merges are not in the file, but follow from the scores: every way to cut a piece into two of the vocabulary is a merge.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from zero2hero.errors import UserError

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
_MODELS = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}


@dataclass
class Model:
    """What of a SentencePiece file decides how text becomes ids. `pieces`: (piece, score, kind) by id."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""  # the normalization table, precompiled
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def of_kind(self, kind: int) -> list[str]:
        return [piece for piece, _, k in self.pieces if k == kind]


def parse(content: bytes, where: str) -> Model:
    """Read a SentencePiece file.

    Raises:
        UserError: it is cut short, or is not one.
    """
    model, whole = Model(), False
    try:
        for number, value in _fields(content):
            if number == 1:
                parts = dict(_fields(value))
                score = struct.unpack("<f", parts.get(2, b"\0\0\0\0"))[0]
                model.pieces.append((parts[1].decode(), score, parts.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
                model.kind, model.byte_fallback = trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0))
                if trainer.get(24, 0):
                    raise UserError(f"{where}: spaces as suffixes (treat_whitespace_as_suffix) are not supported")
            elif number == 3:
                spec, whole = dict(_fields(value)), True
                model.charsmap = spec.get(2, b"")
                model.add_dummy_prefix, model.remove_extra_whitespaces = bool(spec.get(3, 1)), bool(spec.get(4, 1))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise UserError(f"{where} is not a SentencePiece model, or is damaged ({error!r})") from None
    if not model.pieces or not whole:
        raise UserError(f"{where} is not a SentencePiece model, or is damaged: it has no pieces or no normalization")
    return model


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer: numbers as they are, all else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"wire type {wire}")
            size = varint()
        if at + size > len(message):
            raise ValueError("cut short")
        yield number, message[at : at + size]
        at += size


def build(model: Model, where: str) -> tokenizers.Tokenizer:
    """The tokenizer that gives the ids SentencePiece gives; no BOS or EOS is added.

    Raises:
        UserError: a model of another kind than unigram or BPE.
    """
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    if model.kind == _UNIGRAM:
        scores = [(piece, score) for piece, score, _ in model.pieces]
        raw = tokenizers.Tokenizer(models.Unigram(scores, unknown, model.byte_fallback))
    elif model.kind == _BPE:
        vocab = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
        token = None if unknown is None else model.pieces[unknown][0]
        raw = tokenizers.Tokenizer(
            models.BPE(vocab, merges(model), unk_token=token, fuse_unk=True, byte_fallback=model.byte_fallback)
        )
    else:
        raise UserError(f"{where} is a SentencePiece model of kind {_MODELS.get(model.kind, model.kind)}; "
                        "unigram and bpe are supported")  # fmt: skip
    raw.normalizer = normalizers.Sequence(list(_normalization(model)))
    if model.kind == _UNIGRAM:
        scheme = "always" if model.add_dummy_prefix else "never"
        raw.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
        raw.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    else:
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        raw.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * model.add_dummy_prefix)
    special = model.of_kind(UNKNOWN) + model.of_kind(CONTROL)
    raw.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    raw.add_tokens([AddedToken(piece, normalized=False) for piece in model.of_kind(USER_DEFINED)])
    return raw


def _normalization(model: Model) -> Iterator[normalizers.Normalizer]:
    if model.charsmap:
        yield normalizers.Precompiled(model.charsmap)
    if model.remove_extra_whitespaces:
        yield normalizers.Strip(left=True, right=True)
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if model.kind == _BPE:  # the merges run over the whole text at once, so spaces become ▁ here
        if model.add_dummy_prefix:
            yield normalizers.Prepend(SPACE)
        yield normalizers.Replace(" ", SPACE)


def merges(model: Model) -> list[tuple[str, str]]:
    """The merges of a BPE model, best first: each piece as two others, by the score of the whole."""
    normal = {piece: (score, i) for i, (piece, score, kind) in enumerate(model.pieces) if kind in (NORMAL, UNUSED)}
    found = []
    for piece, (score, i) in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-score, i, normal[left][1], normal[right][1], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
