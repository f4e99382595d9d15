"""`zero2hero plan finetune MODEL`: which ways of fine-tuning fit this machine, how long they take, and what to type.

Known from config.json alone, before any weights are fetched. Memory is predicted tensor by tensor (see
train/memory_plan.py); time is an estimate, the FLOPs of a step over what a step usually makes of the machine's
measured matrix products.

    full    every weight learns: with fp32 masters, gradients and two moments, 16 bytes or more each
    lora    an adapter beside each matrix learns; of the others the weights alone are there (tune/lora.py)
    qlora   these in four bits (tune/quantize.py)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import torch

from zero2hero.config import DecoderConfig
from zero2hero.device import pick_device
from zero2hero.errors import UserError
from zero2hero.fetch import find_folder
from zero2hero.models.checkpoint import read_json
from zero2hero.models.families import family_of_config
from zero2hero.progress import human_bytes, human_count
from zero2hero.train.memory import planned_run
from zero2hero.train.memory_advice import free_memory, needing_less
from zero2hero.train.memory_plan import METHODS, NF4, Run, learning_counts, predict, weight_counts
from zero2hero.train.run import choose_precision
from zero2hero.tuning_configs import PlanFinetuneConfig

EXAMPLES = 1000
SHARE = 0.6  # of the measured products' speed that a training step reaches; bench/training.py and bench/qlora.py


def run(config: PlanFinetuneConfig) -> None:
    """Print each way's memory, time and command."""
    device = pick_device(config.device)
    dtype, peak_flops = choose_precision(config.precision, device)
    planned = planned_run(read_shape(config.model), config.train, dtype, device, lora_r=config.lora_r)
    print(page(config, planned, free_memory(str(device)), peak_flops or measured_flops(device, dtype)))


def read_shape(model: str) -> DecoderConfig:
    """The shape in a folder's or hub id's config.json.

    Raises:
        UserError: it is of no decoder whose memory can be predicted.
    """
    theirs = read_json(find_folder(model, files=("config.json",)) / "config.json")
    theirs.pop("quantization_config", None)
    try:
        shape = family_of_config(theirs).read_config(theirs)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{model}: config.json holds a value of the wrong kind: {error}") from None
    if not isinstance(shape, DecoderConfig) or shape.moe.num_experts:
        what = "a mixture of experts" if isinstance(shape, DecoderConfig) else f"a {theirs.get('model_type')}"
        raise UserError(f"{model} is {what}; plan finetune predicts the memory of decoders without experts")
    return shape.derived()


def ways(planned: Run) -> Iterator[Run]:
    """Every method, without and with gradient checkpointing."""
    for method in METHODS:
        for checkpointing in (False, True):
            train = dataclasses.replace(
                planned.train, gradient_checkpointing=checkpointing,
                activation_offload=planned.train.activation_offload and checkpointing,
            )  # fmt: skip
            yield dataclasses.replace(planned, method=method, train=train)


def page(config: PlanFinetuneConfig, planned: Run, free: float, flops: float) -> str:
    """The plan as text."""
    c, t, every = planned.shape, planned.train, list(ways(planned))
    weights, inner = sum(weight_counts(c).values()), weight_counts(c)["matrices"]
    tokens = config.tokens_per_example or t.max_length
    learning = sum(learning_counts(dataclasses.replace(planned, method="lora")).values())
    rows = [["", "peak memory", "fits", f"{EXAMPLES:,} examples"]]
    for way in every:
        peak = predict(way).peak
        seconds = EXAMPLES * tokens * flops_per_token(way) / (SHARE * flops) if flops else 0.0
        rows.append([title(way), human_bytes(peak), "yes" if peak <= free else "no", duration(seconds)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        f"{config.model}: {human_count(weights)} weights, of which {human_count(inner)} are the layers' matrices: "
        f"{human_bytes(weights * planned.number)} in {planned.precision}, "
        f"{human_bytes(inner * NF4 + (weights - inner) * planned.number)} with these in four bits",
        f"An adapter of rank {planned.lora_r} on all of them: {human_count(learning)} weights",
        f"{t.per_device_train_batch_size} x {t.max_length} tokens a step, {t.optim}, {planned.precision} on "
        f"{planned.device}"
        + (f"; free here: {human_bytes(free)}" if free < float("inf") else ""),
        "",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows),
        "",
        f"Times are estimates, for {tokens} tokens an example"
        + (f", at {SHARE:.0%} of the {flops / 1e12:.2g} TFLOP/s that products reach here." if flops else "."),
        "",
    ]  # fmt: skip
    fitting = [way for way in every if predict(way).peak <= free]
    if not fitting:
        found = needing_less(every[-1], free)
        options, needed = found[0]
        word = "This would fit" if needed <= free else "Nothing fits; least needs this"
        return "\n".join([*lines, f"{word} ({human_bytes(needed)}):", f"  {command(config, every[-1])} {options}"])
    return "\n".join([*lines, "To begin:", *(f"  {command(config, way)}" for way in fitting)])


def title(way: Run) -> str:
    return way.method + ", checkpointing" * way.train.gradient_checkpointing


def command(config: PlanFinetuneConfig, way: Run) -> str:
    """What to type."""
    t = way.train
    words = ["zero2hero sft", f"--model {config.model}", f"--data {config.data}", f"--method {way.method}"]
    words += [f"--lora.r {way.lora_r}"] * way.frozen
    words += [f"--train.per_device_train_batch_size {t.per_device_train_batch_size}"]
    words += [f"--train.max_length {t.max_length}", f"--train.optim {t.optim}"]
    words += ["--train.gradient_checkpointing true"] * t.gradient_checkpointing
    words += ["--train.activation_offload true"] * t.activation_offload
    return " ".join([*words, f"--precision {way.precision}"])


def flops_per_token(way: Run) -> float:
    """Of a training step. A matrix costs 2 a weight forth, 2 for its input's gradient, and 2 for its own if it learns.

    Attention counts as if everything learned, for its products have gradients in any case.
    """
    c, length = way.shape, way.train.max_length
    matrices = 2.0 * c.num_matrix_parameters
    attention = c.training_flops_per_token(length) - 3 * matrices
    adapters = 6.0 * sum(learning_counts(way).values()) * way.frozen
    again = (matrices + attention / 3) * way.train.gradient_checkpointing
    return matrices * (2 if way.frozen else 3) + attention + adapters + again


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product on a GPU, measured for a moment; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    size, rounds = 4096, 10
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(rounds):
        a @ b
    torch.cuda.synchronize(device)
    return rounds * 2 * size**3 / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, in two or three digits."""
    if not seconds:
        return "not known"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
