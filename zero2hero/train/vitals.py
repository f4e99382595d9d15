"""The vital signs of a run, taken as it trains; `diagnosis.py` judges them.

    loss_max, loss_max_step   the worst single step since the last log line, which a mean would hide
    grad_norm_max             the largest gradient norm (before clipping) since the last log line
    update_ratio/KIND         size of an update over size of the weights it changes, for each kind of parameter
    dead_units/LAYER          share of a feed-forward layer's units that did nothing in a whole step

The update ratio says at one glance whether the learning rate fits: with SGD and Adam about 1e-3 is healthy (Karpathy
2015, cs231n.github.io/neural-networks-3, "ratio of weights:updates"); Muon's is larger while weights are young.

A unit's activation multiplies its column of `down_proj`, so that column's gradient is the sum over the step's tokens
of (activation x what arrives from above): exactly zero if and only if a ReLU never fired, and next to nothing if a
smooth or gated unit is saturated or unused. Reading it costs no look at activations and holds under compilation,
activation checkpointing and gradient accumulation. (Dying ReLUs: Goodfellow et al. 2016, section 6.3.1.)

Losses and gradient norms are watched at every step, the rest only at steps that are logged, the weights by a sample.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zero2hero.train.watch import Watcher

if TYPE_CHECKING:
    from zero2hero.train.loop import Trainer

SAMPLE = 4096  # weights of each parameter whose updates are measured: the ratio is then right to a few percent
UNUSED = 1e-3  # a unit whose gradient is this share of its layer's mean, or less, did nothing


class Vitals(Watcher):
    """Measures what the module's docstring lists; under sharding, the shards of this rank."""

    name = "vitals"

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def before_update(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        if trainer.step_loss > self.worst.get("loss_max", -math.inf):
            self.worst |= {"loss_max": trainer.step_loss, "loss_max_step": step}
        self.worst["grad_norm_max"] = max(trainer.metrics["grad_norm"], self.worst.get("grad_norm_max", 0.0))
        if trainer.logs_at(step):
            parameters = trainer.masters.parameters
            self._before = {name: sample(p).clone() for name, p in parameters.items()}
            for name, p in parameters.items():
                if name.endswith("down_proj.weight") and p.grad is not None:
                    layer = name.removesuffix(".weight").removesuffix(".down_proj").removesuffix(".mlp")
                    self._found[f"dead_units/{layer}"] = share_unused(p.grad)

    def after_update(self, trainer: Trainer) -> None:
        if not self._before:
            return
        squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2))  # of the updates, of the weights
        for name, old in self._before.items():
            p = trainer.masters.parameters[name]
            both = torch.stack([(sample(p) - old).square().sum(), old.square().sum()])
            kind = kind_of(name, p)
            squares[kind] = squares[kind].to(both.device) + both * (p.numel() / max(1, old.numel()))
        for kind, (update, weight) in squares.items():
            self._found[f"update_ratio/{kind}"] = (update / weight.clamp_min(1e-30)).sqrt()
        self._before = {}

    def metrics(self) -> dict[str, float]:
        found = self.worst | {name: float(value) for name, value in self._found.items()}
        self.worst, self._found = {}, {}
        return found

    def state_dict(self) -> dict[str, Any]:
        return dict(self.worst)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.worst = dict(state)


def sample(parameter: Tensor) -> Tensor:
    """Up to about `SAMPLE` of its values, evenly spread; an odd stride visits all columns of most matrices."""
    flat = _local(parameter).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE) | 1]


def share_unused(grad: Tensor) -> Tensor:
    """Share of the units (columns of the gradient of `down_proj` [D, F]) that a step never used."""
    norms = torch.linalg.vector_norm(_local(grad), dim=0)
    return (norms <= UNUSED * norms.mean()).float().mean()


def kind_of(name: str, parameter: Tensor) -> str:
    """embeddings, head, attention or feedforward for matrices; vectors for norms and biases."""
    if parameter.dim() < 2:
        return "vectors"
    kinds = {"embed": "embeddings", "lm_head": "head", "score": "head", "attn": "attention", "mlp": "feedforward"}
    return next((kind for part, kind in kinds.items() if part in name), "matrices")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
