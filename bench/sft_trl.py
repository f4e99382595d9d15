"""Fine-tuning against TRL's SFTTrainer, on real data: does the same run end the same, and how fast is each?

`parity`: LoRA of a real model (TinyStories-656K) on 1,045 real instructions, 55 held out. Both sides get the same
prompts and completions in the same order and batches, unpacked, with the same settings in fp32; each draws its own
first weights. Both adapters are then judged by one program: the loss over the held-out responses' tokens.

`speed`: LoRA of a Llama of d384 L6 V4096 on 500 real conversations, 8 rows a step. Useful tokens are those of the
conversations, without padding. Each contestant has a process of its own and they take turns. Ours is what
`zero2hero sft` does by default (packed; precision auto) and in fp32; TRL runs as it is by default (one conversation in
a row; bf16 autocast; activations checkpointed), the same without checkpointing, in bf16 and in fp32, and packed.

    python bench/sft_trl.py [parity speed] [--data ../shared/data]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, record, table

ROWS = 8
PROMPT = "Below is an instruction that describes a task.\n\n### Instruction:\n{}\n\n### Response:"
SHAPE = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


# --- parity -----------------------------------------------------------------------------------------------------


def instructions(data: Path) -> list[dict[str, str]]:
    """Prompts and completions, as text."""
    rows = json.loads((data / "rasbt_instruct" / "instruction-data.json").read_text())
    asked = [f"{row['instruction']}\n\n{row['input']}".strip() for row in rows]
    return [{"prompt": PROMPT.format(ask), "completion": f" {row['output']}"} for ask, row in zip(asked, rows)]


def parity_config(folder: Path, model: Path, seed: int, steps: int) -> Any:
    """Our run; TRL's is derived from it."""
    from zero2hero.tune.config import LoraConfig
    from zero2hero.tuning_configs import SftConfig, tuning_defaults

    train = dataclasses.replace(
        tuning_defaults(), learning_rate=2e-3, max_steps=steps, per_device_train_batch_size=ROWS, max_length=512,
        eval_steps=10**6, seed=seed,
    )  # fmt: skip
    return SftConfig(
        model=str(model), data=str(folder / "train.jsonl"), eval_data=str(folder / "held_out.jsonl"), train=train,
        output_dir=str(folder / f"ours_{seed}"), precision="fp32", packing=False, report_to=[], chat_template="alpaca",
        lora=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"),
    )  # fmt: skip


def parity(data: Path, seeds: int = 3, epochs: int = 3) -> dict[str, Any]:
    """Held-out loss before, and at the end of our run and of TRL's, for each seed."""
    rows, model = instructions(data), data / "tinystories656k"
    before, ours, theirs = 0.0, [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out, learn = rows[::20], [row for i, row in enumerate(rows) if i % 20]
        for part, chosen in (("train", learn), ("held_out", held_out)):
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        for seed in range(seeds):
            config = parity_config(folder, model, seed, epochs * len(learn) // ROWS)
            before, end = run_ours(config)
            ours.append(end)
            theirs.append(held_out_loss(config, run_trl(config)))
            print(f"seed {seed}: {before:.4f} -> ours {ours[-1]:.4f}, TRL {theirs[-1]:.4f}", flush=True)
    gaps = [abs(a - b) for a, b in zip(ours, theirs)]
    return {
        "held_out_loss_before": before, "ours": ours, "trl": theirs, "largest_difference": max(gaps), "target": 0.02,
        "steps": epochs * len(learn) // ROWS, "train_records": len(learn), "held_out_records": len(held_out),
    }  # fmt: skip


def run_ours(config: Any) -> tuple[float, float]:
    """Held-out loss before and after `zero2hero sft`, as its record says."""
    from zero2hero.train.sft import sft
    from zero2hero.train.tracking import read_metrics

    sft(config)
    losses = [row["eval_loss"] for row in read_metrics(config.output_dir) if "eval_loss" in row]
    return losses[0], losses[-1]


def encoded(config: Any, path: str) -> tuple[Any, Any]:
    """(the tokenizer, our examples of a file's records)."""
    from zero2hero.data.conversations import read_records
    from zero2hero.data.examples import encode_records
    from zero2hero.tokenizer import Tokenizer
    from zero2hero.tokenizer.templates import set_chat_template

    tokenizer = Tokenizer.from_pretrained(config.model)
    set_chat_template(tokenizer, config.chat_template)
    return tokenizer, encode_records(read_records(path), tokenizer, max_length=config.train.max_length).examples


def held_out_loss(config: Any, adapter: Path) -> float:
    """Of the model with an adapter that PEFT wrote: nats over the tokens of the held-out responses."""
    from zero2hero.data.packed import evaluation_batches
    from zero2hero.models import from_pretrained
    from zero2hero.train.objectives import causal_lm
    from zero2hero.tune import load_adapter

    model = load_adapter(from_pretrained(config.model), adapter).eval()
    total = weight = 0.0
    for batch in evaluation_batches(encoded(config, config.eval_data)[1], config.train.max_length, ROWS):
        loss = causal_lm(model, batch.to("cpu"))
        total, weight = total + float(loss.sum), weight + float(loss.weight)
    return total / weight


def run_trl(config: Any) -> Path:
    """The same run by SFTTrainer: our order of the examples and their tokens, our settings.

    TRL gets tokens because its tokenizer drops unknown characters ("#"), which tokenizer.json has a token for.
    Returns the adapter's folder.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM

    from zero2hero.data.packed import PackedBatches

    train, out = config.train, Path(config.output_dir).with_name(f"trl_{config.train.seed}")
    examples = encoded(config, config.data)[1]
    batches = PackedBatches(examples, train.max_length, ROWS, train.seed, packing=False)
    order = [i for epoch in range(9) for (i,) in batches._rows(epoch)][: train.max_steps * ROWS]
    rows = [
        {"input_ids": e.ids.tolist(), "completion_mask": (e.weights > 0).astype(int).tolist()}
        for e in (examples[i] for i in order)
    ]
    torch.manual_seed(train.seed)
    trainer = in_order()(
        LlamaForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=trl_settings(
            out, learning_rate=train.learning_rate, max_steps=train.max_steps, max_length=train.max_length,
            warmup_steps=round(train.warmup_steps * train.max_steps), completion_only_loss=True, bf16=False,
            gradient_checkpointing=False, weight_decay=train.weight_decay, seed=train.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(config.model), peft_config=peft_config(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))
    return out


def in_order() -> Any:
    """SFTTrainer that keeps the order of its records."""
    import trl
    from torch.utils.data import SequentialSampler

    class InOrder(trl.SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return InOrder


def peft_config() -> Any:
    import peft

    return peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def trl_settings(out: Path, **more: Any) -> Any:
    import trl

    return trl.SFTConfig(
        output_dir=str(out), per_device_train_batch_size=ROWS, lr_scheduler_type="linear", report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=100, dataloader_pin_memory=False, **more,
    )  # fmt: skip


# --- speed ------------------------------------------------------------------------------------------------------

UNPACKED: dict[str, Any] = {"packing": False, "bf16": True, "gradient_checkpointing": False}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "ours": {"precision": "auto"},
    "ours fp32": {"precision": "fp32"},
    "ours fp32, unpacked": {"precision": "fp32", "packing": False},
    "TRL by default": UNPACKED | {"gradient_checkpointing": True},
    "TRL bf16": UNPACKED,
    "TRL fp32": UNPACKED | {"bf16": False},
    "TRL bf16, packed": UNPACKED | {"packing": True},
    "TRL fp32, packed": UNPACKED | {"packing": True, "bf16": False},
    "TRL bf16, padding-free": UNPACKED | {"padding_free": True},
}
LENGTH = 1024


def speed(data: Path, rounds: int = 3, seconds: float = 8.0) -> dict[str, Any]:
    """Useful tokens per second of each contestant."""
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), data)
        for turn in range(rounds):
            for name in CONTESTANTS:
                command = [sys.executable, __file__, "--worker", name, "--folder", folder, "--seconds", str(seconds),
                           "--data", str(data)]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                rates[name].append(json.loads(done.stdout.splitlines()[-1])["useful_tokens_per_second"])
                print(f"round {turn + 1}: {name}: {rates[name][-1]:,.0f}", flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(table([{"": n, "useful tok/s": f"{v:,.0f}", "ours is": f"{median['ours'] / v:.2f}x"}
                 for n, v in median.items()]))  # fmt: skip
    return {
        "useful_tokens_per_second": {name: round(v) for name, v in median.items()},
        "all_rounds": {name: [round(x) for x in v] for name, v in rates.items()},
        "ours_times": {n: round(median["ours"] / v, 2) for n, v in median.items() if n.startswith("TRL")},
        "target": {"TRL by default": 3.0},
    }


def conversations(data: Path) -> Path:
    return data / "llamafactory" / "v1_sft_demo.jsonl"


def make_model(folder: Path, data: Path) -> None:
    """A Llama that was never trained, and a tokenizer made from the conversations, as a Hugging Face directory."""
    import zero2hero as z2h
    from zero2hero.config import DecoderConfig
    from zero2hero.data.conversations import read_records
    from zero2hero.models import Decoder, init_weights
    from zero2hero.tokenizer import Tokenizer
    from zero2hero.tokenizer.templates import set_chat_template
    from zero2hero.train.pretrain import fit_shape

    texts = [str(m["content"]) for r in read_records(str(conversations(data))) for m in r.messages]
    tokenizer = Tokenizer.train(texts, 4096)
    set_chat_template(tokenizer, "chatml")
    model = Decoder(fit_shape(DecoderConfig(**SHAPE), tokenizer))
    init_weights(model, 0)
    z2h.save(z2h.LanguageModel(model, tokenizer), folder)


def worker(name: str, folder: Path, data: Path, seconds: float) -> None:
    """Train for some seconds after two steps to warm up, and print useful tokens per second."""
    clock = Clock(seconds)
    (_time_ours if name.startswith("ours") else _time_trl)(CONTESTANTS[name], folder, data, clock)
    print(json.dumps({"useful_tokens_per_second": clock.tokens / clock.seconds}))


class Clock:
    """Counts whole steps; the first ones only warm up."""

    def __init__(self, limit: float) -> None:
        self.limit, self.warm, self.tokens, self.seconds, self.started = limit, 2, 0, 0.0, 0.0

    def step(self, tokens: int) -> bool:
        """Called after each step with the tokens it learned from; True when time is up."""
        now = time.perf_counter()
        if self.warm > 0:
            self.warm, self.started = self.warm - 1, now
            return False
        self.tokens, self.seconds = self.tokens + tokens, now - self.started
        return self.seconds > self.limit


def _time_ours(settings: dict[str, Any], folder: Path, data: Path, clock: Clock) -> None:
    import torch

    from zero2hero.data.packed import PackedBatches
    from zero2hero.models import from_pretrained
    from zero2hero.train.loop import Trainer
    from zero2hero.train.objectives import causal_lm
    from zero2hero.train.run import choose_precision
    from zero2hero.tune import add_lora
    from zero2hero.tuning_configs import SftConfig

    dtype, _ = choose_precision(settings["precision"], torch.device("cpu"))
    config = SftConfig(model=str(folder), packing=settings.get("packing", True))
    train = dataclasses.replace(config.train, max_length=LENGTH, per_device_train_batch_size=ROWS)
    examples = encoded(dataclasses.replace(config, train=train), str(conversations(data)))[1]
    batches = PackedBatches(examples, LENGTH, ROWS, 0, packing=config.packing)
    model = add_lora(from_pretrained(folder, dtype=dtype), config.lora)
    trainer = Trainer(model, causal_lm, lambda step: [batches[step].to("cpu")], train, 10**6, dtype=dtype)
    while True:
        first = trainer.state.step * ROWS
        places = [divmod(row, batches.rows_per_epoch) for row in range(first, first + ROWS)]
        trainer.step()
        if clock.step(sum(len(examples[i]) for epoch, row in places for i in batches._rows(epoch)[row])):
            return


def _time_trl(settings: dict[str, Any], folder: Path, data: Path, clock: Clock) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import SFTTrainer

    from zero2hero import machine
    from zero2hero.data.conversations import read_records

    machine.prepare()  # what ours has: safe bf16, and memory that is kept
    rows = [{"messages": [{k: str(m[k]) for k in ("role", "content")} for m in r.messages]}
            for r in read_records(str(conversations(data)))]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin, end = "{{- '<|im_start|>' + message.role + '\\n' }}", "{%- endfor %}"
    tokenizer.chat_template = (
        "{%- for message in messages %}" + begin + "{%- if message.role == 'assistant' %}{% generation %}"
        "{{- message.content + '<|im_end|>' }}{% endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}"
        "{%- endif %}{{- '\\n' }}" + end
    )
    counted = [0]

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop, counted[0] = clock.step(counted[0]), 0

    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl_settings(folder / "trl", learning_rate=2e-4, max_steps=10**6, max_length=LENGTH,
                          assistant_only_loss=True, **settings),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft_config(),
        callbacks=[Watch()],
    )  # fmt: skip
    collate = trainer.data_collator

    def count(examples: list[Any]) -> Any:
        counted[0] += sum(len(example["input_ids"]) for example in examples)
        return collate(examples)

    trainer.data_collator = count
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["parity", "speed"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each contestant in each round")
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.folder, arguments.data, arguments.seconds)
    for part in arguments.parts:
        found = parity(arguments.data) if part == "parity" else speed(arguments.data, seconds=arguments.seconds)
        print(record(f"sft_trl_{part}", found))
    return None


if __name__ == "__main__":
    main()
