"""From what the user typed after `--data` to a stream of documents.

    stories  stories:5000  sums  markov:2000  pydoc       built-in text, made here, no download
    book.txt  chats.jsonl.gz  table.csv  corpus.parquet   a file (see files.py for the formats)
    texts/                                                a folder: every supported file below it, sorted
    roneneldan/TinyStories  owner/name:split              a data set of the Hugging Face hub
    [stories, pydoc, notes/]                              several of these: a mix, in order

What exists on the disk wins over a hub data set of the same name. A `Source` can be read as often as wanted
and never holds all its documents; its `fingerprint` changes whenever they may have changed, and the token
cache (cache.py) is keyed by it. Its `shards` are read one by one where text is streamed (streaming.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from zero2hero.data import files
from zero2hero.data.files import BadRecords, Document, Row
from zero2hero.data.worlds import WORLDS, world
from zero2hero.errors import UserError, did_you_mean

BUILT_IN = (*WORLDS, "pydoc")
WORLD_DOCUMENTS = 20_000  # of a world, when no number is given
WORLD_VALIDATION = 1_000  # at most; a tenth of the training documents when that is fewer
_OTHER_SUFFIXES = frozenset((".md", ".html", ".xml", ".pdf", ".docx", ".zip", ".zst", ".gz", ".bz2", ".xz"))


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read by itself: a file, or a shard of a hub data set; `size` in bytes, if known."""

    name: str
    records: Callable[[], Iterator[Document]]
    size: int | None = None


@dataclass(frozen=True)
class Source:
    """Documents that can be read again and again.

    Attributes:
        name: for people.
        identity: the fingerprint, or a function that finds it (for a file by reading it whole).
        records: call it for an iterator of (document, where it stands).
        validation: documents made to be held out, where the source has such; otherwise they are split off
            the tokens later (`cache.split_documents`).
        parts: the sources of a mix, in order; empty for a single source.
        find_shards: where there are several.
        find_rows: the records with all their columns, where there are such; see `rows`.
    """

    name: str
    identity: str | Callable[[], str]
    records: Callable[[], Iterator[Document]]
    validation: Source | None = None
    parts: tuple[Source, ...] = ()
    find_shards: Callable[[], list[Shard]] | None = None
    find_rows: Callable[[], Iterator[Row]] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints promise equal documents."""
        return self.identity if isinstance(self.identity, str) else self.identity()

    @property
    def shards(self) -> list[Shard]:
        """The same documents in parts, in order. A shard may be empty, which a source may not."""
        if self.find_shards is not None:
            return self.find_shards()
        return [shard for part in self.parts for shard in part.shards] or [Shard(self.name, self.records)]

    def rows(self) -> Iterator[Row]:
        """Every record as it is in the file, with all its columns; of plain text, every document."""
        if self.parts:
            return chain.from_iterable(part.rows() for part in self.parts)
        return self.records() if self.find_rows is None else self.find_rows()

    def __iter__(self) -> Iterator[str]:
        return (document for document, _ in self.records())


def open_source(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    text_column: str | None = None,
    split: str = "train",
    on_bad_record: Literal["raise", "skip"] = "raise",
    seed: int = 0,
) -> Source:
    """The documents that `data` names (see the top of this file).

    Args:
        data: one name or path, or a list of them.
        text_column: the column that holds the text; found by itself when there is only one candidate. In a
            .csv or .tsv without a header line: its number, from 1.
        split: of a hub data set or of built-in text ("train", "validation").
        on_bad_record: "skip" leaves out records that cannot be read, and warns how many there were.
        seed: of built-in text.

    Raises:
        UserError: nothing of that name, or nothing readable in it. Faults inside a file are raised when the
            documents are read, with the file and the line or byte.
    """
    if on_bad_record not in ("raise", "skip"):
        raise UserError(f"on_bad_record is 'raise' or 'skip', not '{on_bad_record}'.")
    specs = [data] if isinstance(data, (str, os.PathLike)) else data
    skip = on_bad_record == "skip"
    if not specs or "" in specs:
        raise UserError("--data names nothing: give a built-in text, a file, a folder or a hub data set.")
    parts = [_open_one(os.fspath(spec), text_column, split, skip, seed) for spec in specs]
    return parts[0] if len(parts) == 1 else _mix(parts)


def _open_one(spec: str, text_column: str | None, split: str, skip: bool, seed: int) -> Source:
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_files(spec, _files_below(path), text_column, skip)
    if path.exists():
        return _from_files(spec, [path], text_column, skip)
    name, _, count = spec.partition(":")
    if name in BUILT_IN:
        if count and not (count.isdecimal() and int(count) and name in WORLDS):
            raise UserError(f"'{spec}': write {' or '.join([name] + [f'{name}:2000'] * (name in WORLDS))}.")
        return _from_world(name, int(count or WORLD_DOCUMENTS), split, seed) if name in WORLDS else _pydoc(split)
    if _looks_like_a_path(spec):
        raise UserError(f"no such file or folder: {spec}.{_near(path)}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[^:/]+){0,2}", spec):
        return _from_hub(spec, text_column, split, skip)
    raise UserError(
        f"'{spec}' is neither a file, nor a folder, nor built-in text.{_near(path, BUILT_IN)} "
        f"Built in: {', '.join(BUILT_IN)}. A hub data set is written owner/name."
    )


def _looks_like_a_path(spec: str) -> bool:
    path = Path(spec)
    return (
        spec.startswith((".", "/", "~"))
        or spec.endswith("/")
        or "\\" in spec
        or len(path.parts) > 2
        or path.suffix.lower() in _OTHER_SUFFIXES.union(files.FORMATS)
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _near(path: Path, also: Iterable[str] = ()) -> str:
    """A "did you mean" among what lies in the folder, or among the folders when that one is missing too."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        path, folder = folder, folder.parent
    hint = did_you_mean(path.name, [*also, *(entry.name for entry in folder.iterdir())])
    return f"{hint[:-1]} (in {folder})?" if hint and folder != Path(".") else hint


# --- built-in text ------------------------------------------------------------------------------------------


def _from_world(name: str, count: int, split: str, seed: int) -> Source:
    made = world(name, seed)

    def documents(split: str, count: int) -> Source:
        # a changed generator shows in its first documents
        sample = [made.document(index, split) for index in range(min(count, 16))]
        key = json.dumps([name, split, count, seed, sample])

        def each(make: Callable[[int, str], Any]) -> Iterator[Any]:
            return ((make(index, split), f"{name} ({split}) {index}") for index in range(count))

        records = getattr(made, "record", made.document)  # a text, of a world without columns
        return Source(f"{name}:{count}", _sha256(key), lambda: each(made.document), find_rows=lambda: each(records))

    source = documents(split, count)
    if split != "train":
        return source
    return replace(source, validation=documents("validation", min(WORLD_VALIDATION, max(1, count // 10))))


def _pydoc(split: str) -> Source:
    from zero2hero.data.corpora import pydoc_documents

    if split != "train":
        raise UserError(f"pydoc has no split '{split}': a part of its documents is held out by itself.")
    texts = pydoc_documents()
    return Source("pydoc", _sha256(json.dumps(texts)), lambda: ((text, f"pydoc {i}") for i, text in enumerate(texts)))


# --- files --------------------------------------------------------------------------------------------------


def _files_below(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and files.file_format(path) in files.FORMATS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise UserError(f"no text in the folder {folder}: looked for {' '.join(files.FORMATS)} (also .gz).")
    return found


def _from_files(name: str, paths: list[Path], text_column: str | None, skip: bool) -> Source:
    for path in paths:
        if path.suffix.lower() in (".zst", ".zip", ".tar"):
            raise UserError(f"{path}: unpack it first (.gz, .bz2 and .xz are read as they are).")
    if all(path.is_file() and path.stat().st_size == 0 for path in paths):
        raise UserError(f"{name} is empty (0 bytes): there is no text to learn from.")

    def records() -> Iterator[Document]:
        bad = BadRecords(skip)
        documents = (files.read_documents(path, text_column, bad) for path in paths)
        return _with_text(name, chain.from_iterable(documents), bad)

    def rows() -> Iterator[Row]:
        bad = BadRecords(skip)
        yield from chain.from_iterable(files.read_rows(path, text_column, bad) for path in paths)
        bad.tell(name)

    def shard(path: Path) -> Shard:
        def records() -> Iterator[Document]:
            bad = BadRecords(skip)
            return _not_blank(str(path), files.read_documents(path, text_column, bad), bad)

        return Shard(str(path), records, path.stat().st_size)

    def fingerprint() -> str:
        settings = [text_column, skip, [files.file_format(path) for path in paths]]
        return _sha256(json.dumps([settings, [_file_sha256(path) for path in paths]]))

    return Source(name, fingerprint, records, find_shards=lambda: [shard(path) for path in paths], find_rows=rows)


def _with_text(name: str, documents: Iterable[Document], bad: BadRecords) -> Iterator[Document]:
    """Those that are not blank; there must be one."""
    empty = True
    for document in _not_blank(name, documents, bad):
        empty = False
        yield document
    if empty:
        raise UserError(f"{name} holds no text: every record is empty or was left out.")


def _not_blank(name: str, documents: Iterable[Document], bad: BadRecords) -> Iterator[Document]:
    """Those that are not blank; in the end say what was left out."""
    for text, where in documents:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell what no text contains
            bad.found(where, f"U+{ord(text[error.start]):04X} at index {error.start} is half a character")
            continue
        if text.strip():
            yield text, where
    bad.tell(name)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


# --- the hub, and mixes -------------------------------------------------------------------------------------


def _from_hub(spec: str, text_column: str | None, split: str, skip: bool) -> Source:
    from zero2hero.data.hub import HubDataset, parse_hub_name

    name, config, named_split = parse_hub_name(spec)

    def documents(dataset: HubDataset) -> Source:
        def records() -> Iterator[Document]:
            bad = BadRecords(skip)
            return _with_text(spec, files.documents_of(dataset.rows(), text_column, bad), bad)

        def shard(name: str, rows: Callable[[], Iterator[Row]]) -> Shard:
            def records() -> Iterator[Document]:
                bad = BadRecords(skip)
                return _not_blank(name, files.documents_of(rows(), text_column, bad), bad)

            return Shard(name, records)

        key = json.dumps([dataset.fingerprint, text_column, skip])
        return Source(
            f"{name}:{dataset.split}",
            _sha256(key),
            records,
            find_shards=lambda: [shard(*part) for part in dataset.shards()],
            find_rows=dataset.rows,
        )

    dataset = HubDataset(name, config, named_split or split)
    source = documents(dataset)
    if dataset.split == "train" and "validation" in dataset.splits:
        return replace(source, validation=documents(HubDataset(name, config, "validation")))
    return source


def _mix(parts: list[Source]) -> Source:
    held_out = [part.validation for part in parts if part.validation is not None]
    return Source(
        name=" + ".join(part.name for part in parts),
        identity=lambda: _sha256("\n".join(part.fingerprint for part in parts)),
        records=lambda: chain.from_iterable(part.records() for part in parts),
        validation=_mix(held_out) if held_out else None,
        parts=tuple(parts),
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
