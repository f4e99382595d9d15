"""How the learning rate moves over a run, as a factor between 0 and 1.

Warm up, because the first gradients are large and Adam's averages empty; decay, because a smaller step settles
lower in the valley. Cosine: Loshchilov & Hutter 2016, arXiv 1608.03983. Inverse square root: Vaswani et al. 2017, arXiv
1706.03762; it needs no end. Warmup-stable-decay (Hu et al. 2024, MiniCPM, arXiv 2404.06395): constant for most of the
run and linear to zero at its end, so that a run can be prolonged, and its best checkpoint is its last.

After the warm-up each is the schedule that transformers has under this name, with its defaults but for two: all go
down to zero, and the last decay of warmup_stable_decay is linear. The warm-up's first step is above zero, so no step
is lost.
"""

from __future__ import annotations

import math


def resolve_steps(value: float, total: int) -> int:
    """A number of steps, or a share of `total` when below 1."""
    return int(value) if value >= 1 else round(value * total)


def learning_rate_factor(
    step: int, total: int, kind: str, warmup_steps: float = 0.0, decay_steps: float = 0.5, power: float = 1.0
) -> float:
    """The factor for optimizer step `step` (from 0) of `total`.

    Kinds: constant; linear, cosine and polynomial (what remains of the run to the power of `power`), to zero at the
    end; inverse_sqrt; warmup_stable_decay (linear to zero over the last `decay_steps`). `warmup_steps` and
    `decay_steps` are steps, or shares of the run when below 1.
    """
    warmup = resolve_steps(warmup_steps, total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = max(0.0, (total - step) / max(1, total - warmup))
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return remaining
    if kind == "polynomial":
        return remaining**power
    if kind == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    if kind == "inverse_sqrt":
        scale = warmup or 10_000
        return math.sqrt(scale / (step - warmup + scale))
    if kind == "warmup_stable_decay":
        return min(1.0, max(0.0, (total - step) / max(1, resolve_steps(decay_steps, total))))
    raise ValueError(f"unknown schedule {kind!r}")
