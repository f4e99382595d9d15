"""What to do about memory: how much is free here, and which options need less.

Advice is computed, not remembered: each option is put into the run's settings and the plan is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zero2hero.progress import human_bytes
from zero2hero.train.memory_plan import Run, predict

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory(device: str) -> float:
    """Bytes that a run could have: of the GPU, or what Linux counts as available. Infinite where neither is known."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = float("inf")
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        free = 1024.0 * int(line.split()[1])
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine ("max": it has not)
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


def needing_less(run: Run, limit: float) -> list[tuple[str, float]]:
    """(options to type, predicted peak in bytes), each below the run's own; those within `limit` first.

    Batch and length are halved until they fit; where nothing fits alone, what helps is put together.
    """
    peak = predict(run).peak
    found = [(options, predict(other).peak) for options, other in _alternatives(run, limit)]
    found = [(options, needed) for options, needed in found if needed < 0.99 * peak]
    if not any(needed <= limit for _, needed in found):
        options, other = _together(run, limit)
        found.append((options, predict(other).peak))
    return sorted(found, key=lambda pair: pair[1] > limit)


def _alternatives(run: Run, limit: float) -> Iterator[tuple[str, Run]]:
    """First the same step in smaller parts, and the same numbers computed twice; then what changes training."""
    if run.train.per_device_train_batch_size > 1:
        yield _smaller_batch(run, limit)
    if not run.train.gradient_checkpointing:
        yield "--train.gradient_checkpointing true", _with(run, gradient_checkpointing=True)
    if run.train.gradient_checkpointing and not run.train.activation_offload and run.device == "cuda":
        yield "--train.activation_offload true", _with(run, activation_offload=True)
    if run.precision == "fp32":
        yield "--precision bf16", dataclasses.replace(run, precision="bf16")
    if run.train.optim != "adamw_8bit":
        yield "--train.optim adamw_8bit", _with(run, optim="adamw_8bit")
    length = run.train.max_length
    while length > 64 and length % 2 == 0:
        length //= 2
        shorter = _with(run, max_length=length, length_schedule=[])
        if predict(shorter).peak <= limit:
            break
    if length < run.train.max_length:
        yield f"--train.max_length {length}", shorter


def _smaller_batch(run: Run, limit: float) -> tuple[str, Run]:
    """The batch halved, and the accumulation doubled, until it fits."""
    rows, accumulation, smaller = run.train.per_device_train_batch_size, run.train.gradient_accumulation_steps, run
    while rows > 1 and (smaller is run or predict(smaller).peak > limit):
        parts = 2 if rows % 2 == 0 else rows
        rows, accumulation = rows // parts, accumulation * parts
        smaller = _with(run, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
    options = f"--train.per_device_train_batch_size {rows} --train.gradient_accumulation_steps {accumulation}"
    return options, smaller


def _together(run: Run, limit: float) -> tuple[str, Run]:
    """What changes nothing that is learned, and then 8-bit moments."""
    run = _with(run, gradient_checkpointing=True)
    options, smaller = _smaller_batch(run, limit)
    if predict(smaller).peak > limit:
        options, smaller = f"{options} --train.optim adamw_8bit", _with(smaller, optim="adamw_8bit")
    return f"--train.gradient_checkpointing true {options}", smaller


def _with(run: Run, **settings: Any) -> Run:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **settings))


def advice(run: Run, limit: float) -> str:
    """The options that would fit, for a message of one line."""
    found = needing_less(run, limit)
    fitting = [pair for pair in found if pair[1] <= limit] or found[-1:]
    words = ", or ".join(f"{options} ({human_bytes(needed)})" for options, needed in fitting)
    return f"Predicted to fit: {words}" if found[0][1] <= limit else f"Nothing would fit; least needs {words}"
