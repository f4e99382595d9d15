"""Rotary positions for longer texts than a model was trained on: slower rotations, so that far looks like near.

A pair of features that turns by `frequency` radians a token has seen all its angles in training when it turns fast, and
only some of them when it turns slowly; positions past the trained length show it new ones. The ways to avoid that:

    linear    every frequency is divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    dynamic   the base grows with the length of the text at hand: NTK-aware scaling, nothing changes for short texts.
    yarn      fast pairs stay, slow ones are divided, with a ramp between; attention gets sharper by a constant
              (Peng et al. 2023, arXiv 2309.00071).
    llama3    the same idea with other borders (Llama 3.1; Grattafiori et al. 2024, arXiv 2407.21783).

The parameters' names are those of Hugging Face's `rope_scaling` and `rope_parameters`. K head width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None = None, trained: int = 0, length: int = 0
) -> tuple[Tensor, float]:
    """Radians per token of each pair [K/2], and the factor on cosines and sines.

    Args:
        theta: the base; pair i turns by theta^(-2i / K).
        scaling: `rope_type` and its parameters; None for plain rotary positions.
        trained, length: the context of training, and of the text at hand (for `dynamic`).
    """
    parameters = dict(scaling or {})
    kind = parameters.pop("rope_type", "default")
    if kind == "default":
        return _plain(head_dim, theta), 1.0
    if kind == "dynamic":
        return dynamic(head_dim, theta, trained, length, **parameters), 1.0
    return SCALINGS[kind](head_dim, theta, **parameters)


def _plain(head_dim: int, theta: float) -> Tensor:
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    return theta ** -(pairs / head_dim)


def linear(head_dim: int, theta: float, *, factor: float) -> tuple[Tensor, float]:
    return _plain(head_dim, theta) / factor, 1.0


def dynamic(head_dim: int, theta: float, trained: int, length: int, *, factor: float) -> Tensor:
    """A larger base: the slowest pair is slowed by factor * stretch - factor + 1, the fastest not at all."""
    stretch = max(length, trained) / trained
    return _plain(head_dim, theta * (factor * stretch - factor + 1) ** (head_dim / (head_dim - 2)))


def llama3(
    head_dim: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float,
    original_max_position_embeddings: int,
) -> tuple[Tensor, float]:  # fmt: skip
    """Pairs with more than `high_freq_factor` turns in the trained context stay, with fewer than low are divided."""
    plain = _plain(head_dim, theta)
    turns = original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / factor, 1.0


def yarn(
    head_dim: int, theta: float, *, factor: float, original_max_position_embeddings: int,
    beta_fast: float | None = None, beta_slow: float | None = None, attention_factor: float | None = None,
    mscale: float | None = None, mscale_all_dim: float | None = None, truncate: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """A ramp over the pairs, from those with `beta_fast` turns in the trained context to those with `beta_slow`."""

    def pair_with(turns: float) -> float:
        return head_dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def sharper(scale: float | None) -> float:
        return 0.1 * (1.0 if scale is None else scale) * math.log(factor) + 1.0 if factor > 1 else 1.0

    first, last = pair_with(beta_fast or 32), pair_with(beta_slow or 1)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - first) / max(last - first, 0.001)
    divided, plain = ramp.clamp(0, 1), _plain(head_dim, theta)
    if attention_factor is None:
        attention_factor = sharper(mscale) / sharper(mscale_all_dim) if mscale and mscale_all_dim else sharper(None)
    return plain / factor * divided + plain * (1 - divided), attention_factor


SCALINGS: dict[str, Callable[..., Any]] = {"linear": linear, "dynamic": dynamic, "llama3": llama3, "yarn": yarn}


def parameters_of(kind: str) -> dict[str, bool]:
    """The parameters that a kind of scaling takes, and whether it cannot do without."""
    parameters = inspect.signature(SCALINGS[kind]).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
