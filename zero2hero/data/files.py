"""Documents out of one file on the disk: what a document is in each format, and where a fault lies.

    .txt              the text between `<|endoftext|>` markers; a file without the marker is one document
    .jsonl .ndjson    one JSON record a line
    .json             one list of records, or an object that holds one
    .csv .tsv         one record a row, under a line of column names
    .parquet          one record a row

A record is a string, or an object with a text column: the one that the caller names, else `text`, `content`
and the like, else the only column that holds strings. Text formats may be compressed (.gz .bz2 .xz); a file
with any other suffix is read as plain text.

Text formats are read here, in constant memory, because a fault must be reported with its line or byte, and
because a table reader that guesses types turns the word "NA" into a missing value. Parquet is read by pyarrow,
some rows at a time. TSV has no quotes (IANA text/tab-separated-values).
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zero2hero.errors import UserError, did_you_mean

DOCUMENT_MARKER = b"<|endoftext|>"
TEXT_COLUMNS = ("text", "content", "story", "document", "article", "body", "sentence", "passage")

Document = tuple[str, str]  # the text, and where it stands ("file.jsonl, line 3"): for messages
Row = tuple[Any, str]  # a record, and where it stands


@dataclass
class BadRecords:
    """What to do with a record that cannot be read: raise at once, or skip it and count it."""

    skip: bool = False
    skipped: int = 0
    first: str = ""

    def found(self, where: str, problem: str) -> None:
        """Raise a `UserError` for the record at `where`, or note it when faults are to be skipped."""
        if not self.skip:
            raise UserError(f"{where}: {problem}. Mend it, or pass --on_bad_record skip to leave it out.")
        self.first = self.first or f"{where}: {problem}"
        self.skipped += 1

    def tell(self, name: str) -> None:
        """Warn, once all is read, of what was left out of `name`."""
        if self.skipped:
            warnings.warn(f"{name}: left out {self.skipped} bad records; the first: {self.first}", stacklevel=2)


def read_documents(path: Path, text_column: str | None, bad: BadRecords) -> Iterator[Document]:
    """Every document of the file at `path`, in order, with a description of where it stands."""
    return documents_of(read_rows(path, text_column, bad), text_column, bad)


def read_rows(path: Path, text_column: str | None, bad: BadRecords) -> Iterator[Row]:
    """Every record of the file at `path` as it is there; of plain text, every document.

    A `text_column` that is a number says that a table has no header line: its columns are called 1, 2, 3, ...
    """
    if file_format(path) == ".parquet":
        yield from _parquet_rows(path)
        return
    reader = _ROW_READERS.get(file_format(path))
    with _opened(path) as stream:
        yield from _plain_text(path, stream) if reader is None else reader(path, stream, text_column, bad)


def read_lines(path: Path) -> Iterator[str]:
    """Every line of a plain text file, without its end."""
    with _opened(path) as stream:
        yield from (line.rstrip("\n") for line in _lines(path, stream))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; a `UserError` where that cannot be."""
    try:
        with _UNPACK.get(path.suffix.lower(), open)(path, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} is damaged and cannot be unpacked ({error}): fetch it again.") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def file_format(path: Path) -> str:
    """The suffix that decides how the file is read, under that of a compression: `a.jsonl.gz` -> `.jsonl`."""
    return (Path(path.stem) if path.suffix.lower() in _UNPACK else path).suffix.lower()


# --- bytes to text ------------------------------------------------------------------------------------------


def decode(raw: bytes, path: Path, offset: int) -> str:
    """UTF-8 to str, line ends made `\\n`. `offset` is where `raw` begins in the (unpacked) file.

    Raises:
        UserError: a NUL byte or a sequence that is not UTF-8, with its byte offset.
    """
    if offset == 0 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text: save it as UTF-8 (iconv -f utf-16 -t utf-8).")
    try:
        text = raw.decode("utf-8")
        at = raw.find(b"\0")
        problem = "a NUL byte"
    except UnicodeDecodeError as error:
        at = error.start
        problem = f"byte 0x{raw[at]:02x} is not UTF-8"
    if at >= 0:
        raise UserError(f"{path} is not plain text: at byte {offset + at}, {problem}. Give UTF-8 text.")
    if offset == 0:
        text = text.removeprefix("\ufeff")  # the byte order mark that some editors write
    return text.replace("\r\n", "\n")


def _plain_text(path: Path, stream: BinaryIO) -> Iterator[Document]:
    buffer, start, searched, marked = bytearray(), 0, 0, False  # buffer: the file's bytes from `start` on
    while chunk := stream.read(1 << 20):
        buffer += chunk
        begin = 0
        while (end := buffer.find(DOCUMENT_MARKER, max(begin, searched))) >= 0:
            text = decode(bytes(buffer[begin:end]), path, start + begin).strip()
            yield text, f"{path}, byte {start + begin}"
            begin, marked = end + len(DOCUMENT_MARKER), True
        del buffer[:begin]
        start += begin
        searched = max(0, len(buffer) - len(DOCUMENT_MARKER))  # a marker may straddle two chunks
    if buffer:
        text = decode(bytes(buffer), path, start)
        yield text.strip() if marked else text, f"{path}, byte {start}"


def _lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    offset = 0
    for raw in stream:
        yield decode(raw, path, offset)
        offset += len(raw)


# --- text to rows -------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, stream: BinaryIO, text_column: str | None, bad: BadRecords) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, stream), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            bad.found(where, f"not valid JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            bad.found(where, "JSON nested too deeply")
        else:
            yield row, where


def _json_rows(path: Path, stream: BinaryIO, text_column: str | None, bad: BadRecords) -> Iterator[Row]:
    text = decode(stream.read(), path, 0)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text[: error.pos]:  # JSON lines after all
            stream.seek(0)
            yield from _jsonl_rows(path, stream, text_column, bad)
            return
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg}).") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of records, found {content!r:.40}.")
    for number, row in enumerate(content, start=1):
        yield row, f"{path}, record {number}"


def _table_rows(path: Path, stream: BinaryIO, text_column: str | None, bad: BadRecords) -> Iterator[Row]:
    """Rows as dicts. A `text_column` that is a number, from 1, says that the file has no header line."""
    tabs = file_format(path) == ".tsv"
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the default 128 KiB
    reader = csv.reader(
        _lines(path, stream),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad.found(where, f"not a valid row ({error})")
            continue
        if header is None:
            header = _header(cells, where, text_column)
            if header is cells:
                continue
        if len(cells) == len(header):
            yield dict(zip(header, cells)), where
        elif cells:  # a blank line is no row
            bad.found(where, f"{len(cells)} cells where the first line has {len(header)}")


def _header(cells: list[str], where: str, text_column: str | None) -> list[str]:
    """Column names: the first line itself, or numbers when the caller says that it is already a record."""
    if text_column is not None and text_column.isdecimal():
        return [str(number) for number in range(1, len(cells) + 1)]
    nameless = [cell for cell in cells if not cell.strip() or _is_number(cell)]
    if nameless and text_column not in cells:
        raise UserError(
            f"{where}: not a line of column names ('{nameless[0]}' is none). If the file has no header, "
            "name the text's column by its number from 1: --text_column 1."
        )
    return cells


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1_000) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield row, f"{path}, row {number}"
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as Parquet: {reason}") from error


_UNPACK: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ROW_READERS: dict[str, Callable[[Path, BinaryIO, str | None, BadRecords], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
}
FORMATS = (".txt", *_ROW_READERS, ".parquet")


# --- rows to documents --------------------------------------------------------------------------------------


def documents_of(rows: Iterable[Row], text_column: str | None, bad: BadRecords) -> Iterator[Document]:
    """The text of each row; the first object among them settles which column holds it."""
    column: str | None = None
    for row, where in rows:
        if isinstance(row, str):
            yield row, where
        elif not isinstance(row, dict):
            bad.found(where, f"expected an object or a string, found {row!r:.40}")
        else:
            column = column or choose_column(row, text_column, where)
            if isinstance(row.get(column), str):
                yield row[column], where
            elif column in row:
                bad.found(where, f"column '{column}' holds {row[column]!r:.40}, not text")
            else:
                bad.found(where, f"no column '{column}' (there are: {', '.join(map(str, row))})")


def choose_column(row: dict[str, Any], wanted: str | None, where: str) -> str:
    """The column that holds the text, judged by one record.

    Raises:
        UserError: `wanted` is not there, or none or several could be meant; it lists those that are there.
    """
    columns = ", ".join(f"'{name}'" for name in row) or "none"
    if wanted is not None:
        if wanted in row:
            return wanted
        hint = did_you_mean(wanted, row)
        raise UserError(f"{where}: there is no column '{wanted}'.{hint} Columns: {columns}.")
    known = [name for name in TEXT_COLUMNS if name in row and isinstance(row[name], (str, type(None)))]
    texts = [name for name, value in row.items() if isinstance(value, str) and not _is_number(value)]
    nested = any(isinstance(value, (dict, list)) for value in row.values())  # the text may be in there
    if known or (len(texts) == 1 and not nested):
        return (known or texts)[0]
    raise UserError(f"{where}: which column holds the text? Name it with --text_column. Columns: {columns}.")
