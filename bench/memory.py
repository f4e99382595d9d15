"""Memory: what `zero2hero plan memory` predicts against the highest point of a real process.

Each configuration trains in a process of its own, as a run does: a model, the loop, documents packed into rows, an
evaluation at the end. Measured is what the loop itself measures and prints (train/memory.py).

    python bench/memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys

from common import record, table

SMALL, LARGE = (192, 4, 6, 2048, 8), (512, 8, 8, 4096, 16)  # width, layers, heads, vocabulary, rows
LENGTH, STEPS, LIMIT = 256, 2, 0.15
CONFIGURATIONS = {
    "small, fp32": (SMALL, "fp32", False),
    "small, fp32, checkpointing": (SMALL, "fp32", True),
    "large, fp32": (LARGE, "fp32", False),
    "large, bf16": (LARGE, "bf16", False),
    "large, bf16, checkpointing": (LARGE, "bf16", True),
}


def worker(name: str) -> None:
    """Train for a few steps and print both numbers, in bytes."""
    import numpy as np
    import torch

    from zero2hero import machine
    from zero2hero.config import DecoderConfig, TrainConfig
    from zero2hero.data.cache import Corpus
    from zero2hero.models import Decoder, init_weights
    from zero2hero.nn.logprobs import nll_sum
    from zero2hero.train.activation_checkpointing import checkpoint_blocks
    from zero2hero.train.loop import Trainer
    from zero2hero.train.memory import PeakMemory, planned_run
    from zero2hero.train.memory_plan import predict
    from zero2hero.train.objectives import causal_lm
    from zero2hero.train.pretrain import causal_data
    from zero2hero.train.run import choose_precision

    (width, layers, heads, vocabulary, rows), precision, checkpointing = CONFIGURATIONS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_precision(precision, device)
    shape = DecoderConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary, qk_norm=True
    ).derived()
    config = TrainConfig(
        max_steps=STEPS, per_device_train_batch_size=rows, max_length=LENGTH, gradient_checkpointing=checkpointing
    )
    ends = np.arange(1, 513) * 100
    corpus = Corpus(np.random.default_rng(0).integers(0, vocabulary, ends[-1]).astype(np.uint16),
                    np.stack([ends - 100, ends], 1))  # fmt: skip
    model = Decoder(shape)
    init_weights(model)
    model.to(device)
    if checkpointing:
        checkpoint_blocks(model)
        machine.keep_memory(False)
    _, data = causal_data(corpus, config, device)

    def evaluate() -> dict[str, float]:
        pair = [data(step)[0] for step in range(2)]
        ids, positions, documents, targets = (
            torch.cat([getattr(b, f) for b in pair])
            for f in ("ids_BT", "positions_BT", "document_ids_BT", "targets_BT")
        )
        hidden = model(ids, positions=positions, document_ids=documents)
        return {"eval_loss": float(nll_sum(hidden, model.head_weight, targets)[0])}

    peak = PeakMemory(device)
    trainer = Trainer(model, causal_lm, data, config, STEPS, dtype=dtype, evaluate=evaluate, watchers=[peak])
    peak.begin(trainer.masters, model)
    trainer.train()
    print(json.dumps([predict(planned_run(shape, config, dtype, device)).peak, peak.measured()]))


def main() -> None:
    results, rows = {}, []
    for name in CONFIGURATIONS:
        command = [sys.executable, __file__, "--worker", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        predicted, measured = json.loads(done.stdout.splitlines()[-1])
        error = predicted / measured - 1
        results[name] = {"predicted": predicted, "measured": measured, "error": round(error, 4)}
        cells = {k: f"{v / 2**20:,.0f} MiB" for k, v in (("predicted", predicted), ("measured", measured))}
        rows.append({"configuration": name, **cells, "error": f"{error:+.1%}", "within 15 %": abs(error) <= LIMIT})
    print(table(rows))
    print(record("memory", results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main()
