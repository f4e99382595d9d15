"""What saving costs the loop: the quickstart's model, with a checkpoint every 100 steps (less than 5 % of the time).

The loop is the real one; its batches are random tokens, one document a row, which makes a step a little faster than
real text does and saving's share a little larger. Every checkpoint is hashed and flushed to the disk of this folder.

    python bench/checkpoint.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from common import ROOT, record, table

SAVE_STEPS, SAVES = 100, 4
LIMIT = 0.05


def main() -> None:
    import torch

    from zero2hero.data.batches import Batch
    from zero2hero.models import Decoder, init_weights
    from zero2hero.options import QuickstartConfig
    from zero2hero.quickstart import settings
    from zero2hero.train.loop import Trainer
    from zero2hero.train.objectives import causal_lm
    from zero2hero.train.run import choose_precision

    quickstart = settings(QuickstartConfig(steps=SAVE_STEPS * SAVES))
    vocabulary, c = quickstart.tokenizer.vocab_size, quickstart.train
    rows, length = c.per_device_train_batch_size, c.max_length
    dtype, _ = choose_precision("auto", torch.device("cpu"))
    model = Decoder(type(quickstart.model)(**vars(quickstart.model) | {"vocab_size": vocabulary}))
    init_weights(model)
    ids = torch.randint(0, vocabulary, (rows, length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(length).expand(rows, -1), None)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=ROOT) as folder:
        trainer = Trainer(model, causal_lm, lambda step: [batch], c, c.max_steps, folder, dtype=dtype)
        steps, saves = [], []
        while trainer.state.step < c.max_steps:
            start = time.perf_counter()
            trainer.step()
            steps.append(time.perf_counter() - start)
            if trainer.state.step % SAVE_STEPS == 0:
                start = time.perf_counter()
                trainer.save()
                saves.append(time.perf_counter() - start)
        newest = max((Path(folder) / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in newest.iterdir())
    share = sum(saves) / (sum(steps) + sum(saves))
    result = {
        "step_seconds": round(statistics.median(steps), 4),
        "save_seconds": [round(seconds, 4) for seconds in saves],
        "checkpoint_bytes": size,
        "share_of_the_loop": round(share, 5),
        "limit": LIMIT,
    }
    row = {
        "step s": result["step_seconds"],
        "save s": statistics.median(saves),
        "MB": size / 1e6,
        "share": f"{share:.2%}",
    }
    print(table([row]))
    print(record("checkpoint", result))


if __name__ == "__main__":
    main()
