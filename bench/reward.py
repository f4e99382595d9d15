"""Reward models from real preferences, by `zero2hero reward` and by TRL's RewardTrainer: the same split, tokens, first
weights and hyper-parameters. Accuracy on held-out pairs with its 95 % interval, and pairs learned from a second.

    python bench/reward.py              # needs ../shared/data: tinystories656k, hh_rlhf, llamafactory

The model has 656 thousand weights and knows children's stories; that it finds little in these dialogues is expected.
What is shown is that both find the same.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from common import ROOT, record, table

DATA = ROOT.parent / "shared" / "data"
SETS = {"hh_rlhf": "hh_rlhf/harmless_base_first1500.jsonl.gz", "dpo_en_demo": "llamafactory/dpo_en_demo.json"}
SEEDS = (0, 1, 2)
STEPS = {"hh_rlhf": 80, "dpo_en_demo": 25}
LEARNING_RATE, BATCH, LENGTH = 5e-4, 8, 512


def ours(data: Path, seed: int, steps: int, folder: Path) -> Any:
    """The run, and what it says of the held-out pairs."""
    from zero2hero.align.reward import reward
    from zero2hero.alignment_configs import RewardConfig
    from zero2hero.config import from_dict

    reward(from_dict(RewardConfig, {
        "model": str(DATA / "tinystories656k"), "data": str(data), "output_dir": str(folder), "method": "full",
        "validation_fraction": 0.3, "precision": "fp32", "report_to": [],
        "on_bad_record": "skip", "chat_template": "alpaca",
        "train": {"seed": seed, "max_steps": steps, "learning_rate": LEARNING_RATE, "weight_decay": 0.0,
                  "per_device_train_batch_size": BATCH, "max_length": LENGTH, "eval_steps": steps},
    }))  # fmt: skip
    return json.loads((folder / "reward.json").read_text())


def theirs(data: Path, seed: int, steps: int, folder: Path) -> Any:
    """TRL's, from the same head, on the same tokens; its model is judged here, after its files were opened."""
    import transformers
    import trl
    from datasets import Dataset

    from zero2hero.align.reward import encode_pairs, measured, scores_of
    from zero2hero.align.reward_model import with_score_head
    from zero2hero.alignment_configs import RewardConfig
    from zero2hero.config import from_dict
    from zero2hero.models import from_pretrained, save_pretrained
    from zero2hero.tokenizer import Tokenizer
    from zero2hero.tokenizer.templates import set_chat_template
    from zero2hero.train.sft import split_records

    base = DATA / "tinystories656k"
    tokenizer = Tokenizer.from_pretrained(base)
    set_chat_template(tokenizer, "alpaca")
    config = from_dict(RewardConfig, {"model": str(base), "data": str(data), "validation_fraction": 0.3,
                                      "on_bad_record": "skip", "chat_template": "alpaca",
                                      "train": {"seed": seed}})  # fmt: skip
    model = with_score_head(from_pretrained(base), tokenizer, seed)  # type: ignore[arg-type]
    save_pretrained(model, folder / "begin")
    tokenizer.save_pretrained(folder / "begin")
    learn, held_out = (encode_pairs(records, tokenizer, LENGTH, model).pairs for records in split_records(config))
    rows = [{"chosen_ids": p.chosen.tolist(), "rejected_ids": p.rejected.tolist()} for p in learn]
    trainer = trl.RewardTrainer(
        transformers.AutoModelForSequenceClassification.from_pretrained(folder / "begin"),
        trl.RewardConfig(
            output_dir=str(folder / "trl"), max_steps=steps, learning_rate=LEARNING_RATE, lr_scheduler_type="linear",
            warmup_steps=max(1, round(0.03 * steps)), per_device_train_batch_size=BATCH, max_grad_norm=1.0, seed=seed,
            weight_decay=0.0, adam_beta2=0.999, bf16=False, gradient_checkpointing=False, report_to=[], use_cpu=True,
            save_strategy="no", logging_steps=steps, disable_tqdm=True, pad_token="<unk>", max_length=LENGTH,
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "begin"),
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "trl"))
    return measured(scores_of(from_pretrained(folder / "trl"), held_out), held_out)


def main() -> None:
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for name, file in SETS.items():
        found: dict[str, list[Any]] = {"zero2hero": [], "TRL": []}
        for seed in SEEDS:
            for who, run in (("zero2hero", ours), ("TRL", theirs)):
                with tempfile.TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    one = run(DATA / file, seed, STEPS[name], Path(folder))
                    found[who].append(one | {"seconds": time.perf_counter() - start, "seed": seed})
        results[name] = {
            who: {
                "accuracy": round(statistics.mean(one["accuracy"] for one in each), 4),
                "intervals": [[round(one[f"accuracy_{end}"], 4) for end in ("low", "high")] for one in each],
                "held_out_pairs": each[0]["pairs"],
                **{key: [round(one[key], 4) for one in each]
                   for key in ("loss", "calibration_error", "length_correlation", "accuracy_shorter", "seconds")},
            }
            for who, each in found.items()
        }  # fmt: skip
    print(table([{"data": name, "by": who, **{k: str(v) for k, v in one.items()}}
                 for name, both in results.items() for who, one in both.items()]))  # fmt: skip
    print(record("reward", results, seeds=SEEDS, steps=STEPS, learning_rate=LEARNING_RATE))


if __name__ == "__main__":
    main()
