"""Where a model's files are: a folder of this machine, or a repository of the Hugging Face hub and its cache.

The hub is asked once whether there is something newer; when it cannot be reached (or HF_HUB_OFFLINE says not to try),
what its cache holds is used. Only numbers, JSON and text are fetched, never code and never pickles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zero2hero.errors import UserError, did_you_mean

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def find_folder(
    source: str | Path, needed: str = "config.json", files: Sequence[str] = MODEL_FILES, revision: str | None = None
) -> Path:
    """A local folder as it is, or the snapshot of a hub id.

    Args:
        source: a folder, or `owner/name`.
        needed: a file that every such folder has.
        files: patterns of the files to fetch.
        revision: a branch, tag or commit of the hub.

    Raises:
        UserError: neither a folder nor a hub id that can be read.
    """
    name, path = str(source), Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; give the folder that holds {needed}")
    near = did_you_mean(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()])
    if not name or name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"there is no folder {name!r}.{near}")
    return _from_hub(name, needed, files, revision, near)


def _from_hub(name: str, needed: str, files: Sequence[str], revision: str | None, near: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except RevisionNotFoundError:
        raise UserError(f"{name!r} has no revision {revision!r} on the hub") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{name!r} is neither a folder here nor a repository that the hub lets you read (a private or gated one "
            f"needs `hf auth login`).{near}"
        ) from None
    except Exception as error:  # of many kinds: no network, a proxy's refusal, a cache with some of the files
        cached = huggingface_hub.try_to_load_from_cache(name, needed, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        raise UserError(
            f"there is no folder {name!r} here; it may be a hub id, but the hub cannot be reached and its cache does "
            f"not have it ({type(error).__name__}).{near}"
        ) from error
