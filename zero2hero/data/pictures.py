"""Images with labels, captions, or questions and answers: from what lies on the disk to arrays.

    photos/cat/1.jpg photos/dog/7.png        a folder for each label
    photos/metadata.jsonl                    a table whose image column names files beside it, or in images/ beside it
    t10k-images-idx3-ubyte.gz ...            MNIST's own files (yann.lecun.com/exdb/mnist), in a folder
    data.zip                                 any of these, unpacked once into the cache
    shapes:20000, owner/name                 built-in worlds, and data sets of the hub, as for tables.py

A folder with `train` and `test` (or `validation`) inside holds out the latter. Rows without names, as easy-VQA has
them, are question, answer, image. An image is read once, however many records ask about it.

B, N images, C channels, S height and width.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zero2hero.data import files
from zero2hero.data.files import BadRecords, Row
from zero2hero.data.images import ImageProcessor
from zero2hero.data.tables import Table, open_tables
from zero2hero.data.worlds.raster import png
from zero2hero.errors import UserError
from zero2hero.io import cache_folder
from zero2hero.progress import track

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "path", "img")
LABEL_COLUMNS = ("label", "class", "category", "digit")
CAPTION_COLUMNS = ("caption", "text", "sentence", "description")
QUESTION_COLUMNS = ("question", "prompt", "query")
ANSWER_COLUMNS = ("answer", "response", *CAPTION_COLUMNS, "label")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_UNNAMED = ("question", "answer", "image")
_TRAIN, _HELD_OUT = ("train", "training"), ("test", "validation", "valid", "val", "dev")


def open_pictures(
    data: str, validation_data: str | None = None, *, validation_fraction: float = 0.2, seed: int = 0,
    image_column: str | None = None, on_bad_record: str = "raise",
) -> tuple[Table, Table]:  # fmt: skip
    """(to learn from, held out); each record's `image` is a path, bytes, an array or an image of Pillow's.

    Held out are whole images, with all records about them.

    Raises:
        UserError: nothing there, no record in it, or a record that cannot be read.
    """
    bad = BadRecords(on_bad_record == "skip")

    def read(spec: str) -> tuple[Table, Table | None]:
        path = Path(spec).expanduser()
        if not path.exists():
            train, held = open_tables(spec, validation_fraction=validation_fraction, seed=seed)
            return _with_images(train, image_column), _with_images(held, image_column)
        path = _inside(_unpacked(path) if path.suffix.lower() == ".zip" else path)
        halves = [_part(path, names) for names in (_TRAIN, _HELD_OUT)]
        if halves[0] and halves[1]:
            return _table(halves[0], image_column, bad), _table(halves[1], image_column, bad)
        return _table(path, image_column, bad), None

    whole, held = read(data)
    if validation_data is not None:
        held = read(validation_data)[0]
    return (whole, held) if held is not None else _held_out(whole, validation_fraction, seed)


def _held_out(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    names = [str(row["image"]) if isinstance(row["image"], Path) else i for i, row in enumerate(table.rows)]
    images = list(dict.fromkeys(names))
    if len(images) < 2:
        raise UserError(f"{table.name} has one image: nothing could be held out. Name more in --validation_data.")
    count = min(len(images) - 1, max(1, round(share * len(images))))
    chosen = {images[i] for i in np.random.default_rng(seed % 2**64).permutation(len(images))[:count]}
    return (table.part(i for i, name in enumerate(names) if name not in chosen),
            table.part(i for i, name in enumerate(names) if name in chosen))  # fmt: skip


# --- what lies in a folder --------------------------------------------------------------------------------------


def _table(path: Path, image_column: str | None, bad: BadRecords) -> Table:
    table = Table(str(path), [], [])
    for row, where in _rows(path, image_column, bad):
        table.rows.append(row)
        table.where.append(where)
    if not table.rows:
        raise UserError(f"{path} holds no image that can be read" + f"; the first: {bad.first}" * bool(bad.first))
    return table


def _rows(path: Path, image_column: str | None, bad: BadRecords) -> Iterator[Row]:
    if path.is_file():
        if files.file_format(path) not in TABLES:
            raise UserError(f"{path} is no folder of images and no table of them ({', '.join(TABLES)})")
        yield from _records(path, image_column, bad)
        return
    if pairs := sorted(path.glob("*images*idx3-ubyte*")):
        for images in pairs:
            yield from _mnist(images)
        return
    tables = sorted(file for file in path.iterdir() if files.file_format(file) in TABLES)
    if tables:
        for table in tables:
            yield from _records(table, image_column, bad)
        return
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                yield {"image": file, "label": folder.name}, str(file)


def _records(path: Path, image_column: str | None, bad: BadRecords) -> Iterator[Row]:
    for row, where in files.read_rows(path, None, bad):
        if isinstance(row, list) and len(row) == len(_UNNAMED):
            row = dict(zip(_UNNAMED, row))
        if not isinstance(row, dict):
            bad.found(where, f"expected an object with named values, or {', '.join(_UNNAMED)}; found {row!r:.40}")
            continue
        yield {**row, "image": _image(row, where, image_column, path.parent)}, where


def _with_images(table: Table, image_column: str | None) -> Table:
    rows = [{**row, "image": _image(row, where, image_column, Path())} for row, where in zip(table.rows, table.where)]
    return dataclasses.replace(table, rows=rows)


def _image(row: dict[str, Any], where: str, column: str | None, folder: Path) -> Any:
    """The image of a record: a file's path, as an image column gives it; or bytes, an array, an image of Pillow's."""
    name = column or next((known for known in IMAGE_COLUMNS if known in row), None)
    if name is None or name not in row:
        raise UserError(f"{where}: no image. Name its column with --image_column; columns: {', '.join(row)}")
    value = row[name]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):  # as the datasets library stores images
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, int)):
        return value
    ends = ("",) if Path(str(value)).suffix.lower() in SUFFIXES else SUFFIXES
    places = [base / f"{value}{end}" for base in (folder, folder / "images") for end in ends]
    return next((place for place in places if place.is_file()), places[0])


def _mnist(images: Path) -> Iterator[Row]:
    """An idx file begins with zeros, the type of its numbers (8: bytes), how many dimensions, and their sizes."""
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if not labels.exists():
        raise UserError(f"the labels are missing: {images} is there, {labels.name} beside it is not")
    pixels, numbers = _idx(images, 3), _idx(labels, 1)
    if len(pixels) != len(numbers):
        raise UserError(f"{images} has {len(pixels)} images, {labels.name} has {len(numbers)} labels")
    for i, (image, number) in enumerate(zip(pixels, numbers)):
        yield {"image": image, "label": str(number)}, f"{images}, image {i}"


def _idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is damaged and cannot be unpacked ({error}): fetch it again") from None
    whole = len(content) >= 4 + 4 * dimensions
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist() if whole else []
    if content[:4] != bytes([0, 0, 8, dimensions]) or math.prod(shape) != len(content) - 4 - 4 * dimensions:
        raise UserError(f"{path} is no whole idx file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _part(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None) if folder.is_dir() else None


def _inside(path: Path) -> Path:
    """The first folder on the way down that holds more than one folder and nothing else."""
    while path.is_dir():
        content = [p for p in path.iterdir() if not p.name.startswith((".", "__MACOSX"))]
        if len(content) != 1 or not content[0].is_dir() or any(p.suffix in SUFFIXES for p in content[0].iterdir()):
            break
        path = content[0]
    return path


def _unpacked(path: Path) -> Path:
    """The folder in the cache where the content of a .zip lies."""
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "unpacked" / f"{path.stem}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            with zipfile.ZipFile(path) as archive:  # which keeps to its folder, whatever names the members have
                archive.extractall(Path(temporary) / "content")
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise UserError(f"{path} cannot be unpacked: {error}") from None
        shutil.move(Path(temporary) / "content", folder)
    return folder


# --- pixels -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images of a table: pixels uint8 [N, C, S, S], each once; `of_record[i]` is the number of record i's image."""

    pixels: np.ndarray
    of_record: np.ndarray

    @classmethod
    def read(cls, table: Table, processor: ImageProcessor, on_bad_record: str = "raise") -> tuple[Pictures, Table]:
        """All images of a table at the processor's size, and the table of the records whose image could be read.

        Raises:
            UserError: an image that cannot be read, by its name, unless such are skipped.
        """
        whole = dataclasses.replace(processor, do_rescale=False, do_normalize=False)
        bad, numbers, pixels, kept, of_record = BadRecords(on_bad_record == "skip"), {}, [], [], []
        for i, (row, where) in enumerate(track(list(zip(table.rows, table.where)), "reading images")):
            image = row["image"]
            key = str(image) if isinstance(image, (str, Path)) else i
            if key not in numbers:
                try:
                    pixels.append(_pixels(image, whole))
                except UserError as error:
                    bad.found(where, str(error))
                    continue
                numbers[key] = len(pixels) - 1
            kept.append(i)
            of_record.append(numbers[key])
        if not kept:
            raise UserError(f"{table.name}: no image can be read; the first: {bad.first}")
        return cls(np.stack(pixels), np.array(of_record)), table.part(kept)

    @property
    def fingerprint(self) -> str:
        """Equal for equal pixels."""
        return hashlib.sha256(self.pixels.tobytes() + self.of_record.tobytes()).hexdigest()


def _pixels(image: Any, processor: ImageProcessor) -> np.ndarray:
    """uint8 [C, S, S]"""
    channels, side = len(processor.image_mean), processor.size.get("height")
    if isinstance(image, np.ndarray):
        grey, square = image.ndim == 2, image.shape[:2] == (side, side) == (side, processor.size.get("width"))
        if square and (grey or channels == 3) and not processor.do_center_crop:  # nothing to do, nor Pillow needed
            planes = image[None] if grey else image.transpose(2, 0, 1)
            return np.broadcast_to(planes, (channels, *planes.shape[1:]))
        image = png(image)
    return processor([image])[0].numpy().astype(np.uint8)


def fingerprint(table: Table, pictures: Pictures) -> str:
    """Equal for equal records and pixels."""
    rows = [{name: value for name, value in row.items() if name != "image"} for row in table.rows]
    words = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256((words + pictures.fingerprint).encode()).hexdigest()
