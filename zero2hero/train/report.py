"""report.html: one page that shows how a run went, to read, to keep and to send.

It is a single file without scripts or outside resources, so it opens from a disk, from a mail or under a
strict Content-Security-Policy, and says the same in ten years. Everything on it is read from the run's
folder: metrics.jsonl (see `tracking`), run.yaml, config.json and the header of model.safetensors. Text that
comes from the run is escaped: what a model writes is data, also when it looks like HTML.

The page is a list of sections, each a function of the run. A later stage adds its own to `SECTIONS`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from zero2hero import __version__
from zero2hero.io import atomic_write
from zero2hero.progress import human_bytes, human_count
from zero2hero.train import plots
from zero2hero.train.diagnosis import CHECKS, Finding, diagnose
from zero2hero.train.report_alignment import attempts, completions, overoptimization, preferences
from zero2hero.train.report_parts import Run, Section, duration, escape, pictures, shorten, table_of
from zero2hero.train.tracking import Units

COLUMNS_OF_SAMPLES = 4  # steps shown side by side, from the first to the last
LABELS_SHOWN = 40  # at most, in a table of confusions


def write_report(run_dir: str | Path) -> Path:
    """Write `plots/*.png` and `report.html` into a run's folder; returns the path of the report.

    May be called while the run still trains. Without matplotlib the page says how to get the curves.
    """
    run = Run.read(run_dir)
    sections = [section for build in SECTIONS if (section := build(run)) is not None]
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    style = template.split("<style>")[1].split("</style>")[0]
    page = string.Template(template).substitute(
        title=escape(run.path.resolve().name),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        header=header(run),
        sections="\n".join(f"<section>\n<h2>{escape(s.title)}</h2>\n{s.html}\n</section>" for s in sections),
        version=__version__,
        units=escape(run.units.of_loss),
    )
    path = run.path / "report.html"
    atomic_write(path, page)
    return path


def header(run: Run) -> str:
    """The outcome in one line, and the run in numbers."""
    units = run.units
    facts = {
        "parameters": _maybe(human_count, parameter_count(run.path / "model.safetensors")),
        f"{units.item}s seen": _maybe(human_count, run.last(units.seen)),
        "steps": _maybe(str, max((row["step"] for row in run.rows), default=None)),
        "training time": _maybe(duration, run.rows[-1].get("time") if run.rows else None),
        f"{units.item}s per second": _maybe(human_count, _typical(run, units.rate)),
        "peak memory": _maybe(human_bytes, run.last("peak_memory")),
        "of matmul peak": _maybe("{:.0%}".format, _typical(run, "peak_share")),
    }
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items() if value)
    return f'<p class="outcome">{outcome(run)}</p>\n<dl class="facts">{"".join(cells)}</dl>'


def outcome(run: Run) -> str:
    """One line: how good the model became, in the measures that are known."""
    name, loss = "held-out loss", run.last("eval_loss")
    if loss is None:
        name, loss = "training loss", run.last("loss")
    if loss is None:
        return "No loss has been recorded yet."
    if not math.isfinite(loss):
        return f"The run diverged: its last {name} is {loss}. A lower learning rate or a longer warmup may help."
    if earned := run.values("eval_reward"):
        return f"<strong>Reward of held-out prompts {earned[-1]:.3f}</strong>, {earned[0]:.3f} before."
    if (accuracy := run.last("eval_accuracy")) is not None:
        return f"<strong>Held-out accuracy {accuracy:.1%}</strong>, at a {name} of {loss:.3f} {run.units.of_loss}."
    if (accuracy := run.last("eval_rewards/accuracies")) is not None:
        return _preferences(run, accuracy, f"at a {name} of {loss:.3f} {escape(run.units.of_loss)}")
    measures = [f"perplexity {math.exp(min(loss, 99)):.4g}"] if run.units == Units() else []
    if (bits := run.last("eval_bits_per_byte")) is not None:
        measures.append(f"{bits:.3f} bits per byte")
    text = f"<strong>{name.capitalize()} {loss:.3f}</strong> {escape(run.units.of_loss)}"
    text += f" ({', '.join(measures)})" if measures else ""
    if (baseline := run.last("ngram_nll")) is not None:
        order = run.last("ngram_order") or "n"
        text += f"; a {order}-gram model of the same text reaches {baseline:.3f}"
    if found := run.values("eval_exact_match"):
        text += f"; {found[-1]:.0%} of held-out answers are right word for word, {found[0]:.0%} before"
    if kept := run.values("eval_retain_loss"):
        text += f"; on the text of before, the loss went from {kept[0]:.3f} to {kept[-1]:.3f}"
    best = min((value for value in run.values("eval_loss") if math.isfinite(value)), default=loss)
    if best < loss - 0.001:
        text += f"; the best on the way was {best:.3f}"
    return text + "."


def _preferences(run: Run, accuracy: float, loss: str) -> str:
    """How often the model prefers what people prefer, and how far it went for that."""
    text = f"<strong>It prefers what people prefer in {accuracy:.1%} of held-out cases</strong>"
    low, high = run.last("eval_rewards/accuracies_low"), run.last("eval_rewards/accuracies_high")
    if low is not None:
        text += f" (95 % interval {low:.0%} to {high:.0%})"
    text += f", {loss}"
    if (kl := run.last("eval_kl")) is not None:
        text += f"; its KL to the model as it was is {kl:.2g} nats an answer"
    if (wins := run.last("eval_win_rate")) is not None:
        text += f"; raters would like {wins:.0%} of its answers better than those of before"
    return text + "."


def curves(run: Run) -> Section | None:
    """The figures of the run's course."""
    try:
        shown = pictures(run, plots.FIGURES)
        if scores := pictures(run, plots.SCORES):
            shown += f'<div class="small">{scores}</div>'
    except ImportError:
        hint = "Curves need matplotlib: <code>pip install 'zero2hero[train]'</code>, then write this page again."
        shown = f'<p class="quiet">{hint}</p>'
    return Section("Curves", shown) if shown else None


def health(run: Run) -> Section | None:
    """What looks wrong, what to try, and the vital signs to look at; or what was checked and found sound."""
    if not any("loss" in row for row in run.rows):
        return None
    findings = diagnose(run.rows, run.config)
    if findings:
        words = "".join(_finding(finding) for finding in findings)
    else:
        words = f"<p>Nothing looks wrong. Checked: {escape(', '.join(CHECKS))}.</p>"
    with contextlib.suppress(ImportError):  # said above
        words += f'<div class="small">{pictures(run, plots.HEALTH)}</div>'
    return Section("Diagnosis", words)


def _finding(finding: Finding) -> str:
    def text(words: str) -> str:
        return re.sub("`([^`]*)`", r"<code>\1</code>", escape(words))

    kind = "finding serious" if finding.serious else "finding"
    return (
        f'<div class="{kind}"><h3>{escape(finding.name.capitalize())}</h3><p>{text(finding.what)}</p>'
        f'<p class="quiet">{text(finding.evidence)}</p><p>Try: {text(finding.advice)}.</p></div>'
    )


def samples(run: Run) -> Section | None:
    """What the model wrote, early to late side by side: a row for each prompt, a column for each step."""
    recorded = {row["step"]: row["samples"] for row in run.rows if row.get("samples")}
    if not recorded:
        return None
    steps = sorted(recorded)
    last = len(steps) - 1
    columns = min(COLUMNS_OF_SAMPLES, len(steps))
    steps = sorted({steps[round(last * column / max(columns - 1, 1))] for column in range(columns)})
    texts = {(s["prompt"], step): s["text"] for step in steps for s in recorded[step]}

    def cell(prompt: str, step: int) -> str:
        text = f"…{texts[prompt, step]}" if (prompt, step) in texts else ""
        return f'<div class="sample"><h3>step {step}</h3><p dir="auto">{escape(shorten(text))}</p></div>'

    def row(prompt: str) -> str:
        cells = "".join(cell(prompt, step) for step in steps)
        return f'<div><p class="prompt" dir="auto">{escape(prompt)}</p><div class="row">{cells}</div></div>'

    rows = "".join(row(prompt) for prompt in dict.fromkeys(prompt for prompt, _ in texts))
    return Section("What it writes", f'<div class="samples">{rows}</div>')


def seen(run: Run) -> Section | None:
    """Held-out pictures with what the finished model says of them, mistakes first (see predictions.py)."""
    pictures = run.predictions.get("pictures")
    if not pictures:
        return None

    def cell(shown: Mapping[str, Any]) -> str:
        wrong = shown["prediction"] != shown["truth"]
        question = f'<p class="quiet">{escape(shown["question"])}</p>' if shown["question"] else ""
        truth = f"<p>not {escape(shown['prediction'])}</p>" if wrong else ""
        image = f'<img alt="{escape(shown["truth"])}" src="data:image/png;base64,{escape(shown["png"])}">'
        words = f"{question}<p><b>{escape(shown['truth'])}</b></p>{truth}"
        return f'<div class="seen{" wrong" * wrong}">{image}{words}</div>'

    return Section("Held-out pictures", f'<div class="pictures">{"".join(map(cell, pictures))}</div>')


def confusion(run: Run) -> Section | None:
    """How often each label was taken for each other one."""
    labels, matrix = run.predictions.get("labels"), run.predictions.get("confusion")
    if not labels or not matrix or len(labels) > LABELS_SHOWN:
        return None

    def cell(count: int, total: int, right: bool) -> str:
        strength = 0 if not count else min(4, 1 + int(4 * count / total))  # of five shades
        return f'<td class="{"hit" if right else "miss"}{strength}">{count or ""}</td>'

    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(cell(n, max(1, sum(row)), i == j) for j, n in enumerate(row))}</tr>"
        for i, (label, row) in enumerate(zip(labels, matrix))
    )
    words = '<p class="quiet">A row for each true label, a column for what the model took it for.</p>'
    table = f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return Section("Confusions", words + table)


def settings(run: Run) -> Section | None:
    """run.yaml as tables, one for each of its sections."""
    if not run.settings:
        return None
    groups: dict[str, dict[str, Any]] = {"run": {}}
    for name, value in run.settings.items():
        if isinstance(value, Mapping):
            groups[name] = dict(_flat(value))
        else:
            groups["run"][name] = value
    tables = "".join(table_of(name, values) for name, values in groups.items() if values)
    return Section("Settings", f'<div class="tables">{tables}</div>')


def machine(run: Run) -> Section | None:
    """What it ran on, when the run recorded it."""
    found = run.last("machine")
    return Section("Machine", f'<div class="tables">{table_of("", found)}</div>') if found else None


# the body of the page, in order; a builder returns None when the run has nothing to show in it
SECTIONS: list[Callable[[Run], Section | None]] = [
    curves,
    attempts,
    preferences,
    overoptimization,
    health,
    seen,
    confusion,
    completions,
    samples,
    settings,
    machine,
]


def parameter_count(path: Path) -> int | None:
    """Parameters in a safetensors file, by its header (8 bytes of length, then JSON); None if absent."""
    if not path.exists():
        return None
    with open(path, "rb") as stream:
        tensors = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")


def _typical(run: Run, name: str) -> float | None:
    values = [value for value in run.values(name) if math.isfinite(value)]
    return median(values) if values else None


def _maybe(show: Callable[[Any], str], value: Any) -> str | None:
    return None if value is None else show(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
