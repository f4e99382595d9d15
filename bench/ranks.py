"""Two ranks of one thread each, talking by gloo, against one process of two threads: tokens per second.

The quickstart's model and step (8 rows of 256 tokens in all, Muon), at `precision auto`, on the same two cores. The
contestants take turns, each in processes of its own; the first steps are not counted.

    python bench/ranks.py
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time

from common import ratio, record, table

ROWS, LENGTH, VOCABULARY, STEPS, ROUNDS = 8, 256, 2048, 30, 5
TARGET = 0.9


def worker() -> None:
    """Train for some steps, as one of WORLD_SIZE ranks, and print the median seconds of a step."""
    import torch

    from zero2hero.config import DecoderConfig, TrainConfig
    from zero2hero.data.batches import Batch
    from zero2hero.models import Decoder, init_weights
    from zero2hero.train.loop import Trainer
    from zero2hero.train.objectives import causal_lm
    from zero2hero.train.parallel import join
    from zero2hero.train.run import choose_precision

    with join(torch.device("cpu")) as (ranks, device):
        dtype, _ = choose_precision("auto", device)
        model = Decoder(DecoderConfig(vocab_size=VOCABULARY, qk_norm=True))
        init_weights(model)
        rows = ROWS // ranks.size
        ids = torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(ranks.rank))
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(LENGTH).expand(rows, -1), None)
        config = TrainConfig(max_steps=10**6)
        trainer = Trainer(model, causal_lm, lambda step: [batch], config, 10**6, dtype=dtype, ranks=ranks)
        times = []
        for step in range(STEPS + 5):
            start = time.perf_counter()
            trainer.step()
            if step >= 5:
                times.append(time.perf_counter() - start)
        print(json.dumps({"seconds": statistics.median(times), "dtype": str(dtype)}), flush=True)
    os._exit(0)


def run(ranks: int) -> tuple[float, str]:
    """(seconds of a step, dtype) with that many ranks sharing two threads."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(2 // ranks)}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        command = [sys.executable, __file__, "--worker"]
        environment = os.environ | shared | own
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    found = json.loads(outputs[0].splitlines()[-1])
    return found["seconds"], found["dtype"]


def main() -> None:
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for ranks, times in seconds.items():
            taken, dtype = run(ranks)
            times.append(taken)
    share = ratio(seconds[1], seconds[2])
    speeds = {f"{n} x {2 // n} threads": round(ROWS * LENGTH / statistics.median(t)) for n, t in seconds.items()}
    results = {
        "tokens_per_second": speeds,
        "two_ranks_over_one_process": round(share, 3),
        "all_rounds_seconds_per_step": {str(n): [round(t, 4) for t in times] for n, times in seconds.items()},
        "dtype": dtype,
        "target": TARGET,
    }
    print(table([{"processes x threads": name, "tok/s": f"{speed:,}"} for name, speed in speeds.items()]))
    print(f"two ranks reach {share:.2f} of one process (target {TARGET})")
    print(record("ranks", results))


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["--worker"] else main()
