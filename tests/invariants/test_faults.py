"""What can go wrong in a run that is left alone: each fault ends in one clear message, the last checkpoint intact."""

from __future__ import annotations

import json
import os
import resource
import signal

import pytest
from test_checkpoints import stepped
from test_training import FILES, kept, make, moments, run_config, same, text, weights  # noqa: F401

from zero2hero import io
from zero2hero.errors import UserError
from zero2hero.train.checkpoint import folder_of, verify
from zero2hero.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_disk_that_fills_at_any_byte(tmp_path):
    """The kernel refuses to let a file grow: what is written until then is there, as on a full disk."""
    trainer = stepped(tmp_path, 1)
    sizes = {path.name: path.stat().st_size for path in folder_of(tmp_path, 1).iterdir()}
    trainer.step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    refused = 0
    for limit in sorted({k for size in sizes.values() for k in (0, 1, size // 2, size - 1)}):
        assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # so that the call fails, and not the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match=r"cannot save .*untouched"):
                trainer.save()
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert kept(tmp_path) == ["step-000001"]
        assert verify(folder_of(tmp_path, 1)) is None
    assert refused > 10
    trainer.save()
    assert make(tmp_path).resume() == 2


def test_a_folder_that_cannot_be_written(text, monkeypatch):  # noqa: F811
    def read_only(path, *arguments, **options):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(UserError, match=r"cannot write into .*run \(Read-only file system\): choose"):
        pretrain(run_config(text, "run"))


def test_a_folder_is_one_runs_alone(tmp_path, text, monkeypatch):  # noqa: F811
    with io.locked(text / "run"):
        with pytest.raises(UserError, match=f"run is in use by another run .process {os.getpid()}"):
            pretrain(run_config(text, "run"))
        with io.locked(tmp_path / "another"):
            pass
    with io.locked(text / "run"):
        assert (text / "run" / ".lock").read_text() == str(os.getpid())


def test_a_damaged_run_yaml(text):  # noqa: F811
    (text / "run").mkdir()
    for content in ("a: [1", "just words", "- 1"):
        (text / "run" / "run.yaml").write_text(content)
        with pytest.raises(UserError, match=r"run\.yaml is damaged"):
            pretrain(run_config(text, "run", resume=True))


def test_a_tokenizer_or_a_text_that_was_exchanged(text):  # noqa: F811
    pretrain(run_config(text, "run"))
    original = (text / "text.txt").read_text()
    (text / "text.txt").write_text(original[:-40])
    with pytest.raises(UserError, match="made with other data than"):
        pretrain(run_config(text, "run", resume=True))
    (text / "text.txt").write_text(original)
    path = text / "run" / "tokenizer.json"
    content = json.loads(path.read_text())
    a, b = list(content["model"]["vocab"])[-2:]
    vocabulary = content["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="made with other data and tokenizer than"):
        pretrain(run_config(text, "run", resume=True))
