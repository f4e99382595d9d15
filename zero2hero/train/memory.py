"""Memory while a run goes on: the highest point measured, a warning beforehand, and words where it runs out.

The prediction is train/memory_plan.py's. Measured is, on a GPU, what torch's allocator had given out at most; on a CPU
(Linux), how far the process's resident memory rose above where it stood when training began, plus the tensors that
were there already. Pages that glibc keeps for later use would count as used before and hide part of the rise, so they
are handed back first; pages of libraries, read as their functions are first called, are not the run's and are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.errors import UserError
from zero2hero.nn import native
from zero2hero.progress import human_bytes
from zero2hero.train.memory_advice import advice
from zero2hero.train.memory_plan import Run, predict
from zero2hero.train.precision import MasterWeights
from zero2hero.train.watch import Watcher

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LIBRARIES = 500 << 20  # bytes; below this their own hundred or so would drown a comparison


def planned_run(
    shape: DecoderConfig, train: TrainConfig, dtype: torch.dtype, device: torch.device, method: str = "full",
    lora_r: int = 16,
) -> Run:  # fmt: skip
    """A run as train/memory_plan.py knows it; `shape` is derived, with its vocabulary."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    glibc = platform.libc_ver()[0] == "glibc"
    return Run(shape, train, precision, device.type, native.kernels() is not None, glibc, method, lora_r)


class PeakMemory(Watcher):
    """Logs `peak_memory`, in bytes, since `begin`; nothing where it cannot be measured."""

    name = "peak_memory"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.existing = 0
        self.start: dict[str, int] | None = None

    def begin(self, masters: MasterWeights, model: nn.Module) -> None:
        """Training is about to begin; weights, masters and gradients that exist already count as they are."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            tensors = [*model.parameters(), *model.buffers(), *masters.parameters.values(), *masters.gradients]
            self.existing = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
            with contextlib.suppress(OSError):
                if platform.libc_ver()[0] == "glibc":
                    ctypes.CDLL(None).malloc_trim(0)
                CLEAR.write_text("5")  # VmHWM, the highest resident memory, begins anew
                self.start = _resident()

    def measured(self) -> float | None:
        """Bytes at the highest moment so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.start is None:
            return None
        now = _resident()
        return now["VmHWM"] - self.start["VmRSS"] - (now["RssFile"] - self.start["RssFile"]) + self.existing

    def metrics(self) -> dict[str, float]:
        measured = self.measured()
        return {} if measured is None else {"peak_memory": measured}

    def verdict(self, predicted: float) -> str:
        """Prediction and measurement, in one line."""
        measured = self.measured()
        if measured is None:
            return f"peak memory: predicted {human_bytes(predicted)}; not measured on this system"
        if measured < LIBRARIES:
            note = ", and what Python and the libraries take, which weighs in so small a run"
        else:
            note = f" ({predicted / measured - 1:+.0%})"
        return f"peak memory: measured {human_bytes(measured)}, predicted {human_bytes(predicted)}{note}"


def _resident() -> dict[str, int]:
    """This process's memory in bytes by the names of Linux."""
    rows = (line.split() for line in STATUS.read_text().splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if row[0].startswith(("Vm", "Rss"))}


def warning(run: Run, free: float) -> str | None:
    """What to say before a run that is not likely to fit into `free` bytes."""
    peak = predict(run).peak
    if peak <= free:
        return None
    return f"WARNING: this run needs about {human_bytes(peak)} and {human_bytes(free)} are free. {advice(run, free)}."


@contextlib.contextmanager
def memory_explained(run: Run, free: float) -> Iterator[None]:
    """Within, running out of memory is a `UserError` that names what would fit into `free` bytes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        of_cpu = "can't allocate memory" in str(error)  # torch's allocator on a CPU has no exception of its own
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not of_cpu:
            raise
        peak = predict(run).peak
        limit = min(free, 0.8 * peak)  # where the plan fitted and memory ran out all the same, well below it
        raise UserError(
            f"out of memory: the run needs about {human_bytes(peak)}, and {human_bytes(free)} were free when it began. "
            f"{advice(run, limit)}."
        ) from error
