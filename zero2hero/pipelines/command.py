"""`zero2hero run-pipeline`: one input from the command line or many from a file; each result is a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from zero2hero.errors import UserError
from zero2hero.options import RunPipelineConfig
from zero2hero.pipelines import Pipeline, pipeline


def run(config: RunPipelineConfig) -> None:
    """Print the results as they are made."""
    from zero2hero import machine

    machine.prepare()
    task = pipeline(config.task, config.model, device=config.device, dtype=config.dtype, **config.settings)
    if config.file is None:
        results = iter([task(_parsed(task, config.text))])
    else:
        results = task(_lines(Path(config.file)), batch_size=config.batch_size)
    for result in results:
        print(json.dumps(result, ensure_ascii=False), flush=True)


def _parsed(task: Pipeline, text: str) -> Any:
    """A text as it is, or what it says as JSON where that is an input of the task."""
    with suppress(ValueError):
        value = json.loads(text)
        if not isinstance(value, str) and task.is_one(value):
            return value
    return text


def _lines(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line) if path.suffix == ".jsonl" else line.rstrip("\r\n")
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
