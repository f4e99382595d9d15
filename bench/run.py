"""Run every benchmark, one after another, and leave their results in bench/results.

make bench                     all of them
python bench/run.py training   only the named ones
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = (
    "startup",
    "training",
    "muon",
    "loss_head",
    "memory",
    "qlora",
    "dpo",
    "generation",
    "serve",
    "checkpoint",
    "ranks",
    "loading",
    "shakespeare",
    "tasks",
)


def main() -> int:
    failed = []
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"\n=== {name}", flush=True)
        if subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py"))], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
