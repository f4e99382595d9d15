"""Speed of Muon's step: 3.5M parameters of matrices, against torch.optim.Muon at the same settings.

The matrices are those of a Llama of 8 layers of width 192 and of one of 2 layers of width 384. Both optimizers take
Nesterov momentum 0.95, weight decay 0.1 and AdamW's update size, and take turns. `cosine` is that between their updates
for the same random gradients: of the matrix where it is smallest.

    python bench/muon.py
"""

from __future__ import annotations

import statistics

from common import interleaved, ratio, record, table

SHAPES = {"d192 L8": (192, 512, 8), "d384 L2": (384, 1024, 2)}  # width, feed-forward, layers
TARGETS = {"times_torch": 3.0, "cosine": 0.99}


def matrices(width: int, inner: int, layers: int):
    import torch

    one_layer = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    torch.manual_seed(0)
    weights = [torch.zeros(shape, requires_grad=True) for shape in one_layer * layers]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def optimizers(name: str, weight_decay: float = 0.1):
    """(ours, torch's), each with matrices and gradients of its own, equal in both."""
    import torch

    from zero2hero.train.muon import Muon

    ours = Muon(matrices(*SHAPES[name]), lr=1e-3, momentum=0.95, weight_decay=weight_decay, dtype=torch.bfloat16)
    theirs = torch.optim.Muon(
        matrices(*SHAPES[name]), lr=1e-3, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return ours, theirs


def cosines(name: str) -> list[float]:
    """Between the two updates of each matrix."""
    import torch

    by_shape: list[dict] = []
    for optimizer in optimizers(name, weight_decay=0.0):
        optimizer.step()
        updates: dict = {}
        for group in optimizer.param_groups:
            for weight in group["params"]:
                updates.setdefault(weight.shape, []).append(weight.detach().double().flatten())
        by_shape.append(updates)
    ours, theirs = by_shape
    return [
        float(torch.nn.functional.cosine_similarity(a, b, dim=0))
        for shape in ours
        for a, b in zip(ours[shape], theirs[shape])
    ]


def main() -> None:
    from zero2hero import machine

    machine.prepare()
    results, rows = {}, []
    for name in SHAPES:
        ours, theirs = optimizers(name)
        times = interleaved({"ours": ours.step, "torch": theirs.step}, rounds=25)
        results[name] = {
            "milliseconds": {k: round(1e3 * statistics.median(v), 1) for k, v in times.items()},
            "times_torch": round(ratio(times["torch"], times["ours"]), 2),
            "cosine": round(min(cosines(name)), 4),
            "targets": TARGETS,
        }
        rows.append({"matrices": name, **results[name]["milliseconds"], **{k: results[name][k] for k in TARGETS}})
    print(table(rows))
    print(record("muon", results))


if __name__ == "__main__":
    main()
