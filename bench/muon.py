"""Speed of Muon's step: 3.5M parameters of matrices, against torch.optim.Muon at the same settings.

The matrices are those of a Llama of 8 layers of width 192 and of one of 2 layers of width 384. Both optimizers take
Nesterov momentum 0.95, weight decay 0.1 and AdamW's update size, and take turns. `cosine` is that between their updates
for the same random gradients, `ours_exact` and `torch_exact` those with the factor U V^T that both approximate. torch's
polynomials leave singular values anywhere between 0.7 and 1.2, so that an exact update is no nearer to torch's than
torch's is to U V^T.

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


def cosines(name: str) -> dict[str, float]:
    """Between the two updates and U V^T of the same gradient U S V^T; of the matrix where each is smallest."""
    import torch

    by_shape: list[dict] = []
    for optimizer in optimizers(name, weight_decay=0.0):
        optimizer.step()
        updates: dict = {}
        for group in optimizer.param_groups:
            for weight in group["params"]:
                u, _, vt = torch.linalg.svd(weight.grad.double(), full_matrices=False)
                updates.setdefault(weight.shape, []).append((-weight.detach().double(), u @ vt))
        by_shape.append(updates)
    ours, theirs = by_shape
    pairs: dict[str, list[float]] = {"cosine": [], "ours_exact": [], "torch_exact": []}
    for shape in ours:
        for (a, exact), (b, _) in zip(ours[shape], theirs[shape]):
            for key, (x, y) in zip(pairs, ((a, b), (a, exact), (b, exact))):
                pairs[key].append(float(torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)))
    return {key: round(min(values), 4) for key, values in pairs.items()}


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
            **cosines(name),
            "targets": TARGETS,
        }
        rows.append(
            {
                "matrices": name,
                **results[name]["milliseconds"],
                **{k: v for k, v in results[name].items() if isinstance(v, float)},
            }
        )
    print(table(rows))
    print(record("muon", results))


if __name__ == "__main__":
    main()
