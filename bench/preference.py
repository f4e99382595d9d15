"""DPO on real preferences, against TRL: tinystories656k on hh_rlhf and on LLaMA-Factory's demo.

Ours is `zero2hero dpo` as users run it (fp32, every weight). TRL's DPOTrainer gets the same pairs as tokens, the same
batches in the same order, and AdamW with the same learning rates: its collator, its forward, its loss, its backward
pass. Both are then judged on the same held-out pairs, by each implementation's own numbers.

    python bench/preference.py             # needs ../shared/data
    python bench/preference.py hh_rlhf     # one of the sets
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, record, table

DATA = ROOT.parent / "shared" / "data"
MODEL = DATA / "tinystories656k"
SETS = {  # file, pairs to learn from, held out
    "hh_rlhf": (DATA / "hh_rlhf" / "harmless_base_first1500.jsonl.gz", 400, 400),
    "dpo_en_demo": (DATA / "llamafactory" / "dpo_en_demo.json", 230, 70),
}
PAIRS, MAX_LENGTH, LEARNING_RATE, BETA = 8, 256, 3e-4, 0.1


def config_of(folder: Path, learn: Path, held_out: Path):
    from zero2hero.alignment_configs import DpoConfig
    from zero2hero.config import TrainConfig

    train = TrainConfig(
        optim="adamw", learning_rate=LEARNING_RATE, weight_decay=0.0, adam_beta2=0.999, lr_scheduler_type="linear",
        warmup_steps=0, num_train_epochs=1.0, per_device_train_batch_size=PAIRS, max_length=MAX_LENGTH,
        eval_steps=10**6,
    )  # fmt: skip
    return DpoConfig(
        model=str(MODEL), data=str(learn), eval_data=str(held_out), output_dir=str(folder / "run"), method="full",
        chat_template="alpaca", precision="fp32", device="cpu", report_to=[], num_samples=16, beta=BETA, train=train,
        max_completion_length=64,
    )  # fmt: skip


def split(name: str, folder: Path) -> tuple[Path, Path]:
    """Two files of records that fit, in the data's own form."""
    from zero2hero.align.pairs import encode
    from zero2hero.data.conversations import recognize
    from zero2hero.data.sources import open_source
    from zero2hero.errors import UserError

    file, learn, held_out = SETS[name]
    tokenizer = tokenizer_of()
    kept = []
    for row, where in open_source(str(file)).rows():
        try:
            encode([recognize(row, 1, where)], tokenizer, MAX_LENGTH)
        except UserError:  # too long, or twice the same
            continue
        kept.append(row)
    order = np.random.default_rng(0).permutation(len(kept))
    paths = folder / "learn.jsonl", folder / "held_out.jsonl"
    learn = min(learn, len(kept) * 3 // 4)
    for path, some in zip(paths, (order[:learn], order[learn : learn + held_out])):
        path.write_text("".join(json.dumps(kept[i]) + "\n" for i in some))
    return paths


def tokenizer_of():
    from zero2hero.tokenizer import Tokenizer
    from zero2hero.tokenizer.templates import set_chat_template

    tokenizer = Tokenizer.from_pretrained(MODEL)
    set_chat_template(tokenizer, "alpaca")
    return tokenizer


def ours(config) -> dict[str, float]:
    from zero2hero.align.dpo import dpo
    from zero2hero.train.tracking import read_metrics

    dpo(config)
    evaluated = [row for row in read_metrics(config.output_dir) if "eval_loss" in row]
    first, last = evaluated[0], evaluated[-1]
    names = ("loss", "rewards/accuracies", "rewards/accuracies_low", "rewards/accuracies_high", "rewards/margins", "kl")
    return {name: last[f"eval_{name}"] for name in names} | {"first loss": first["eval_loss"]}


def trl(config) -> tuple[dict[str, float], dict]:
    """What TRL reaches, and its weights."""
    import copy

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from zero2hero.align.dpo import PreferenceData, wilson
    from zero2hero.align.pairs import encode
    from zero2hero.data.conversations import read_records
    from zero2hero.train.parallel import ALONE
    from zero2hero.train.run import Place
    from zero2hero.train.schedule import learning_rate_factor

    tokenizer = tokenizer_of()
    learn, held_out = (encode(read_records(p), tokenizer, MAX_LENGTH).trees for p in (config.data, config.eval_data))
    data = PreferenceData(learn, config, Place(ALONE, torch.device("cpu"), torch.float32, 0.0))
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=PAIRS, disable_tqdm=True, beta=BETA, max_length=None,
    )  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(MODEL)
    theirs.pad_token = theirs.pad_token or theirs.eos_token
    texts = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])  # for the constructor
    trainer = DPOTrainer(model, copy.deepcopy(model), args, train_dataset=texts, processing_class=theirs)
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0)

    def inputs(trees):
        rows = [{"prompt_ids": t.prompt.tolist(), "chosen_ids": t.answers[0].tolist(),
                 "rejected_ids": t.answers[1].tolist()} for t in trees]  # fmt: skip
        return trainer.data_collator(rows)

    steps = -(-len(learn) // PAIRS)
    trainer.model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, steps, "linear", 0, 0.5, 1.0)
        trainer.training_step(trainer.model, inputs([learn[i] for i in data.rows[step]]))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trainer.model.eval()
    trainer._metrics["eval"].clear()
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(held_out), PAIRS):
            some = held_out[first : first + PAIRS]
            total += float(trainer.compute_loss(trainer.model, inputs(some))) * len(some)
    sizes = [len(held_out[i : i + PAIRS]) for i in range(0, len(held_out), PAIRS)]
    mean = {
        n: float(np.average(trainer._metrics["eval"][f"rewards/{n}"], weights=sizes)) for n in ("accuracies", "margins")
    }
    low, high = wilson(mean["accuracies"], len(held_out))
    found = {"loss": total / len(held_out), "rewards/accuracies": mean["accuracies"], "rewards/accuracies_low": low,
             "rewards/accuracies_high": high, "rewards/margins": mean["margins"]}  # fmt: skip
    return found, dict(trainer.model.named_parameters())


def main(names: list[str]) -> None:
    import zero2hero as z2h

    results, rows = {}, []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(Path(folder), *split(name, Path(folder)))
            counts = [len(Path(p).read_text().splitlines()) for p in (config.data, config.eval_data)]
            mine = ours(config)
            theirs, weights = trl(config)
            tuned = dict(z2h.load(config.output_dir).model.named_parameters())
            weights = {n.removeprefix("model."): p for n, p in weights.items()}
            apart = max(float((p - weights[n]).abs().max()) for n, p in tuned.items() if n in weights)
        results[name] = {
            "pairs": counts[0], "held out": counts[1], "ours": mine, "TRL": theirs,
            "largest difference of a weight": apart, "learning_rate": LEARNING_RATE, "beta": BETA,
        }  # fmt: skip
        for who, found in (("ours", mine), ("TRL", theirs)):
            interval = f"{found['rewards/accuracies_low']:.3f} to {found['rewards/accuracies_high']:.3f}"
            numbers = {"margin": found["rewards/margins"], "loss": found["loss"]}
            rows.append({"data": name, "": who, "accuracy": found["rewards/accuracies"], "95 %": interval} | numbers)
        print(table(rows), "\nlargest difference of a weight:", apart, flush=True)
    print(record("preference" + "".join(f"_{name}" for name in names if len(names) < len(SETS)), results))


if __name__ == "__main__":
    main(sys.argv[1:] or list(SETS))
