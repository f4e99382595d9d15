"""How long a person waits for help: `zero2hero --help` and every verb's, as whole processes (under 0.5 s each).

python bench/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import record, table

from zero2hero.cli import VERBS

LIMIT = 0.5


def main() -> None:
    rows = []
    for words in ([], *(verb.split() for verb in VERBS)):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "zero2hero", *words, "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        rows.append({"command": " ".join(["zero2hero", *words, "--help"]), "median s": statistics.median(seconds)})
    print(table(rows))
    print(record("startup", rows, limit_seconds=LIMIT))


if __name__ == "__main__":
    main()
