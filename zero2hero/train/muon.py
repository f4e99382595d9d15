"""Muon: every direction of a matrix is learned at the same speed.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) treats a matrix as a matrix: it replaces the momentum
U S V^T by U V^T, and reaches a given loss in roughly a third fewer steps than AdamW. The orthogonal factor comes from
three odd polynomials of the matrix, products only, each the best after those before it (Amsel et al. 2025, Polar
Express, arXiv 2505.16932). Matrices of one shape are orthogonalized as one batch, in the model's precision; in bf16 on
a CPU, each in one core's cache (native/muon.c). Each update is scaled to the size that AdamW's would have (Liu et al.
2025, "Muon is scalable", arXiv 2502.16982), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from zero2hero.nn.native import momentum_, update_
from zero2hero.train import muon_native
from zero2hero.train.sharding import division, on_whole, whole_shape

# Each row is a, b, c of x <- a x + b x^3 + c x^5: the best next one for what the rows before it leave of [0.025, 1],
# with 5 % to spare at the upper end, where the polynomials are steep and bf16 rounds.
POLYNOMIALS = (
    (7.532767243763411, -21.41260201216606, 15.69185000597428),
    (2.9571458281990086, -2.0284974330405383, 0.3931580411724031),
    (2.086225865109625, -1.3847331508838796, 0.3387821360096211),
)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximately U V^T of each matrix U S V^T in a batch [n, rows, columns]: all singular values near 1.

    Within a tenth of 1 for those above 4 % of the largest; smaller ones are raised by a factor of 30 to 45.
    """
    rows, columns = matrices.shape[-2:]
    tall = rows > columns
    gram = matrices.mT @ matrices if tall else matrices @ matrices.mT  # the small side squared
    factor = product = _first_factor(gram)
    if max(rows, columns) < 1.5 * min(rows, columns):
        x = matrices @ factor if tall else factor @ matrices
        for polynomial in POLYNOMIALS[1:]:
            factor = _factor(x.mT @ x if tall else x @ x.mT, *polynomial)
            x = x @ factor if tall else factor @ x
        return x
    for polynomial in POLYNOMIALS[1:]:  # only small squares, which all commute; the long side comes in once, at the end
        gram = factor @ gram @ factor
        factor = _factor(gram, *polynomial)
        product = factor @ product
    return matrices @ product if tall else product @ matrices


def _factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b gram + c gram^2."""
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


def _first_factor(gram: Tensor) -> Tensor:
    """The same of the first polynomial, for matrices that are divided by a bound on their largest singular value.

    (sum of s^8)^(1/8), which gram^2 tells, lies far closer to the largest s than the Frobenius norm, and so spares a
    polynomial. The trace is taken out before, so that no power of s is too large or too small a number.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float32)[:, None, None]
    share = (1 / trace.clamp(min=1e-30)).to(gram.dtype)
    gram = gram * share
    square = gram @ gram
    size = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True, dtype=torch.float32) ** 0.25
    size = 1.03 * size.clamp(min=1e-3)
    a, b, c = (k / size**power * share.float().sqrt() for k, power in zip(POLYNOMIALS[0], (1, 3, 5)))
    factor = torch.addcmul(gram * b.to(gram.dtype), square, c.to(gram.dtype))
    factor.diagonal(dim1=-2, dim2=-1).add_(a[..., 0])
    return factor


class Muon(torch.optim.Optimizer):
    """Muon with momentum and decoupled weight decay. Every parameter is a matrix; a group is split by their shapes.

    `dtype`: of the orthogonalization's products; bf16 does no harm there, for singular values only come near 1 anyway.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        groups = []
        for group in _as_groups(params):
            groups += [group | {"params": same} for same in _alike(group["params"], whole_shape)]
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        jobs: list[muon_native.Job] = []
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            keep = 1.0 - group["lr"] * group["weight_decay"]
            rate = 0.2 * group["lr"] * max(whole_shape(group["params"][0])) ** 0.5
            if self.dtype == torch.bfloat16 and muon_native.usable(trained):
                jobs += [(p, self._momentum(p), keep, rate) for p in trained]
                continue
            for params in _alike(trained, division):
                ahead = torch.empty(len(params), *params[0].shape, dtype=self.dtype, device=params[0].device)
                for p, each in zip(params, ahead):
                    momentum_(self._momentum(p), p.grad, each, group["momentum"], group["nesterov"])  # type: ignore[arg-type]
                for p, update in zip(params, on_whole(orthogonalize, params, ahead)):
                    update_(p, update, keep, rate)
        if jobs:
            muon_native.step(jobs, POLYNOMIALS, self.defaults["momentum"], self.defaults["nesterov"])

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def _alike(params: Iterable[Tensor], kind: Callable[[Tensor], Hashable]) -> list[list[Tensor]]:
    """The parameters in lists of one kind each."""
    by_kind: dict[Hashable, list[Tensor]] = defaultdict(list)
    for p in params:
        by_kind[kind(p)].append(p)
    return list(by_kind.values())


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    given = list(params)
    return given if given and isinstance(given[0], dict) else [{"params": given}]
