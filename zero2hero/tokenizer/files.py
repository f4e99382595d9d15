"""Where a tokenizer's files come from: a folder, or the Hugging Face hub and its cache.

Only JSON and text are read; nothing that a repository carries is ever run.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero2hero.errors import UserError
from zero2hero.fetch import find_folder
from zero2hero.tokenizer.older import OLDER_FILES, read_older_files

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json",
          *OLDER_FILES)  # fmt: skip


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
    folder = find_folder(source, "tokenizer.json", _FILES, revision)
    read = functools.partial(_read, folder)
    config = _json_object(read("tokenizer_config.json"), f"{source}/tokenizer_config.json")
    older_roles = _json_object(read("special_tokens_map.json"), f"{source}/special_tokens_map.json")
    config = older_roles | config
    tokenizer_json = read("tokenizer.json")
    if tokenizer_json is None:
        model = _json_object(read("config.json"), f"{source}/config.json")
        older = read_older_files(folder, config, str(model.get("model_type")))
        if older is None:
            raise UserError(f"there is no tokenizer.json in {source}, and no {', '.join(OLDER_FILES)}")
        raw, config = older
        tokenizer_json = raw.to_str()
    template = read("chat_template.jinja") or _default_template(config.get("chat_template"))
    return TokenizerFiles(str(source), tokenizer_json, config, template)


def _read(folder: Path, name: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None


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
