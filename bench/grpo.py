"""GRPO, from prompts to optimizer step: 8 prompts x 8 samples x 64 tokens with a model of 12M weights, against TRL.

The same shape, tokenizer, prompts, reward and loss (dapo, no KL); a step is one rollout and one update. TRL runs at its
default (fp32) and with bf16 autocast, both with transformers' generation. Ours runs in fp32 and as `precision auto`
chooses. Contestants have a process each and take turns. Where our time goes is in the record.

    python bench/grpo.py
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import record, table

PROMPTS, SAMPLES, TOKENS, PROMPT_TOKENS, STEPS = 8, 8, 64, 32, 6
SHAPE = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 4096, "intermediate_size": 1024,
    "max_position_embeddings": 256,
}  # fmt: skip
CONTESTANTS = ("ours fp32", "ours auto", "ours fp32 LoRA", "TRL fp32", "TRL bf16")
TARGET = 5.0  # times TRL at its best


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(text.count("a")) for text in completions]


def prepared(folder: Path) -> list[str]:
    """A tokenizer in the folder, and prompts of equal length in its tokens."""
    from zero2hero.data.worlds import world
    from zero2hero.tokenizer import Tokenizer

    texts = list(world("stories").documents("train", 2000))
    tokenizer = Tokenizer.train(texts, vocab_size=4096)
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts[: 4 * PROMPTS * (STEPS + 2)]]
    prompts = [tokenizer.decode(row[:PROMPT_TOKENS]) for row in ids]
    return [p for p in prompts if len(tokenizer.encode(p, add_special_tokens=False)) == PROMPT_TOKENS]


def ours(name: str, folder: Path, prompts: list[str]) -> dict[str, Any]:
    import torch

    from zero2hero.align import grpo, rollout
    from zero2hero.align.online import Prompt
    from zero2hero.align.rewards import load_rewards
    from zero2hero.alignment_configs import GrpoConfig, grpo_defaults
    from zero2hero.config import DecoderConfig
    from zero2hero.models import Decoder, init_weights
    from zero2hero.tokenizer import Tokenizer
    from zero2hero.train.loop import Trainer
    from zero2hero.train.run import choose_precision
    from zero2hero.tune import LoraConfig, add_lora

    tokenizer = Tokenizer.from_pretrained(folder)
    dtype, _ = choose_precision("auto" if "auto" in name else "fp32", torch.device("cpu"))
    model: Any = Decoder(DecoderConfig(**SHAPE))
    init_weights(model)
    if "LoRA" in name:
        add_lora(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    config = GrpoConfig(model="none", train=grpo_defaults(), num_generations=SAMPLES, max_completion_length=TOKENS)
    eos = [tokenizer.eos_token_id]
    sampler = rollout.Sampler(model, tokenizer, eos, max_completion_length=TOKENS)  # type: ignore[arg-type]
    asked = [Prompt(tokenizer.encode(text), text, {}) for text in prompts]
    practice = grpo.Practice(config, asked, sampler, load_rewards([reward]), dtype=dtype)
    seconds = {"rollout": [], "rewards and the rest of a rollout": [], "step": []}  # type: ignore[var-annotated]

    def timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = function(*arguments)
            times.append(time.perf_counter() - start)
            return found

        return run

    practice.sampler = timed(sampler.__call__, seconds["rollout"])  # type: ignore[assignment]
    practice.sampler.model, practice.sampler.tokenizer = model, tokenizer  # type: ignore[misc]
    collect = timed(practice.collect, seconds["rewards and the rest of a rollout"])
    data = rollout.RolloutData(collect, samples_per_micro_batch=config.train.per_device_train_batch_size)
    trainer = Trainer(model, practice.objective, data, config.train, 10**6, dtype=dtype)
    step = timed(trainer.step, seconds["step"])
    for _ in range(STEPS + 1):
        step()
    medians = {what: statistics.median(times[1:]) for what, times in seconds.items()}
    medians["rewards and the rest of a rollout"] -= medians["rollout"]
    medians["training"] = medians["step"] - medians["rollout"] - medians["rewards and the rest of a rollout"]
    return {"seconds": medians.pop("step"), "where": medians, "tokens": sum(data.rollout.lengths)}  # type: ignore[union-attr]


def trl(name: str, folder: Path, prompts: list[str]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if "bf16" in name:  # its best setting gets what ours has: safe bf16 and memory that is kept
        from zero2hero import machine

        machine.prepare()
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        settings = GRPOConfig(
            output_dir=output, report_to=[], use_cpu=True, bf16="bf16" in name, per_device_train_batch_size=64,
            num_generations=SAMPLES, max_completion_length=TOKENS, max_steps=STEPS + 1, save_strategy="no",
            logging_strategy="no", learning_rate=1e-4, gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        trainer = GRPOTrainer(model, reward, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(Clock())
        trainer.train()
    return {"seconds": statistics.median(b - a for a, b in itertools.pairwise(ends))}


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[2])
        prompts = json.loads((folder / "prompts.json").read_text())
        print(json.dumps((ours if sys.argv[1].startswith("ours") else trl)(sys.argv[1], folder, prompts)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.json").write_text(json.dumps(prepared(folder)))
        for _ in range(2):
            for contestant in CONTESTANTS:
                done = subprocess.run(
                    [sys.executable, __file__, contestant, str(folder)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                found[contestant].append(json.loads(done.stdout.splitlines()[-1]))
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in found.items()}
    rates = {name: PROMPTS * SAMPLES / run["seconds"] for name, run in best.items()}
    theirs = max(rate for name, rate in rates.items() if name.startswith("TRL"))
    rows = [
        {"contestant": name, "completions/s": rate, "times TRL's best": rate / theirs} for name, rate in rates.items()
    ]
    print(table(rows))
    for name, run in best.items():
        if "where" in run:
            print(name, {what: f"{seconds:.3f} s" for what, seconds in run["where"].items()})
    record("grpo", rows, where={name: run["where"] for name, run in best.items() if "where" in run}, target=TARGET)


if __name__ == "__main__":
    main()
