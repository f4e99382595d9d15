"""What a run leaves behind about itself while it trains: metrics.jsonl, TensorBoard and other trackers.

metrics.jsonl is the record that everything else is drawn from (plots, report.html, `read_metrics`). It holds
one JSON object a line, each with `step` (optimizer steps done) and `time` (seconds of training; the pause
before a resume does not count), and then either

    metrics    loss, eval_loss, learning_rate, grad_norm, tokens_per_second, peak_share, epoch, num_tokens,
               eval_bits_per_byte, ngram_nll, ngram_order, ...
    units      what is counted and what losses are in (`Units`), where it is not tokens and nats
    samples    [{"prompt": ..., "text": ...}, ...], what the model wrote at that step
    machine    what `describe_machine` found, or anything else that is not a number
    tracker    the cursor of the other trackers: the id of their run, and the last step that they have

Lines are appended whole and flushed, so a run that is killed loses at most the line it was writing. A run
resumed at step s first drops what came after s, for those steps are about to be done again: curves have no
double points. TensorBoard hides them by its `purge_step`; W&B and trackio can only append, so they get nothing
for a second time: the run is continued under its id, from the first step that they do not have yet.
A fresh run is one resumed before its first step.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zero2hero.errors import UserError
from zero2hero.io import atomic_write, saving

METRICS_FILE = "metrics.jsonl"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # JSON has no such numbers: they are written as strings
_INSTALL = {"tensorboard": "zero2hero[train]", "wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True)
class Units:
    """What a run counts, and what its loss is in: nats per token, unless the task says otherwise.

    item: what a loss's weight counts, in the singular ("image", "pair", "completion"); seen and per second too.
    loss: what the loss of one such item is in.
    """

    item: str = "token"
    loss: str = "nats"

    @property
    def of_loss(self) -> str:
        """For people: "nats per token"."""
        return f"{self.loss} per {self.item}"

    @property
    def seen(self) -> str:
        """The metric that counts them: "num_tokens"."""
        return f"num_{self.item}s"

    @property
    def rate(self) -> str:
        """The metric of speed: "tokens_per_second"."""
        return f"{self.item}s_per_second"

    def record(self) -> dict[str, str]:
        """As it stands in the record of a run."""
        return asdict(self)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Units:
        """Those of the run whose record this is."""
        return cls(**next((row["units"] for row in rows if "units" in row), {}))


class Tracker:
    """Writes the record of one run; use it as a context manager or call `close`."""

    def __init__(
        self,
        output_dir: str | Path,
        tensorboard: bool = True,
        resume_step: int | None = None,
        report_to: Sequence[str] = (),
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the record in `output_dir`.

        tensorboard: write scalars to `output_dir/tensorboard` when tensorboard is installed.
        resume_step: keep the record up to this step and go on; None starts a new record.
        report_to: other trackers, "wandb" or "trackio" ("tensorboard" here: an error if it is missing).
        state: the `state_dict` in the checkpoint that is resumed, for a run whose metrics.jsonl was lost.
        Raises `UserError` when a tracker in `report_to` is unknown, not installed or does not start.
        """
        self.path = Path(output_dir) / METRICS_FILE
        self._others = tensorboard, report_to
        self._open(resume_step, state)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: those steps are done again, as after a resume."""
        state = self.state_dict()
        self.close()
        self._open(step, state)

    def _open(self, resume_step: int | None, state: Mapping[str, Any] | None) -> None:
        last_step = -1 if resume_step is None else resume_step
        rows = read_metrics(self.path.parent) if resume_step is not None and self.path.exists() else []
        kept = [row for row in rows if row["step"] <= last_step and "tracker" not in row]
        cursors = [*(row["tracker"] for row in rows if "tracker" in row), *([state] if state else [])]
        self._runs: dict[str, str] = {name: run for cursor in cursors for name, run in cursor["runs"].items()}
        self._sent = max([row["step"] for row in rows] + [cursor["step"] for cursor in cursors], default=-1)
        with saving(self.path):
            self._writers = self._open_writers(*self._others, last_step)
        atomic_write(self.path, "".join(_to_line(row) for row in kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._began = time.monotonic() - (kept[-1].get("time", 0.0) if kept else 0.0)
        if self._runs:
            self.record(max(0, last_step), tracker=self.state_dict())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers (Python, numpy or one-element tensors); NaN and infinities are allowed."""
        numbers = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        self.record(step, **numbers)
        self._sent = max(self._sent, step)
        for writer in list(self._writers):
            self._tell(writer, "log", numbers, step)

    def state_dict(self) -> dict[str, Any]:
        """The cursor: the ids of the run at other trackers, and the last step that they have. JSON values."""
        return {"runs": dict(self._runs), "step": self._sent}

    def samples(self, step: int, samples: Iterable[Mapping[str, str]]) -> None:
        """Record what the model writes: one {"prompt", "text"} each, `text` is what follows the prompt."""
        self.record(step, samples=[dict(sample) for sample in samples])

    def record(self, step: int, **values: Any) -> None:
        """Append one line of any JSON values to metrics.jsonl (and to no other tracker)."""
        elapsed = round(time.monotonic() - self._began, 3)
        line = memoryview(_to_line({"step": int(step), "time": elapsed, **values}).encode("utf-8"))
        with saving(self.path):
            while line:  # a disk that is nearly full takes a part and says so only at the next call
                line = line[self._file.write(line) :]

    def _open_writers(self, tensorboard: bool, report_to: Sequence[str], last_step: int) -> list[Any]:
        writers: list[Any] = []
        for name in dict.fromkeys([*(["tensorboard"] if tensorboard else []), *report_to]):
            if name not in _INSTALL:
                raise UserError(f"report_to: no tracker named {name!r}; there are {', '.join(_INSTALL)}")
            try:
                writers.append(
                    _TensorBoard(self.path.parent, last_step) if name == "tensorboard" else self._append(name)
                )
            except ImportError:
                if name in report_to:
                    raise UserError(f"report_to: {name} is not installed; pip install '{_INSTALL[name]}'") from None
        return writers

    def _append(self, name: str) -> _Appending:
        sent = self._sent if name in self._runs else None
        run = self._runs.setdefault(name, uuid.uuid4().hex[:8])
        try:
            return _Appending(name, self.path.parent, run, sent)
        except ImportError:
            raise
        except Exception as error:  # of any kind: no key, no network, a run that was deleted
            offline = "; WANDB_MODE=offline records on this machine" if name == "wandb" else ""
            raise UserError(f"report_to: {name} does not start: {error}{offline}") from error

    def _tell(self, writer: Any, method: str, *arguments: Any) -> None:
        """A tracker that fails is given up with a loud line; the run and its metrics.jsonl go on."""
        try:
            getattr(writer, method)(*arguments)
        except Exception as error:
            self._writers.remove(writer)
            print(f"WARNING: {writer.name} gets no more numbers of this run: {error}", file=sys.stderr)

    def close(self) -> None:
        self._file.close()
        for writer in list(self._writers):
            self._tell(writer, "finish")
        self._writers = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of `output_dir/metrics.jsonl` in order. A torn last line (a killed run) is passed over.

    Raises `UserError` when the file is not there or a line before the last is not a row.
    """
    path = Path(output_dir) / METRICS_FILE
    try:
        lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is {output_dir} the folder of a run?") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not an object with a whole number 'step'")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not a metrics row ({error}); delete the line") from None
        rows.append({key: float(value) if value in _NOT_FINITE else value for key, value in row.items()})
    return rows


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, values) of the rows that hold a finite number under `name`."""
    kept = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    points = np.array(kept, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return points[:, 0], points[:, 1]


def describe_machine() -> dict[str, str]:
    """The hardware and software that a run's speed depends on, for `Tracker.record(step, machine=...)`."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux says it best
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    machine = {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "threads used": str(torch.get_num_threads()),
    }
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no sysconf on Windows
        machine["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        machine["accelerator"] = torch.cuda.get_device_name() + (f" x {count}" if count > 1 else "")
    machine["system"] = platform.platform(terse=True)
    machine["python"] = platform.python_version()
    machine["torch"] = str(torch.__version__)
    return machine


def _to_line(row: Mapping[str, Any]) -> str:
    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps({key: strict(value) for key, value in row.items()}, allow_nan=False) + "\n"


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, output_dir: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted or earlier run wrote for steps that come again
        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=last_step + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class _Appending:
    """Weights & Biases, and trackio, which speaks the same three calls. What they have cannot be taken back.

    run: the id of the run there, ours to choose; W&B knows a run by its id, trackio by its name.
    sent: the last step that they have, or None for a new run.
    """

    def __init__(self, name: str, output_dir: Path, run: str, sent: int | None) -> None:
        self.name, self.sent = name, -1 if sent is None else sent
        self.module = importlib.import_module(name)
        folder = output_dir.resolve().name
        known = {"id": run, "name": folder, "dir": str(output_dir)} if name == "wandb" else {"name": f"{folder}-{run}"}
        self.module.init(project="zero2hero", resume="never" if sent is None else "allow", **known)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step > self.sent:
            self.module.log(dict(metrics), step=step)

    def finish(self) -> None:
        self.module.finish()
