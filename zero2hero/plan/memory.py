"""`zero2hero plan memory`: what a pretraining run is going to need, on one page, before it starts.

A row for each part, a column for each moment (train/memory_plan.py), what is free here, and what would fit if the run
does not.
"""

from __future__ import annotations

import dataclasses

from zero2hero.config import DecoderConfig, PretrainConfig
from zero2hero.device import pick_device
from zero2hero.errors import UserError
from zero2hero.progress import human_bytes, human_count
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.memory import planned_run
from zero2hero.train.memory_advice import free_memory, needing_less
from zero2hero.train.memory_plan import PARTS, Plan, Run, predict
from zero2hero.train.run import choose_precision


def run(config: PretrainConfig) -> None:
    """Print the plan of a pretraining run, and whether it fits this machine."""
    device = pick_device(config.device)
    dtype, _ = choose_precision(config.precision, device)
    planned = planned_run(planned_shape(config), config.train, dtype, device)
    print(page(planned, free_memory(str(device))))


def planned_shape(config: PretrainConfig) -> DecoderConfig:
    """The model's shape, with the vocabulary that its tokenizer is going to have.

    Raises:
        UserError: it depends on the text.
    """
    vocabulary = config.model.vocab_size
    if not vocabulary and config.tokenizer.kind == "char":
        raise UserError("how many characters a text has is known once it is read: give --model.vocab_size")
    if not vocabulary and config.tokenizer.kind != "bpe":
        vocabulary = Tokenizer.from_pretrained(config.tokenizer.kind).vocab_size
    return dataclasses.replace(config.model, vocab_size=vocabulary or config.tokenizer.vocab_size).derived()


def page(planned: Run, free: float) -> str:
    """The plan as text: a row for each part, a column for each moment, and what would fit if this does not."""
    plan, c, t = predict(planned), planned.shape, planned.train
    lines = [
        f"{c.num_hidden_layers} layers of width {c.hidden_size}, vocabulary {human_count(c.vocab_size)}, "
        f"{t.per_device_train_batch_size} x {t.max_length} tokens, {t.optim}, {planned.precision} on {planned.device}",
        "",
        *_table(plan),
        "",
        f"The highest moment is {plan.highest}: {human_bytes(plan.peak)}"
        + (" (and what Python and the libraries take)" if planned.device == "cpu" else ""),
    ]
    if plan.peak <= free:
        return "\n".join([*lines, f"Free here: {human_bytes(free)}. It fits." if free < float("inf") else ""]).rstrip()
    lines += [f"Free here: {human_bytes(free)}. It does NOT fit. These would need less:", ""]
    found = needing_less(planned, free)
    width = max(len(options) for options, _ in found)
    for options, needed in found:
        lines.append(f"  {options:<{width}}  {human_bytes(needed):>9}{'' if needed <= free else '  still too much'}")
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    heads = [name.replace("backward, ", "back, ") for name in plan.moments]
    rows = [["", *heads]]
    rows += [[part, *(human_bytes(m[part]) if m[part] else "-" for m in plan.moments.values())] for part in PARTS]
    rows.append(["sum", *(human_bytes(sum(m.values())) for m in plan.moments.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
             for row in rows]  # fmt: skip
    return [*lines[:-1], "-" * len(lines[0]), lines[-1]]
