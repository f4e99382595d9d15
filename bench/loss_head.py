"""The loss head: hidden states to loss and gradients, against linear + cross_entropy in fp32.

4096 tokens, width 384, a vocabulary of 32,768. Ours computes in bf16, as it trains where bf16 pays, and in fp32. Each
contestant has a process of its own, and they take turns. Memory is the peak above what the inputs take (Linux counts
it). The gradients' errors are against linear + cross_entropy in fp32, relative to the largest entry.

    python bench/loss_head.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import record, table

TOKENS, WIDTH, VOCABULARY = 4096, 384, 32_768
CONTESTANTS = ("ours", "ours fp32", "linear + cross_entropy fp32")
TARGETS = {"times_faster": 3.0, "times_less_memory": 6.0}


def inputs(dtype):
    import torch

    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH), 0.05 * torch.randn(VOCABULARY, WIDTH)
    hidden, weight = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,))


def gradients(name: str, hidden, weight, targets):
    """[of hidden, of weight] for the summed loss."""
    import torch
    import torch.nn.functional as F

    from zero2hero.nn.logprobs import nll_sum

    if name.startswith("ours"):
        loss = nll_sum(hidden, weight, targets)[0]
    else:
        loss = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    return torch.autograd.grad(loss, (hidden, weight))


def worker(name: str, seconds: float) -> None:
    """Print the median seconds and the peak memory in MB."""
    import torch

    from zero2hero import machine

    machine.prepare()
    hidden, weight, targets = inputs(torch.bfloat16 if name == "ours" else torch.float32)
    few, small = hidden.detach()[:64].clone().requires_grad_(), weight.detach()[:256].clone().requires_grad_()
    gradients(name, few, small, targets[:64] % 256)  # what is loaded and compiled once is not counted
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    gradients(name, hidden, weight, targets)
    memory = _status("VmHWM") - before
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        gradients(name, hidden, weight, targets)
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(times), "MB": memory / 1000}))


def _status(field: str) -> int:
    """kB of this process's memory, from the kernel."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def errors() -> dict[str, dict[str, float]]:
    """Of our gradients, relative to the largest entry of the true ones (fp32), and their cosine."""
    import torch

    from zero2hero import machine

    machine.prepare()
    truth = gradients("linear + cross_entropy", *inputs(torch.float32))
    found = {}
    for name, dtype in (("ours", torch.bfloat16), ("ours fp32", torch.float32)):
        pairs = list(zip(gradients(name, *inputs(dtype)), truth))
        found[name] = {
            "largest_error": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
            "cosine": min(
                float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
                for a, b in pairs
            ),
        }
    return found


def main() -> None:
    rounds, seconds = 3, 4.0
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--worker", name, str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[name].append(json.loads(done.stdout.splitlines()[-1]))
    median = {name: {k: statistics.median(m[k] for m in all_) for k in all_[0]} for name, all_ in measured.items()}
    theirs, results, found = median[CONTESTANTS[-1]], {}, errors()
    for name, each in median.items():
        results[name] = {
            **{k: round(v, 4) for k, v in each.items()},
            "times_faster": round(theirs["seconds"] / each["seconds"], 2),
            "times_less_memory": round(theirs["MB"] / each["MB"], 1),
            **found.get(name, {}),
        }
    rows = [{"": n, **{k: r[k] for k in ("seconds", "MB", *TARGETS)}} for n, r in results.items()]
    print(table(rows))
    print(found)
    print(record("loss_head", results, targets=TARGETS, all_rounds=measured))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], float(sys.argv[3]))
    else:
        main()
