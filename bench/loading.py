"""Loading a model of 1.2 billion weights: the time against reading its bytes, the memory against its size.

    python bench/loading.py

A random Llama in bf16 (2.4 GB) is written to a temporary folder and removed afterwards. Each measurement is a fresh
process: one reads the file's bytes, the other loads the model and touches every page of it. They take turns, with the
file in the system's cache, so that the disk's moods do not count. Peak memory is the process's resident set, mapped
pages of the file included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, ratio, record, table

LIMIT_TIME, LIMIT_MEMORY = 1.3, 1.15
SHAPE = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip

_COMMON = """
import json, sys, time
from pathlib import Path

def resident(which):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(which))

folder = Path(sys.argv[1])
"""
_READ = """
before, start = resident("VmRSS"), time.perf_counter()
content = (folder / "model.safetensors").read_bytes()
seconds = time.perf_counter() - start
"""
_LOAD = """
import torch
from zero2hero.models import from_pretrained
before, start = resident("VmRSS"), time.perf_counter()
model = from_pretrained(folder)
total = sum(float(p.view(-1)[::1024].float().sum()) for p in model.parameters())  # every page has been read
seconds = time.perf_counter() - start
"""
_REPORT = """
print(json.dumps({"seconds": seconds, "peak": resident("VmHWM") - before}))
"""


def measure(program: str, folder: Path) -> dict[str, float]:
    """Seconds and peak bytes of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _COMMON + program + _REPORT, str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def write_model(folder: Path) -> int:
    """A random model in `folder`; its size in bytes."""
    import torch

    from zero2hero.models import Decoder, DecoderConfig, save_pretrained

    with torch.device("meta"):
        model = Decoder(DecoderConfig(**SHAPE, tie_word_embeddings=True))
    state = {}
    for name, p in model.named_parameters():
        state[name] = torch.empty(p.shape, dtype=torch.bfloat16).normal_(0.0, 0.02)
    save_pretrained(model, folder, state)
    return sum(t.numel() * t.element_size() for t in state.values())


def main(rounds: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder)
        times: dict[str, list[float]] = {"read": [], "load": []}
        peaks: dict[str, list[float]] = {"read": [], "load": []}
        for i in range(rounds + 1):
            for kind, program in (("read", _READ), ("load", _LOAD)):
                got = measure(program, folder)
                if i:
                    times[kind].append(got["seconds"])
                    peaks[kind].append(got["peak"])
    results = {
        "bytes": size,
        "seconds": times,
        "time_ratio": ratio(times["load"], times["read"]),
        "memory_ratio": max(peaks["load"]) / size,
        "limits": {"time_ratio": LIMIT_TIME, "memory_ratio": LIMIT_MEMORY},
    }
    path = record("loading", results)
    rows = [{"": kind, "seconds": min(times[kind]), "GB/s": size / 1e9 / min(times[kind])} for kind in times]
    print(table(rows))
    print(
        f"time {results['time_ratio']:.2f}x of reading, peak memory {results['memory_ratio']:.2f}x of the model: {path}"
    )


if __name__ == "__main__":
    main()
