"""Activation checkpointing: keep less of the forward pass, and compute it once more in the backward pass.

The backward pass needs what the forward pass computed in every block, which is most of a training step's memory. Here
each block keeps only its input; when its gradients are wanted, it runs once more from there (Chen et al. 2016,
"Training deep nets with sublinear memory cost", arXiv 1604.06174). One forward pass more, about a third of a step's
products, for memory that holds one block's activations instead of all. Gradients are the same bit for bit: the random
state of the first pass is put back, so dropout drops the same.

With `offload` the inputs wait in the CPU's memory, and travel back over the bus when they are needed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, offload: bool = False) -> nn.Module:
    """The same model (changed in place, its parameters' names kept) whose `layers` each recompute their activations.

    `offload`: keep the layers' inputs in the CPU's memory; for a model on a GPU.
    """
    for block in model.layers:  # type: ignore[union-attr]
        block.forward = functools.partial(_recomputed, block.forward, offload)
    return model


def _recomputed(forward: Callable[..., Any], offload: bool, *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else contextlib.nullcontext():
        return checkpoint(forward, *arguments, use_reentrant=False)
