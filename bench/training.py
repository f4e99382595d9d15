"""Training speed: one optimizer step of a small Llama, against transformers.

The same shape, the same batch of 16 rows of 256 tokens, AdamW (fused) in both. Ours trains as `precision auto` chooses;
transformers runs at its default (fp32) and at its best (bf16 autocast). Each contestant has a process of its own, and
they take turns, so that what else the machine does slows all of them alike. The first steps are not counted.

    python bench/training.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from common import record, steady_rate, table

SHAPES = {"d384 L6": (384, 6, 6), "d128 L4": (128, 4, 4)}  # width, layers, heads
VOCABULARY, LENGTH, ROWS = 4096, 256, 16
CONTESTANTS = ("ours", "ours fp32", "transformers fp32", "transformers bf16 autocast")
TARGETS = {"d384 L6": (4.0, 1.6), "d128 L4": (3.0, 2.0)}  # against the default, against the best


def worker(name: str, shape: str, seconds: float) -> None:
    """Train for some seconds and print the median tokens/s and the share of the measured bf16 peak."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1))
    step = (_ours if name.startswith("ours") else _transformers)(name, *SHAPES[shape], ids)
    print(json.dumps({"tokens_per_second": steady_rate(step, ROWS * LENGTH, seconds)}))


def _shape(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": VOCABULARY,
        "intermediate_size": 8 * width // 3 // 64 * 64, "max_position_embeddings": LENGTH,
    }  # fmt: skip


def _ours(name: str, width: int, layers: int, heads: int, ids):
    import torch

    from zero2hero.config import DecoderConfig, TrainConfig
    from zero2hero.data.batches import Batch
    from zero2hero.models import Decoder, init_weights
    from zero2hero.train.loop import Trainer
    from zero2hero.train.objectives import causal_lm
    from zero2hero.train.run import choose_precision

    dtype, _ = choose_precision("fp32" if name.endswith("fp32") else "auto", torch.device("cpu"))
    model = Decoder(DecoderConfig(**_shape(width, layers, heads)))
    init_weights(model)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(LENGTH).expand(ROWS, -1), None)
    trainer = Trainer(
        model, causal_lm, lambda step: [batch], TrainConfig(optim="adamw", max_steps=10**6), 10**6, dtype=dtype
    )
    return trainer.step


def _transformers(name: str, width: int, layers: int, heads: int, ids):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    bf16 = "bf16" in name
    if bf16:  # its best setting gets what ours has: safe bf16 and memory that is kept
        from zero2hero import machine

        machine.prepare()
    model = LlamaForCausalLM(LlamaConfig(**_shape(width, layers, heads), tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = ids[:, :-1]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    rounds, seconds = 3, 4.0
    speeds: dict[str, dict[str, list[float]]] = {s: {c: [] for c in CONTESTANTS} for s in SHAPES}
    for _ in range(rounds):
        for shape in SHAPES:
            for name in CONTESTANTS:
                command = [sys.executable, __file__, "--worker", name, shape, str(seconds)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                speeds[shape][name].append(json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])
    results, rows = {}, []
    from zero2hero import machine
    from zero2hero.config import DecoderConfig

    found = machine.machine()
    for shape, by_name in speeds.items():
        median = {name: statistics.median(values) for name, values in by_name.items()}
        flops = DecoderConfig(**_shape(*SHAPES[shape])).derived().training_flops_per_token(LENGTH)
        default, best = (median["ours"] / median[f"transformers {k}"] for k in ("fp32", "bf16 autocast"))
        results[shape] = {
            "tokens_per_second": {k: round(v) for k, v in median.items()},
            "all_rounds": {k: [round(x) for x in v] for k, v in by_name.items()},
            "times_transformers_fp32": round(default, 2),
            "times_transformers_bf16_autocast": round(best, 2),
            "targets": TARGETS[shape],
            "share_of_measured_bf16_peak": round(median["ours"] * flops / max(found.bf16_flops, found.fp32_flops), 3),
        }
        for name, value in median.items():
            share = value * flops / max(found.bf16_flops, found.fp32_flops)
            times = f"{median['ours'] / value:.2f}x"
            rows.append(
                {"shape": shape, "": name, "tok/s": f"{value:,.0f}", "ours is": times, "of peak": f"{share:.0%}"}
            )
    print(table(rows))
    print(record("training", results, measured_peak_flops={"fp32": found.fp32_flops, "bf16": found.bf16_flops}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main()
