"""Time to quality: tiny Shakespeare by characters, on two CPU cores.

The whole validation split (the last 10 % of the text), non-overlapping windows of 256, no test-time tricks. The models
are a plain published architecture (Qwen3's) that exports to Hugging Face. Landmarks: nanoGPT's CPU recipe reaches 1.88
nats, and its README's A100 recipe 1.4697 in three minutes.

The number of steps for a time budget is set beforehand from the speed of a few steps of each row length; the seconds
reported are those of the whole training loop, data included, without the one evaluation at the end.

    python bench/shakespeare.py [--seconds 12 60 180] [--seeds 3] [--data ../shared/data/tinyshakespeare/input.txt]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

from common import ROOT, record, table

from zero2hero.config import DecoderConfig, TrainConfig

TARGETS = {12: 1.88, 60: 1.56, 180: 1.4697}
QWEN3 = {"qk_norm": True, "tie_word_embeddings": False, "rope_theta": 1000.0}  # SwiGLU, RMSNorm and rotary by default
SHAPES = {  # budget in seconds -> what is best for it
    12: DecoderConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, **QWEN3),
    60: DecoderConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, **QWEN3),
    180: DecoderConfig(hidden_size=160, num_hidden_layers=5, num_attention_heads=5, **QWEN3),
}
MARGIN = 0.78  # of the budget is planned for: a busy machine must not push a run over it
TRAIN = TrainConfig(
    max_steps=1,
    per_device_train_batch_size=16,
    max_length=256,
    length_schedule=[0.3, 0.35],
    learning_rate=0.009,
    embedding_lr_scale=2.2,
    head_lr_scale=0.45,
    weight_decay=0.1,
    max_grad_norm=0.0,
    warmup_steps=0.01,
    decay_steps=0.6,
    document_mask=False,
    logging_steps=1000,
)


class Race:
    """The text, tokenized and split once for all runs."""

    def __init__(self, path: Path) -> None:
        import torch

        from zero2hero.data.cache import split_documents, tokenize_to_cache
        from zero2hero.data.sources import open_source
        from zero2hero.tokenizer import Tokenizer
        from zero2hero.train.run import choose_precision

        self.device = torch.device("cpu")
        self.dtype, _ = choose_precision("auto", self.device)
        source = open_source(path)
        self.tokenizer = Tokenizer.train(source, kind="char")
        with tempfile.TemporaryDirectory() as folder:
            cache = tokenize_to_cache(source, self.tokenizer, folder)
            self.training, self.held_out = split_documents(cache, 0.1)

    def trainer(self, shape: DecoderConfig, train: TrainConfig, seed: int):
        """A fresh run of `train.max_steps`."""
        from zero2hero.models import Decoder, init_weights
        from zero2hero.train.loop import Trainer
        from zero2hero.train.objectives import causal_lm
        from zero2hero.train.pretrain import causal_data

        train = dataclasses.replace(train, seed=seed)
        model = Decoder(dataclasses.replace(shape, vocab_size=self.tokenizer.vocab_size))
        init_weights(model, seed)
        total, data = causal_data(self.training, train, self.device)
        return Trainer(model, causal_lm, data, train, total, dtype=self.dtype)

    def steps_for(self, seconds: float, shape: DecoderConfig, train: TrainConfig) -> int:
        """How many steps fit: the schedule's mean of each phase's seconds per step, measured now."""
        shares = [*train.length_schedule, 1 - sum(train.length_schedule)]
        mean = 0.0
        for phase, share in enumerate(shares):
            trainer = self.trainer(shape, dataclasses.replace(train, max_steps=10**4), 0)
            trainer.state.step = int(10**4 * (sum(shares[:phase]) + 0.01))
            times = []
            for _ in range(25):
                start = time.perf_counter()
                trainer.step()
                times.append(time.perf_counter() - start)
            mean += share * statistics.median(times[5:])
        return int(MARGIN * seconds / mean)

    def run(self, shape: DecoderConfig, train: TrainConfig, seed: int) -> tuple[float, float]:
        """(seconds of training, validation loss in nats per character)."""
        import torch

        from zero2hero.train.pretrain import evaluation

        trainer = self.trainer(shape, train, seed)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trainer.model.eval()
        with torch.no_grad():
            evaluate = evaluation(trainer.model, self.held_out, train, self.device, self.tokenizer)
            return seconds, evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[12, 60, 180])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt")
    arguments = parser.parse_args()
    if not arguments.data.exists():
        raise SystemExit(f"{arguments.data} is not there: give tiny Shakespeare's input.txt with --data")
    race = Race(arguments.data)
    results, rows = {}, []
    for budget in arguments.seconds:
        shape = SHAPES.get(budget, SHAPES[60])
        train = dataclasses.replace(TRAIN, max_steps=race.steps_for(budget, shape, TRAIN))
        runs = [race.run(shape, train, seed) for seed in range(arguments.seeds)]
        seconds, losses = zip(*runs)
        median = statistics.median(losses)
        target = TARGETS.get(budget)
        results[budget] = {
            "loss_nats_median": round(median, 4), "losses": [round(x, 4) for x in losses], "target": target,
            "seconds": [round(s, 1) for s in seconds], "within_budget": max(seconds) <= budget,
            "steps": train.max_steps,
            "tokens": train.max_steps * train.per_device_train_batch_size * train.max_length,
            "shape": f"{shape.num_hidden_layers} x {shape.hidden_size}, {shape.feedforward}, QK-norm",
            "dtype": str(race.dtype),
        }  # fmt: skip
        rows.append({
            "budget s": budget, "used s": round(max(seconds), 1), "steps": train.max_steps,
            "nats, median": round(median, 4), "all": str([round(x, 4) for x in losses]), "target": target or "",
        })  # fmt: skip
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    print(record("shakespeare", results))


if __name__ == "__main__":
    main()
