"""DPO's training speed against TRL: a Llama of 12M weights (d384 L6 V4096), 8 pairs a batch, texts of about 180 tokens.

Every weight is trained with AdamW (fused), and the reference pass is counted: one for each batch, as in a run of one
epoch. Ours computes each prompt once for both answers and trains as `precision auto` chooses, and in fp32. TRL's
DPOTrainer runs its own collator's batch through its own `training_step`, without gradient checkpointing, in fp32 and in
bf16 (autocast, with the memory settings that ours has); the reference is a second model. "without reference": the
reference's log-probabilities are known (later epochs; TRL's precompute_ref_log_probs).

Each contestant has a process of its own and they take turns. `--prompts` measures what decides when a prompt is shared.

    python bench/dpo.py
    python bench/dpo.py --prompts
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from common import record, steady_rate, table

VOCABULARY, PAIRS = 4096, 8
SHAPE = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": VOCABULARY,
    "intermediate_size": 1024, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
CONTESTANTS = (
    "ours shared", "ours apart", "ours fp32 shared", "ours fp32 apart", "TRL fp32", "TRL bf16",
    "ours without reference", "TRL bf16 without reference",
)  # fmt: skip
TARGET = 3.0


def pairs(prompt: int = 60, answer: int = 120) -> list[list[np.ndarray]]:
    """Ragged, by a third around these lengths: [prompt, chosen, rejected] each."""
    rng = np.random.default_rng(0)
    lengths = [[prompt, answer, answer] for _ in range(PAIRS)]
    return [[rng.integers(3, VOCABULARY, int(n * rng.uniform(2 / 3, 4 / 3))) for n in pair] for pair in lengths]


def worker(name: str, seconds: float, prompt: int, answer: int) -> None:
    """Train for some seconds and print the median pairs/s."""
    step = (_ours if name.startswith("ours") else _trl)(name, pairs(prompt, answer))
    print(json.dumps({"pairs_per_second": steady_rate(step, PAIRS, seconds)}))


def _ours(name: str, data):
    import dataclasses
    import functools

    import torch

    from zero2hero.align.dpo import objective
    from zero2hero.align.pairs import Tree, answer_batch, reference_logprobs
    from zero2hero.align.reference import Reference
    from zero2hero.alignment_configs import DpoConfig
    from zero2hero.config import DecoderConfig, TrainConfig
    from zero2hero.models import Decoder, init_weights
    from zero2hero.train.loop import Trainer
    from zero2hero.train.run import choose_precision

    dtype, _ = choose_precision("fp32" if "fp32" in name else "auto", torch.device("cpu"))
    model = Decoder(DecoderConfig(**SHAPE))
    init_weights(model)
    reference = Reference.of(model, dtype)
    share = True if "shared" in name else False if "apart" in name else None
    trees = [Tree(p, (c, r)) for p, c, r in data]

    def batches(step: int):
        batch = answer_batch(trees, share=share, nll_share=np.float32(1)).to("cpu")  # laid out anew for each step
        known = torch.zeros(2 * PAIRS)
        if "without" not in name:
            known = reference_logprobs(reference, trainer.model, batch)
        return [dataclasses.replace(batch, reference_N=known)]

    config = DpoConfig(model="x", method="full")
    train = TrainConfig(optim="adamw", learning_rate=1e-6, max_steps=10**6)
    trainer = Trainer(model, functools.partial(objective, config=config), batches, train, 10**6, dtype=dtype)
    return trainer.step


def _trl(name: str, data):
    import copy

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    bf16 = "bf16" in name
    if bf16:  # its best setting gets what ours has: safe bf16 and memory that is kept
        from zero2hero import machine

        machine.prepare()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")
    args = DPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=bf16, gradient_checkpointing=False, report_to=[],
                     per_device_train_batch_size=PAIRS, disable_tqdm=True)  # fmt: skip
    texts = Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}])  # for the constructor
    trainer = DPOTrainer(model, copy.deepcopy(model), args, train_dataset=texts, processing_class=tokenizer)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: ids.tolist() for name, ids in zip(names, row)} for row in data]
    known = "without" in name
    trainer.precompute_ref_logps = known
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6, fused=True)
    trainer.model.train()

    def step() -> None:
        inputs = trainer.data_collator(rows)
        if known:
            inputs |= {"ref_chosen_logps": torch.zeros(PAIRS), "ref_rejected_logps": torch.zeros(PAIRS)}
        trainer.training_step(trainer.model, inputs)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(names, rounds: int, seconds: float, prompt: int = 60, answer: int = 120) -> dict[str, list[float]]:
    """Pairs per second of each contestant in each round."""
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, __file__, "--worker", name, str(seconds), str(prompt), str(answer)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            speeds[name].append(json.loads(done.stdout.splitlines()[-1])["pairs_per_second"])
    return speeds


def compare() -> None:
    speeds = measure(CONTESTANTS, rounds=2, seconds=3.0)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ours = max(median["ours shared"], median["ours apart"])  # align/pairs.py takes the better one
    best = max(median["TRL fp32"], median["TRL bf16"])
    results = {
        "pairs_per_second": {name: round(v, 2) for name, v in median.items()},
        "all_rounds": {name: [round(x, 2) for x in v] for name, v in speeds.items()},
        "times_trl_fp32": round(ours / median["TRL fp32"], 2),
        "times_trl_at_its_best": round(ours / best, 2),
        "times_trl_without_reference": round(
            median["ours without reference"] / median["TRL bf16 without reference"], 2
        ),
        "target": TARGET,
    }
    print(table([{"": name, "pairs/s": v} for name, v in median.items()]))
    print(json.dumps({name: value for name, value in results.items() if "times" in name}))
    print(record("dpo", results))


def prompts() -> None:
    """Shared or apart, by the prompt's length for answers of 120 tokens."""
    rows = []
    for prompt in (2, 8, 30, 60, 120):
        for precision in ("", " fp32"):
            speeds = measure([f"ours{precision} shared", f"ours{precision} apart"], 1, 3.0, prompt)
            shared, apart = (values[0] for values in speeds.values())
            rows.append({"prompt": prompt, "precision": precision or "auto", "shared is faster": shared / apart})
            print(rows[-1], flush=True)
    print(record("dpo_prompts", rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    elif sys.argv[1:2] == ["--prompts"]:
        prompts()
    else:
        compare()
