"""What practising with a verifier brings, after a cold start: sums, from nothing, on two CPU cores.

The recipe is run as a person would run it. The target: greedy accuracy on held-out sums 20 points higher within five
minutes of practice, sampling and evaluations included. pass@k and maj@k, before and after, say whether it was taught or
sharpened.

    python bench/reasoning.py [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from common import ROOT, record, table

from zero2hero.cli import VERBS
from zero2hero.command_line import parse
from zero2hero.reason import reason
from zero2hero.train.tracking import read_metrics

MINUTES, POINTS = 5, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = str(parser.parse_args().seed)
    recipe = ROOT / "recipes" / "sums_reasoning_cpu.yaml"
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", str(recipe), "--output_dir", folder, "--cold_start.seed", seed, "--train.seed", seed]
        start = time.perf_counter()
        reason(parse("reason", VERBS["reason"], words))
        seconds = time.perf_counter() - start
        found = json.loads((Path(folder) / "reasoner" / "attempts.json").read_text())
        stages = {stage: read_metrics(Path(folder) / stage)[-1]["time"] for stage in ("cold_start", "reasoner")}
    gained = 100 * (found["after"]["accuracy"] - found["before"]["accuracy"])
    results = {
        "seconds_of_cold_start": stages["cold_start"], "seconds_of_practice": stages["reasoner"], "seconds": seconds,
        "points_of_greedy_accuracy": gained, "reached": gained >= POINTS and stages["reasoner"] <= 60 * MINUTES,
        "verdict": found["verdict"], "before": found["before"], "after": found["after"],
    }  # fmt: skip
    print(table([{"": name, "before": before, "after": after} for name, before, after in found["table"]]))
    print(record("reasoning", results))


if __name__ == "__main__":
    main()
