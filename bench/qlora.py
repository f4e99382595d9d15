"""QLoRA of 1.2 billion weights: peak memory against what is predicted, and tokens/s against bitsandbytes with PEFT.

    python bench/qlora.py            # about five minutes and 3 GB of disk
    python bench/qlora.py --kernels  # only: a matrix from NF4 to numbers, ours against bitsandbytes'

A random Llama (its vocabulary small, so that the matrices are what weighs) is written to a temporary folder in bf16.
Each contestant loads it in four bits with double quantization and trains an adapter of rank 16 on all linear layers
with activation checkpointing, in a process of its own: bf16, one row of 512 random tokens a step.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, interleaved, ratio, record, table

SHAPE = {
    "vocab_size": 8192, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 20,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip
LENGTH, STEPS, RANK = 512, 3, 16
LIMITS = {"bytes per quantized weight": 0.53, "error of the prediction": 0.10}


def resident(which: str) -> int:
    """Bytes of this process's own memory (Linux): VmHWM, RssAnon, ..."""
    return next(1024 * int(r.split()[1]) for r in open("/proc/self/status") if r.startswith(which))


def ours(folder: str) -> dict[str, float]:
    import torch

    from zero2hero import machine
    from zero2hero.config import TrainConfig
    from zero2hero.data.batches import Batch
    from zero2hero.models import from_pretrained
    from zero2hero.nn.quantized import QuantizedLinear
    from zero2hero.train.activation_checkpointing import checkpoint_blocks
    from zero2hero.train.loop import Trainer
    from zero2hero.train.memory import PeakMemory, planned_run
    from zero2hero.train.memory_plan import predict
    from zero2hero.train.objectives import causal_lm
    from zero2hero.tune import LoraConfig, add_lora

    machine.prepare()
    before, start = resident("RssAnon"), time.perf_counter()
    model: Any = from_pretrained(folder, load_in_4bit=True)
    loading = time.perf_counter() - start
    linear = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    stored = sum(b.nbytes for m in linear for b in m.buffers())
    weights = sum(m.in_features * m.out_features for m in linear)
    loaded = resident("RssAnon") - before
    add_lora(model, LoraConfig(r=RANK, lora_alpha=2 * RANK))
    checkpoint_blocks(model)
    machine.keep_memory(False)  # as train/run.py does
    config = TrainConfig(
        max_steps=STEPS, per_device_train_batch_size=1, max_length=LENGTH, optim="adamw", gradient_checkpointing=True,
        learning_rate=1e-4, logging_steps=1,
    )  # fmt: skip
    ids = torch.randint(0, SHAPE["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(LENGTH)[None], torch.zeros_like(ids))
    peak, seconds = PeakMemory(torch.device("cpu")), []
    trainer = Trainer(model, causal_lm, lambda step: [batch], config, STEPS, dtype=torch.bfloat16, watchers=[peak])
    peak.begin(trainer.masters, model)
    for _ in range(STEPS):
        start = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - start)
    plan = predict(planned_run(model.config, config, torch.bfloat16, torch.device("cpu"), "qlora", RANK))
    return {
        "seconds to load": loading, "memory after loading": loaded, "weights": weights,
        "bytes per quantized weight": stored / weights, "measured peak": float(peak.measured() or 0),
        "predicted peak": plan.peak, "tokens_per_second": LENGTH / min(seconds),
    }  # fmt: skip


def theirs(folder: str) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from zero2hero import machine

    machine.prepare()
    before, start = resident("RssAnon"), time.perf_counter()
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    )
    loading = time.perf_counter() - start
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(0))
    model.train()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds to load": loading, "measured peak": resident("VmHWM") - before,
            "tokens_per_second": LENGTH / min(seconds)}  # fmt: skip


def kernels(rounds: int = 7) -> dict[str, Any]:
    """Seconds for a matrix [8192, 2048] from NF4 to numbers, and from numbers to NF4."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    from zero2hero.nn import nf4

    weight = torch.randn(8192, 2048)
    w, code, found = nf4.quantize(weight), nf4.nf4_code(), {}
    scales, decode = w.scales, torch.ops.bitsandbytes.dequantize_4bit.default
    for dtype in (torch.float32, torch.bfloat16):
        contestants = {
            "ours": functools.partial(nf4.dequantize, w, dtype),
            "bitsandbytes": functools.partial(decode, w.codes, scales, 64, "nf4", w.shape, dtype),
            "definition": functools.partial(nf4._weights, w.codes, scales, code, dtype),
        }
        found[f"to {str(dtype).removeprefix('torch.')}"] = interleaved(contestants, rounds)
    encode = functools.partial(quantize_4bit, weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    found["quantize"] = interleaved({"ours": lambda: nf4.quantize(weight), "bitsandbytes": encode}, 3)
    return found


def in_a_process(name: str, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", name, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_model(folder: Path) -> None:
    import torch

    from zero2hero.models import Decoder, DecoderConfig, save_pretrained

    with torch.device("meta"):
        model = Decoder(DecoderConfig(**SHAPE, tie_word_embeddings=True))
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
             for n, p in model.named_parameters()}  # fmt: skip
    save_pretrained(model, folder, state)


def main() -> None:
    of_kernels, rows = kernels(), []
    for kind, times in of_kernels.items():
        milliseconds = {name: f"{1000 * min(times[name]):.1f} ms" if name in times else "-"
                        for name in ("ours", "bitsandbytes", "definition")}  # fmt: skip
        rows.append({"": kind, **milliseconds, "ours is": f"{ratio(times['bitsandbytes'], times['ours']):.1f}x"})
    print(table(rows))
    if "--kernels" in sys.argv:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        results = {name: in_a_process(name, folder) for name in ("ours", "theirs")}
    one = results["ours"]
    one["error of the prediction"] = one["predicted peak"] / one["measured peak"] - 1
    print(json.dumps(results, indent=1))
    for name, limit in LIMITS.items():
        print(f"{name}: {one[name]:.3f}, limit {limit}: {'holds' if abs(one[name]) <= limit else 'DOES NOT HOLD'}")
    print(record("qlora", {**results, "kernels": of_kernels}, limits=LIMITS, shape=SHAPE))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps({"ours": ours, "theirs": theirs}[sys.argv[2]](sys.argv[3])))
    else:
        main()
