"""Optimizers: AdamW, and Muon for the matrices.

AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) scales each weight's step by its own gradient's history; weight
decay acts on the weight, not through the gradient. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
treats a matrix as a matrix: it replaces the momentum U S V^T by U V^T, so that every direction is learned at the same
speed, and reaches a given loss in roughly a third fewer steps. The orthogonal factor comes from a few odd polynomials
of the matrix, products only; their coefficients are Polar Express's (Amsel et al. 2025, arXiv 2505.16932).

Matrices of one shape are orthogonalized as one batch. Each update is scaled to the size that AdamW's would have (Liu et
al. 2025, "Muon is scalable", arXiv 2502.16982), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from zero2hero.config import TrainConfig

# Each row is a, b, c of x <- a x + b x^3 + c x^5: the best next polynomial for what the rows before it leave.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T of each matrix U S V^T in a batch [n, rows, columns]: all singular values near 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT  # the small side squared
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay. Every parameter is a matrix.

    `dtype`: of the orthogonalization's products; bf16 does no harm there, for singular values only come near 1 anyway.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        super().__init__([{"params": same} for same in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            momenta = [self._momentum(p) for p in params]
            grads = [p.grad for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, momenta, group["momentum"])  # Nesterov: look one step ahead
            update = orthogonalize(torch.stack(grads).to(self.dtype), group["steps"]).float()
            rows, columns = update.shape[-2:]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def make_optimizers(
    parameters: dict[str, Tensor], config: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run for named (fp32) parameters; `dtype` is what the model computes in.

    Matrices of the layers go to Muon (or AdamW), with weight decay. Embeddings and head go to AdamW, with learning
    rates of their own. Norms and biases go to AdamW without decay: pulling a scale towards zero does not regularize.
    """
    kinds: dict[str, list[Tensor]] = {"matrices": [], "embeddings": [], "heads": [], "vectors": []}
    for name, p in parameters.items():
        if "embed" in name:
            kinds["embeddings"].append(p)
        elif "lm_head" in name:
            kinds["heads"].append(p)
        else:
            kinds["matrices" if p.dim() == 2 else "vectors"].append(p)
    lr, decay = config.learning_rate, config.weight_decay
    groups = [
        {"params": kinds["embeddings"], "lr": lr * config.embedding_lr_scale, "weight_decay": 0.0},
        {"params": kinds["heads"], "lr": lr * config.head_lr_scale, "weight_decay": 0.0},
        {"params": kinds["vectors"], "lr": lr, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optim == "muon" and kinds["matrices"]:
        optimizers.append(Muon(kinds["matrices"], lr=lr, weight_decay=decay, dtype=dtype))
    else:
        groups.append({"params": kinds["matrices"], "lr": lr, "weight_decay": decay})
    groups = [g for g in groups if g["params"]]
    if groups:
        betas = (config.adam_beta1, config.adam_beta2)
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.adam_epsilon, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
