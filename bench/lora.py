"""LoRA's training speed against PEFT: r 16 on all linear modules of a Llama of d384 L6 V4096, 8 rows of 256 tokens.

The same base, the same batch, AdamW (fused) in both. Ours trains as `precision auto` chooses, and in fp32; PEFT on
transformers at its default (fp32) and at its best (bf16 autocast). Each contestant has a process of its own and they
take turns, so that what else the machine does slows all alike. The first steps are not counted.

    python bench/lora.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from common import record, steady_rate, table

VOCABULARY, LENGTH, ROWS, RANK = 4096, 256, 8, 16
SHAPE = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": VOCABULARY,
    "intermediate_size": 1024, "max_position_embeddings": LENGTH, "tie_word_embeddings": True,
}  # fmt: skip
CONTESTANTS = ("ours", "ours fp32", "PEFT fp32", "PEFT bf16 autocast")
TARGETS = (3.0, 1.7)  # against the default, against the best


def worker(name: str, seconds: float) -> None:
    """Train for some seconds and print the median tokens/s."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1))
    step = (_ours if name.startswith("ours") else _peft)(name, ids)
    print(json.dumps({"tokens_per_second": steady_rate(step, ROWS * LENGTH, seconds)}))


def _ours(name: str, ids):
    import torch

    from zero2hero.config import DecoderConfig, TrainConfig
    from zero2hero.data.batches import Batch
    from zero2hero.models import Decoder, init_weights
    from zero2hero.train.loop import Trainer
    from zero2hero.train.objectives import causal_lm
    from zero2hero.train.run import choose_precision
    from zero2hero.tune import LoraConfig, add_lora

    dtype, _ = choose_precision("fp32" if name.endswith("fp32") else "auto", torch.device("cpu"))
    model = Decoder(DecoderConfig(**SHAPE))
    init_weights(model)
    add_lora(model, LoraConfig(r=RANK, lora_alpha=32))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(LENGTH).expand(ROWS, -1), None)
    trainer = Trainer(
        model, causal_lm, lambda step: [batch], TrainConfig(optim="adamw", max_steps=10**6), 10**6, dtype=dtype
    )
    return trainer.step


def _peft(name: str, ids):
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    bf16 = "bf16" in name
    if bf16:  # its best setting gets what ours has: safe bf16 and memory that is kept
        from zero2hero import machine

        machine.prepare()
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    ids = ids[:, :-1]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops_per_token() -> float:
    """Of a step: 2 forward and 2 for the inputs' gradient per frozen weight, 6 per adapter's weight, and attention."""
    from zero2hero.config import DecoderConfig

    c = DecoderConfig(**SHAPE).derived()
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    adapter = L * RANK * (4 * 2 * D + 3 * (D + F))
    attention = c.training_flops_per_token(LENGTH) - 6 * c.num_matrix_parameters
    return 4 * c.num_matrix_parameters + 6 * adapter + attention


def main() -> None:
    rounds, seconds = 3, 4.0
    speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--worker", name, str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            speeds[name].append(json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])
    from zero2hero import machine

    found = machine.machine()
    peak, flops = max(found.bf16_flops, found.fp32_flops), flops_per_token()
    median = {name: statistics.median(values) for name, values in speeds.items()}
    results = {
        "tokens_per_second": {name: round(v) for name, v in median.items()},
        "all_rounds": {name: [round(x) for x in v] for name, v in speeds.items()},
        "times_peft_fp32": round(median["ours"] / median["PEFT fp32"], 2),
        "times_peft_bf16_autocast": round(median["ours"] / median["PEFT bf16 autocast"], 2),
        "targets": TARGETS,
        "share_of_measured_bf16_peak": round(median["ours"] * flops / peak, 3),
    }
    print(
        table(
            [
                {
                    "": name,
                    "tok/s": f"{v:,.0f}",
                    "ours is": f"{median['ours'] / v:.2f}x",
                    "of peak": f"{v * flops / peak:.0%}",
                }
                for name, v in median.items()
            ]
        )
    )
    print(record("lora", results, measured_peak_flops={"fp32": found.fp32_flops, "bf16": found.bf16_flops}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], float(sys.argv[3]))
    else:
        main()
