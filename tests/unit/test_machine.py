"""The machine is measured once; bf16 that kills a process is mended or left; files are never half-written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from zero2hero import io, machine
from zero2hero.errors import UserError
from zero2hero.machine import BF16_SETUPS, Machine


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ZERO2HERO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "machine.json"


@pytest.fixture
def measured(monkeypatch):
    """Stands for the measurement: `answers` by (dtype, setup), and the list of questions asked."""

    class Measured:
        def __init__(self):
            self.answers = {("float32", "as is"): 1e11, ("bfloat16", "as is"): 3e11}
            self.asked = []

        def __call__(self, dtype, threads, setup):
            self.asked.append((dtype, setup))
            return self.answers.get((dtype, setup))

    stand_in = Measured()
    monkeypatch.setattr(machine, "_measured", stand_in)
    return stand_in


# --- measured once ------------------------------------------------------------------------------------------


def test_measured_once_and_remembered(cache, measured):
    found = machine.machine()
    assert (found.fp32_flops, found.bf16_flops, found.bf16_setup) == (1e11, 3e11, "as is")
    assert found.cores == torch.get_num_threads()
    assert found.processor == machine.processor_name()
    assert len(measured.asked) == 2
    assert machine.machine() == found
    assert len(measured.asked) == 2


@pytest.mark.parametrize("change", ["threads", "processor", "torch"])
def test_another_machine_is_measured_anew_and_the_first_not_forgotten(cache, measured, monkeypatch, change):
    first = machine.machine()
    with monkeypatch.context() as other:
        if change == "threads":
            other.setattr(torch, "get_num_threads", lambda: 77)
        elif change == "processor":
            other.setattr(machine, "processor_name", lambda: "another processor")
        else:
            other.setattr(torch, "__version__", "9.9")
        machine.machine()
        assert len(measured.asked) == 4
    assert machine.machine() == first
    assert len(measured.asked) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"key": "x"}', "[[1]]"])
def test_a_broken_cache_is_replaced(cache, measured, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    found = machine.machine()
    assert machine.machine() == found
    assert len(measured.asked) == 2
    entry = {key: {**value, "unknown": 1} for key, value in json.loads(cache.read_text()).items() if "torch" in key}
    cache.write_text(json.dumps(entry))  # of another version of the program
    assert machine.machine() == found
    assert len(measured.asked) == 4


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, measured, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ZERO2HERO_CACHE", str(tmp_path / "file"))
    assert machine.machine() == machine.machine()
    assert len(measured.asked) == 4


# --- bf16 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", [0, 1, 2, 3])
def test_bf16_falls_through_the_setups(cache, measured, dies):
    """Each setup under which the process dies gives None."""
    for setup in BF16_SETUPS[dies:]:
        measured.answers["bfloat16", setup] = 2e11
    for setup in BF16_SETUPS[:dies]:
        measured.answers["bfloat16", setup] = None
    found = machine.machine()
    tried = [setup for dtype, setup in measured.asked if dtype == "bfloat16"]
    assert tried == list(BF16_SETUPS[: dies + 1])
    assert found.bf16_setup == BF16_SETUPS[min(dies, 2)]
    assert found.bf16_flops == (2e11 if dies < 3 else 0.0)
    assert found.bf16_pays == (dies < 3)


def test_bf16_must_pay():
    assert not Machine("p", 2, 1e11, 1.2e11, "as is").bf16_pays
    assert Machine("p", 2, 1e11, 1.5e11, "as is").bf16_pays
    assert not Machine("p", 2, 1e11, 0.0, "no tiles").bf16_pays
    assert Machine("p", 2, 1.0, 2.0, "as is").flops("bf16") == 2.0
    assert Machine("p", 2, 1.0, 2.0, "as is").flops("float32") == 1.0


def test_a_process_that_dies_is_an_answer(monkeypatch):
    """The measurement itself, in a real process: one that crashes, one that is wrong, one that prints nonsense."""
    for program in ("import os; os.abort()", "assert False", "print('fast')", "import os; os.kill(os.getpid(), 4)"):
        monkeypatch.setattr(machine, "_MEASURE", program)
        assert machine._measured("bfloat16", 1, "as is") is None
    monkeypatch.setattr(machine, "_MEASURE", "import sys; print(len(sys.argv[1:]) * 1e9)")
    assert machine._measured("bfloat16", 1, "as is") == 3e9


def test_without_tiles_when_the_setup_fails(cache, measured, monkeypatch):
    """A cache folder copied from another machine, say, or no C compiler any more."""
    asked = []

    def set_up(setup):
        asked.append(setup)
        if setup != "no tiles":
            raise OSError("no compiler")

    measured.answers["bfloat16", "as is"] = None
    measured.answers["bfloat16", "tiles described"] = 2e11
    monkeypatch.setattr(machine, "set_up_bf16", set_up)
    with pytest.warns(UserWarning, match="no compiler"):
        assert machine.prepare().bf16_setup == "tiles described"
    assert asked == ["tiles described", "no tiles"]


@pytest.mark.usefixtures("bf16")
def test_bf16_products_are_right_once_prepared():
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in [(64, 64, 64), (3, 100, 7), (130, 1, 5), (257, 31, 33)]:
        a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, inner), (inner, columns)))
        exact = a.double() @ b.double()
        assert ((a @ b).double() - exact).norm() < 0.01 * exact.norm()


# --- files --------------------------------------------------------------------------------------------------


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    io.atomic_write(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    io.atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert entries(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "file.txt"
    io.atomic_write(path, "old")

    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            io.atomic_write(path, "new")
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert "What was there before is untouched" in str(caught.value)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["file.txt"]


def test_atomic_directory(tmp_path):
    for content in ("first", "second"):
        with io.atomic_directory(tmp_path / "folder") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(content)
            assert temporary.parent == tmp_path  # on the same file system, or a rename would copy
        assert (tmp_path / "folder" / "sub" / "file").read_text() == content
        assert entries(tmp_path) == ["folder"]


class Accident(Exception):
    pass


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("where", ["the block", "fsync", "the last rename"])
def test_a_directory_that_fails_leaves_the_old_one(tmp_path, monkeypatch, existing, where):
    path = tmp_path / "folder"
    if existing:
        with io.atomic_directory(path) as temporary:
            (temporary / "file").write_text("old")
    rename = os.rename

    def last_rename_fails(source, target):
        if Path(target) == path and "was" not in Path(source).name:
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, target)

    def fsync_fails(path):
        raise OSError(errno.EIO, "Input/output error")

    if where == "the last rename":
        monkeypatch.setattr(os, "rename", last_rename_fails)
    elif where == "fsync":
        monkeypatch.setattr(io, "fsync_path", fsync_fails)

    def attempt() -> None:
        with io.atomic_directory(path) as temporary:
            (temporary / "file").write_text("new")
            if where == "the block":
                raise Accident

    with pytest.raises(Accident if where == "the block" else UserError):
        attempt()
    assert entries(tmp_path) == (["folder"] if existing else [])
    if existing:
        assert (path / "file").read_text() == "old"
