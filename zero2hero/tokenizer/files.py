"""Where a tokenizer's files come from: a folder, or the Hugging Face hub and its cache.

Only JSON and text are read; nothing that a repository carries is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero2hero.errors import UserError, did_you_mean

_OLDER_FORMATS = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "tekken.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """What was found at `source`: the tokenizer, its configuration, and the chat template if any."""

    source: str
    tokenizer_json: str
    config: dict[str, Any]
    chat_template: str | None

    def where(self, name: str) -> str:
        return f"{self.source}/{name}"


def read_tokenizer_files(source: str | Path, revision: str | None = None) -> TokenizerFiles:
    """Read the files of `source`; `UserError` when one is missing or is not what it should be."""
    read = _folder_reader(Path(source)) if Path(source).exists() else _hub_reader(str(source), revision)
    tokenizer_json = read("tokenizer.json")
    if tokenizer_json is None:
        older = [name for name in _OLDER_FORMATS if (Path(source) / name).exists()]
        hint = (
            f" It has {', '.join(older)}, an older format: convert it once with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            if older
            else ""
        )
        raise UserError(f"there is no tokenizer.json in {source}.{hint}")
    config = _json_object(read("tokenizer_config.json"), f"{source}/tokenizer_config.json")
    older_roles = _json_object(read("special_tokens_map.json"), f"{source}/special_tokens_map.json")
    config = older_roles | config
    template = read("chat_template.jinja") or _default_template(config.get("chat_template"))
    return TokenizerFiles(str(source), tokenizer_json, config, template)


def _json_object(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}: not valid JSON: {error.msg}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def _default_template(entry: Any) -> str | None:
    """A chat template is a string, or in older files a list of named ones of which one is the default."""
    if isinstance(entry, list):
        return next((item["template"] for item in entry if item.get("name") == "default"), None)
    return entry


def _nearest_folder(source: str) -> str:
    parent = Path(source).parent
    folders = [str(parent / entry.name) for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return did_you_mean(source, folders)


Reader = Callable[[str], "str | None"]


def _folder_reader(folder: Path) -> Reader:
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give the folder that holds tokenizer.json.")

    def read(name: str) -> str | None:
        path = folder / name
        if not path.is_file():
            return None
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}.") from None

    return read


def _hub_reader(source: str, revision: str | None) -> Reader:
    parent = Path(source).expanduser().parent
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or not source
    if looks_local or (parent != Path(".") and parent.is_dir()):
        raise UserError(f"there is no folder {source!r}.{_nearest_folder(source)}")

    def read(name: str) -> str | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            return Path(hf_hub_download(source, name, revision=revision)).read_text(encoding="utf-8")
        except LocalEntryNotFoundError:
            if name != "tokenizer.json":
                return None
            raise UserError(
                f"{source!r} is not a folder here, and the hub cannot be reached for it (offline, and not in "
                f"the cache).{_nearest_folder(source)}"
            ) from None
        except (RepositoryNotFoundError, HFValidationError):
            raise UserError(
                f"{source!r} is neither a folder here nor a model that the hub lets you read (a private or "
                f"gated one needs 'hf auth login').{_nearest_folder(source)}"
            ) from None
        except RevisionNotFoundError:
            raise UserError(f"{source!r} has no revision {revision!r}.") from None
        except EntryNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {name} of {source!r} from the hub: {error}.") from None

    return read
