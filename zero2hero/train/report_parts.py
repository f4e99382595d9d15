"""What a page about a run is made of: what its folder says, sections, and the pieces that these are put together from.

Text that comes from the run is escaped: what a model writes is data, also when it looks like HTML.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.progress import visible
from zero2hero.train import plots
from zero2hero.train.tracking import Units, read_metrics

SAMPLE_CHARACTERS = 1500  # of each text


@dataclass(frozen=True)
class Run:
    """What a run's folder says about it."""

    path: Path
    rows: list[dict[str, Any]]  # metrics.jsonl
    settings: dict[str, Any]  # run.yaml; empty when absent
    config: dict[str, Any]  # config.json; empty when absent
    predictions: dict[str, Any]  # predictions.json; empty when absent

    @classmethod
    def read(cls, run_dir: str | Path) -> Run:
        """Raises `UserError` when there is no metrics.jsonl or a file is broken."""
        path = Path(run_dir)
        return cls(
            path,
            read_metrics(path),
            read_mapping(path / "run.yaml", yaml.safe_load),
            read_mapping(path / "config.json", json.loads),
            read_mapping(path / "predictions.json", json.loads),
        )

    @property
    def units(self) -> Units:
        return Units.of(self.rows)

    def values(self, name: str) -> list[Any]:
        """All that was recorded under `name`, in order."""
        return [row[name] for row in self.rows if name in row]

    def last(self, name: str) -> Any:
        """The last thing recorded under `name`, or None."""
        return next(reversed(self.values(name)), None)


@dataclass(frozen=True)
class Section:
    title: str
    html: str  # ready to be put on the page: whoever makes a section escapes what is not its own


def pictures(run: Run, figures: Mapping[str, plots.Draw]) -> str:
    """Figures, once for light and once for dark surroundings; the light ones also go to plots/.

    Raises `ImportError` when matplotlib is missing.
    """
    light = plots.draw(run.rows, run.config, plots.LIGHT, figures)
    dark = plots.draw(run.rows, run.config, plots.DARK, figures)
    shown = []
    for name, image in light.items():
        atomic_write(run.path / "plots" / f"{name}.png", image)
        shown.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark[name])}">'
            f'<img alt="{name.replace("_", " ")} over the course of the run" src="{_data_uri(image)}"></picture>'
        )
    return "\n".join(shown)


def escape(text: object) -> str:
    """Text of any origin, made safe to stand in the page, in an attribute too."""
    return html.escape(visible(str(text)).encode("utf-8", "replace").decode("utf-8"), quote=True)


def shorten(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " …"


def duration(seconds: float) -> str:
    """48 s, 5 min 2 s, 3 h 20 min."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute} min" if hours else f"{minute} min {second} s" if minute else f"{second} s"


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a mapping of names to values, not {type(found).__name__}")
    return found


def table_of(title: str, values: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    caption = f"<caption>{escape(title)}</caption>" if title else ""
    rows = (f'<tr><th scope="row">{escape(k)}</th><td>{escape(show(v))}</td></tr>' for k, v in values.items())
    return f"<table>{caption}<tbody>{''.join(rows)}</tbody></table>"


def _data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
