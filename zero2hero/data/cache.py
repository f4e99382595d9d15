"""The token cache: text is tokenized once, and from then on read straight from the disk.

    CACHE/tokens/NAME-KEY/
        tokens.bin    every document's tokens, one after the other (uint16, or uint32 for large vocabularies)
        offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
        hashes.npy    uint64 [documents]: of each text, by which the validation split is drawn
        meta.json     sizes, framing, and which documents came from which source

KEY is a hash of the text's fingerprint, the tokenizer's and the format, so a changed file or tokenizer gets
a new cache. A cache is built under a temporary name and renamed when it is whole; one whose sizes do not add
up is never used but built again. Reading is a memory map: opening takes milliseconds and no memory.

Validation is split off by document, never by window: windows of one document share its names and phrases, and
a model would be tested on what it has half seen. Only when there are too few documents to choose from is the
tail of the token stream held out, with one cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from zero2hero.data.files import Document
from zero2hero.data.sources import Source
from zero2hero.errors import UserError
from zero2hero.io import atomic_directory, cache_folder

FORMAT = 1  # raise when the files below or the tokenization of long documents change
TEXTS_PER_BATCH = 1_000
CHARACTERS_PER_BATCH = 2_000_000
CHARACTERS_PER_PIECE = 200_000
FEW_DOCUMENTS = 10  # below this, validation is the tail of the stream


@dataclass(frozen=True)
class Corpus:
    """Documents as spans of one token array: `tokens[start:end]` for every (start, end) in `spans` [n, 2]."""

    tokens: np.ndarray
    spans: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, framing included."""
        start, end = self.spans[index]
        return self.tokens[start:end]


class TokenCache:
    """An opened cache folder.

    Raises:
        ValueError: the folder is not a whole cache (`tokenize_to_cache` then builds it again).
    """

    def __init__(self, folder: Path):
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
            self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            self.hashes = np.load(folder / "hashes.npy", allow_pickle=False)
            self.dtype = np.dtype(self.meta["dtype"])
            size = (folder / "tokens.bin").stat().st_size
            whole = (
                self.meta["format"] == FORMAT
                and self.offsets.shape == (self.num_documents + 1,)
                and self.hashes.shape == (self.num_documents,)
                and self.offsets[0] == 0
                and self.offsets[-1] == self.num_tokens
                and bool((np.diff(self.offsets) > 0).all())
                and size == self.num_tokens * self.dtype.itemsize
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(str(error)) from error
        if not whole:
            raise ValueError("sizes do not add up")
        self.folder = folder
        self.tokens = np.memmap(folder / "tokens.bin", dtype=self.dtype, mode="r").view(np.ndarray)

    @property
    def num_documents(self) -> int:
        return int(self.meta["num_documents"])

    @property
    def num_tokens(self) -> int:
        return int(self.meta["num_tokens"])

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, with BOS and EOS where the tokenizer has them."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


# --- writing ------------------------------------------------------------------------------------------------


def tokenize_to_cache(
    source: Source,
    tokenizer: Any,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenCache:
    """The tokens of `source`, from the cache when they are there, else tokenized now.

    Args:
        source: its validation documents, if it has such, are cached with the others.
        tokenizer: needs `encode_batch`, `bos_token_id`, `eos_token_id`, `vocab_size`, `fingerprint`.
        cache_dir: default `$ZERO2HERO_CACHE/tokens` or `~/.cache/zero2hero/tokens`.
        progress: called with (documents, tokens) done so far, about once every 1,000 documents.

    Raises:
        UserError: the source has no text or cannot be read; the cache folder cannot be written.
    """
    parts = sections(source)
    key = hashlib.sha256()
    for part, split in parts:
        key.update(f"{part.fingerprint} {split}\n".encode())
    key.update(f"{tokenizer.fingerprint} {FORMAT}".encode())
    name = re.sub(r"[^\w.-]+", "_", Path(source.name).name)[:40]
    folder = Path(cache_dir or cache_folder() / "tokens") / f"{name}-{key.hexdigest()[:20]}"
    if folder.exists():
        try:
            return TokenCache(folder)
        except ValueError as error:
            warnings.warn(f"the token cache {folder} is damaged ({error}); building it again", stacklevel=2)
    _sweep(folder)
    try:
        with atomic_directory(folder) as temporary:
            _write(temporary, parts, tokenizer, progress)
    except UserError as error:
        if not isinstance(error.__cause__, OSError) or "cannot save" not in str(error):
            raise
        raise UserError(
            f"cannot write the token cache {folder}: {error.__cause__.strerror}. "
            "Free some space, or set the variable ZERO2HERO_CACHE to a folder that can be written."
        ) from error
    return TokenCache(folder)


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed a week ago or earlier left of this cache, half built."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 7 * 24 * 3600:
                shutil.rmtree(left)


def sections(source: Source) -> list[tuple[Source, str | None]]:
    """(part, "train" or "validation") of every source of a mix, in order; None for one that is yet to be divided."""
    if source.parts:
        return [section for part in source.parts for section in sections(part)]
    if source.validation is None:
        return [(source, None)]
    return [(source, "train"), (source.validation, "validation")]


def _write(
    folder: Path,
    parts: list[tuple[Source, str | None]],
    tokenizer: Any,
    progress: Callable[[int, int], None] | None,
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    offsets, hashes, described = array("q", [0]), array("Q"), []
    with (folder / "tokens.bin").open("wb") as stream:
        written = 0
        for source, split in parts:
            first = len(hashes)
            for ids, ended in encode_documents(source.records(), tokenizer):
                if len(ids) and ids.max() >= tokenizer.vocab_size:
                    raise UserError(f"the tokenizer made id {ids.max()} but has {tokenizer.vocab_size} tokens.")
                stream.write(ids.astype(dtype).tobytes())
                for end, text_hash in ended:
                    if written + end > offsets[-1]:  # a text may come out of the tokenizer as nothing
                        offsets.append(written + end)
                        hashes.append(text_hash)
                written += len(ids)
                if progress is not None:
                    progress(len(hashes), written)
            described.append({"name": source.name, "split": split, "documents": [first, len(hashes)]})
    if not hashes:
        raise UserError("the text is empty: there is nothing to tokenize.")
    np.save(folder / "offsets.npy", np.frombuffer(offsets, dtype=np.int64))
    np.save(folder / "hashes.npy", np.frombuffer(hashes, dtype=np.uint64))
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "num_documents": len(hashes),
        "num_tokens": written,
        "framing": [int(tokenizer.bos_token_id is not None), int(tokenizer.eos_token_id is not None)],
        "sections": described,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def encode_documents(
    documents: Iterable[Document], tokenizer: Any
) -> Iterator[tuple[np.ndarray, list[tuple[int, int]]]]:
    """Tokens of a batch of texts, and (end within the batch, hash) of every document that ends in it."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batched(_pieces(documents, tokenizer)):
        encoded = _encode_texts(tokenizer, [piece.text for piece in batch], [piece.where for piece in batch])
        framed: list[list[int]] = []
        ended, length = [], 0
        for piece, ids in zip(batch, encoded):
            framed += [bos * piece.first, ids, eos * (piece.hash is not None)]
            length += sum(map(len, framed[-3:]))
            if piece.hash is not None:
                ended.append((length, piece.hash))
        yield np.fromiter(chain.from_iterable(framed), dtype=np.int64, count=length), ended


def _encode_texts(tokenizer: Any, texts: list[str], where: list[str]) -> list[list[int]]:
    """Ids of each text, without special tokens; an error names the place of the text that caused it."""
    try:
        ids: list[list[int]] = tokenizer.encode_batch(texts, add_special_tokens=False, split_special_tokens=True)
        return ids
    except UserError as error:
        if len(texts) == 1:
            raise UserError(f"{where[0]}: {error}") from error
        for text, place in zip(texts, where):
            _encode_texts(tokenizer, [text], [place])
        raise


# --- long documents -----------------------------------------------------------------------------------------
# A book is tokenized in pieces, so that memory stays small and all cores have work. It is cut before a line end
# that follows a letter or digit: the split patterns of GPT-2 and Llama 3 cut there too, so that the tokens are those
# of the whole. Where a tokenizer does otherwise (SentencePiece puts a space before every text), nothing is cut.

_LINE_END = re.compile(r"(?<=[^\W_])\n")


@dataclass(frozen=True)
class _Piece:
    text: str
    where: str
    first: bool
    hash: int | None  # of the whole document; set on its last piece


def _pieces(documents: Iterable[Document], tokenizer: Any) -> Iterator[_Piece]:
    for document, where in documents:
        start = 0
        while len(document) - start > CHARACTERS_PER_PIECE and (end := _cut(document, start, tokenizer)):
            yield _Piece(document[start:end], where, start == 0, None)
            start = end
        yield _Piece(document[start:], where, start == 0, _hash(document))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _cut(document: str, start: int, tokenizer: Any) -> int | None:
    """Where the piece from `start` may end, if the tokens around that place are the same with and without a cut."""
    line_end = _LINE_END.search(document, start + CHARACTERS_PER_PIECE // 2)
    if line_end is None:
        return None
    end = line_end.start()
    left, right = document[max(start, end - 100) : end], document[end : end + 100]
    whole, *halves = _encode_texts(tokenizer, [left + right, left, right], ["near a line end"] * 3)
    return end if whole == halves[0] + halves[1] else None


def _batched(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if len(batch) == TEXTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- train and validation -----------------------------------------------------------------------------------


def split_documents(cache: TokenCache, validation: float | int = 0.1, seed: int = 0) -> tuple[Corpus, Corpus]:
    """(training corpus, validation corpus) of a cache.

    Each source of a mix is divided on its own:
      - one that came with validation documents keeps that division;
      - else documents are drawn by a hash of their text and the seed, so that the draw does not change when
        documents are added or reordered, and copies of one text fall on the same side;
      - with fewer than 10 documents the stream of text tokens is cut once: the last tenth (`int(n * 0.9)`
        onwards) is validation. The document that is cut keeps BOS on the training side; its tail is raw text,
        without BOS or EOS.

    Args:
        validation: a fraction below 1, or a number of documents (an int); 0 for none.
        seed: of the draw.

    Raises:
        UserError: a fraction outside [0, 1), or as many documents as there are.
    """
    if validation < 0 or (isinstance(validation, float) and validation >= 1):
        raise UserError(f"validation is a fraction below 1 or a number of documents, not {validation}.")
    empty = np.zeros((0, 2), dtype=np.int64)
    train, held_out = [empty], [empty]
    for section in cache.meta["sections"]:
        first, last = section["documents"]
        spans = np.stack([cache.offsets[first:last], cache.offsets[first + 1 : last + 1]], axis=1)
        if section["split"] is not None:
            (train if section["split"] == "train" else held_out).append(spans)
        elif not validation or not len(spans):
            train.append(spans)
        elif isinstance(validation, float) and len(spans) < FEW_DOCUMENTS:
            left, right = _cut_tail(spans, validation, *cache.meta["framing"])
            train.append(left)
            held_out.append(right)
        else:
            chosen = _draw(cache.hashes[first:last], validation, seed)
            train.append(spans[~chosen])
            held_out.append(spans[chosen])
    return Corpus(cache.tokens, np.concatenate(train)), Corpus(cache.tokens, np.concatenate(held_out))


def _draw(hashes: np.ndarray, validation: float | int, seed: int) -> np.ndarray:
    """Which documents [n] are held out: those whose hash, mixed with the seed, is low."""
    scores = _scores(hashes, seed)
    if isinstance(validation, float):
        chosen = scores < _threshold(validation)
        if chosen.any() and not chosen.all():
            return np.asarray(chosen)
        validation = 1  # by chance none, or all, of a handful of documents
    if validation >= len(hashes):
        raise UserError(f"{validation} documents for validation, but there are only {len(hashes)} in all.")
    return np.asarray(scores <= np.sort(scores)[validation - 1])


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """The same draw for a single document, of a source that is never seen whole."""
    return bool(_scores(np.array([_hash(text)], dtype=np.uint64), seed)[0] < _threshold(fraction))


def _scores(hashes: np.ndarray, seed: int) -> np.ndarray:
    return _splitmix64(hashes ^ _splitmix64(np.array([seed % 2**64], dtype=np.uint64)))


def _threshold(fraction: float) -> np.uint64:
    return np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that scatters them (Steele et al. 2014, the finalizer)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _cut_tail(spans: np.ndarray, fraction: float, bos: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the text tokens (framing not counted) of `spans` at `int(n * (1 - fraction))`."""
    text = np.stack([spans[:, 0] + bos, spans[:, 1] - eos], axis=1)
    ends = np.cumsum(text[:, 1] - text[:, 0])
    cut = int(ends[-1] * (1 - fraction))
    index = int(np.searchsorted(ends, cut, side="right"))  # the document that the cut falls in
    if index == len(spans):
        return spans, spans[:0]
    position = text[index, 1] - (ends[index] - cut)
    if position == text[index, 0]:  # between two documents
        return spans[:index], spans[index:]
    left, right = [[spans[index, 0], position]], [[position, text[index, 1]]]
    return np.concatenate([spans[:index], left]), np.concatenate([right, spans[index + 1 :]])
