"""Records with named columns: what tasks with labels, pairs and questions learn from.

    sentiment  sentiment:5000  translation          built-in worlds that have records
    reviews.tsv  pairs.jsonl.gz  table.parquet      files of records (see files.py)
    [train.en.gz, train.de.gz]                      two plain text files: line n of one belongs to line n of the other
    owner/name:split                                a data set of the Hugging Face hub
    [reviews.tsv, more.tsv]                         several of these: their records one after another

A table is held in memory: what a task is trained on is small beside what a language model is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zero2hero.data import files
from zero2hero.data.files import BadRecords, Row
from zero2hero.data.worlds import WORLDS, world
from zero2hero.errors import UserError, did_you_mean

WORLD_RECORDS, WORLD_VALIDATION = 10_000, 1_000  # of a built-in world when no number is given; held out at most
SOURCE, TARGET = "source", "target"  # the columns of two files whose lines belong together


@dataclass(frozen=True)
class Table:
    """Records, and where each stands, for messages."""

    name: str
    rows: list[dict[str, Any]]
    where: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, option: str, wanted: str | None, known: Sequence[str]) -> str:
        """The column that `wanted` names, or by itself the first of `known` that there is.

        Raises:
            UserError: there is none; it names the option that can say which, and lists the columns.
        """
        first = self.rows[0]
        columns = ", ".join(f"'{name}'" for name in first)
        if wanted is not None and wanted not in first:
            bare = any(_is_number(name) or " " in name for name in first)  # a record where names should be
            hint = " Has the file no header line? Then name --text_column, or --source_column, by number." * bare
            raise UserError(
                f"{self.name} has no column '{wanted}'.{did_you_mean(wanted, first)} Columns: {columns}.{hint}"
            )
        found = wanted if wanted is not None else next((name for name in known if name in first), None)
        if found is None:
            raise UserError(f"{self.name}: no column is called {' or '.join(known[:3])}. Name it with --{option}. "
                            f"Columns: {columns}.")  # fmt: skip
        return found

    def column(self, name: str, kind: type | tuple[type, ...] = object) -> list[Any]:
        """A column's values.

        Raises:
            UserError: a record does not have it, or has something else than `kind` in it.
        """
        for row, where in zip(self.rows, self.where):
            if name not in row:
                raise UserError(f"{where}: no column '{name}' (there are: {', '.join(row)})")
            if not isinstance(row[name], kind) or row[name] is None:
                wanted = "a text" if kind is str else "a list" if kind is list else "a value"
                raise UserError(f"{where}: column '{name}' should hold {wanted}, not {row[name]!r:.40}")
        return [row[name] for row in self.rows]

    def part(self, numbers: Iterable[int]) -> Table:
        numbers = list(numbers)
        return Table(self.name, [self.rows[i] for i in numbers], [self.where[i] for i in numbers])

    @property
    def fingerprint(self) -> str:
        """Equal for equal records."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True, default=str).encode()).hexdigest()


def open_tables(
    data: str | Sequence[str], validation_data: str | Sequence[str] | None = None, *, validation_fraction: float = 0.1,
    seed: int = 0, header: bool = True, on_bad_record: str = "raise",
) -> tuple[Table, Table]:  # fmt: skip
    """(to learn from, held out).

    Args:
        data: see the top of this file.
        validation_data: the held-out records, named like data. By default built-in worlds make their own, and of other
            data `validation_fraction` is held out, chosen at random.
        header: whether the first line of a .csv or .tsv names the columns; if not, their names are 1, 2, 3, ...

    Raises:
        UserError: nothing there, no record in it, or a record that cannot be read.
    """
    skip = on_bad_record == "skip"
    specs = [data] if isinstance(data, str) else list(data)
    whole = _read(specs, "train", seed, header, skip)
    if validation_data is not None:
        others = [validation_data] if isinstance(validation_data, str) else list(validation_data)
        return whole, _read(others, "validation", seed, header, skip)
    if all(_world(spec) for spec in specs):
        return whole, _read(specs, "validation", seed, header, skip)
    if len(whole) < 2:
        raise UserError(f"{whole.name} has one record: nothing could be held out. Name more in --validation_data.")
    order = np.random.default_rng(seed % 2**64).permutation(len(whole))
    count = min(len(whole) - 1, max(1, round(validation_fraction * len(whole))))
    return whole.part(np.sort(order[count:]).tolist()), whole.part(np.sort(order[:count]).tolist())


def _read(specs: list[str], split: str, seed: int, header: bool, skip: bool) -> Table:
    bad, name = BadRecords(skip), " + ".join(map(str, specs))
    if len(specs) == 2 and all(Path(s).is_file() and files.file_format(Path(s)) not in _TABLES for s in specs):
        rows = _parallel(Path(specs[0]), Path(specs[1]))
    else:
        rows = itertools.chain.from_iterable(_rows(str(spec), split, seed, header, bad) for spec in specs)
    table = Table(name, [], [])
    for row, where in rows:
        if not isinstance(row, dict):
            bad.found(where, f"expected an object with named values, found {row!r:.40}")
        else:
            table.rows.append(row)
            table.where.append(where)
    if not table.rows:
        raise UserError(f"{name} holds no record" + f" that can be read; the first: {bad.first}" * bool(bad.first))
    return table


def _rows(spec: str, split: str, seed: int, header: bool, bad: BadRecords) -> Iterator[Row]:
    path = Path(spec).expanduser()
    if path.exists():
        if files.file_format(path) not in _TABLES:
            raise UserError(f"{spec} is no file of records ({', '.join(_TABLES)}, also .gz). Two text files whose "
                            "lines belong together are given as '[one, other]'.")  # fmt: skip
        yield from files.read_rows(path, None if header else "1", bad)
    elif made := _world(spec):
        count = int(spec.partition(":")[2] or WORLD_RECORDS)
        count = count if split == "train" else min(WORLD_VALIDATION, max(1, count // 10))
        records = world(made, seed)
        for i in range(count):
            yield records.record(i, split), f"{spec} ({split}) {i}"  # type: ignore[attr-defined]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[^:/]+){0,2}", spec) and path.suffix not in _TABLES:
        from zero2hero.data.hub import HubDataset, parse_hub_name

        name, config, named = parse_hub_name(spec)
        yield from HubDataset(name, config, named or split).rows()
    else:
        names = [name for name in WORLDS if _world(name)]
        raise UserError(f"no such file: {spec}.{did_you_mean(spec, names)} Built in: {', '.join(names)}.")


def _world(spec: str) -> str | None:
    """The name of the built-in world of records that is meant, if one is."""
    name, _, count = spec.partition(":")
    known = name in WORLDS and hasattr(world(name), "record") and not Path(spec).exists()
    return name if known and (not count or (count.isdecimal() and int(count))) else None


def _parallel(source: Path, target: Path) -> Iterator[Row]:
    sides = [list(files.read_lines(path)) for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{source} has {len(sides[0])} lines and {target} has {len(sides[1])}: line by line they should belong "
            "together"
        )
    for number, (one, other) in enumerate(zip(*sides), start=1):
        yield {SOURCE: one, TARGET: other}, f"{source}, line {number}"


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("-", "", 1).isdecimal()


_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
