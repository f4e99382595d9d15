"""What every benchmark shares: interleaved timing, a description of the machine, and the record of a run.

A number without its machine, commit and command cannot be judged, so `record` writes them beside it. Competitors
are timed in turns within one process: what else the machine does then slows them all alike.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `python bench/NAME.py` works in a clone that is not installed

from zero2hero.io import atomic_write  # noqa: E402
from zero2hero.machine import processor_name  # noqa: E402


def machine_info() -> dict[str, Any]:
    """Processor, cores, accelerator, versions and load average."""
    import torch

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("ONEDNN_", "OMP_", "MKL_"))},
    }


def git_commit() -> str | None:
    """The commit that was measured, marked when files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "zero2hero", "bench/*.py")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _from_root(word: str) -> str:
    """A path as it is written at the project's root: a record names no folder of the machine that made it."""
    return os.path.relpath(word, ROOT) if os.path.isabs(word) else word


def steady_rate(step: Callable[[], object], tokens: int, seconds: float) -> float:
    """Tokens per second by the median of steps, for at least `seconds` after three to warm up."""
    for _ in range(3):
        step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return tokens / statistics.median(times)


def record(name: str, results: Any, **more: Any) -> Path:
    """Write bench/results/NAME.json: the results, and everything needed to judge and repeat them."""
    content = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *map(_from_root, sys.argv)]),
        "commit": git_commit(),
        "machine": machine_info(),
        **more,
        "results": results,
    }
    path = ROOT / "bench" / "results" / f"{name}.json"
    atomic_write(path, json.dumps(content, indent=2) + "\n")
    return path


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, in turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times faster: the median over rounds, each of which compares neighbours in time."""
    return statistics.median(a / b for a, b in zip(slower, faster))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned text."""
    heads = list(rows[0])
    cells = [heads] + [[f"{v:,.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)
