"""Files that are never half-written, and folders that only one process writes to.

A crash, a full disk or a power cut must leave either the old file or the new one. Write under a temporary
name in the same folder, flush to the disk (`fsync`), then rename: POSIX makes the rename atomic. The folder
is fsynced as well, because the rename itself lives there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from zero2hero.errors import UserError


def cache_folder() -> Path:
    """Where what can be made again is kept: `$ZERO2HERO_CACHE`, or ~/.cache/zero2hero."""
    return Path(os.environ.get("ZERO2HERO_CACHE") or Path.home() / ".cache" / "zero2hero")


def fsync_path(path: str | Path) -> None:
    """Force a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn an `OSError` (disk full, read-only) into a `UserError` that says the old file is intact."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot save {path}: {reason}. What was there before is untouched; "
            "free some space or choose another --output_dir."
        ) from error


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of `folder`. The kernel takes the lock back when this one ends, however it ends.

    Raises:
        UserError: another process has it, or the folder cannot be written.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(
            f"cannot write into {folder} ({error.strerror or error}): choose another --output_dir"
        ) from error
    with stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise UserError(
                f"{folder} is in use by another run (process {stream.read().strip() or 'unknown'}). Wait for it, "
                "stop it, or choose another --output_dir."
            ) from None
        except ImportError:  # Windows has no flock
            pass
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step; on any failure the old content stays."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_path(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; when the block succeeds it becomes `path`.

    Every file in it is fsynced first. An existing folder at `path` is set aside, and removed only when
    the new one stands in its place.
    """
    path = Path(path)
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    fsync_path(os.path.join(folder, name))
                fsync_path(folder)
            old = None
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                os.rename(path, old / "was")
            try:
                os.rename(temporary, path)
            except OSError:
                if old is not None:
                    os.rename(old / "was", path)
                    os.rmdir(old)
                raise
            fsync_path(path.parent)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
