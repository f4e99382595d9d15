"""Several projections of one input as one matrix product.

Query, key and value (or gate and up) all read the same activations. One product with the stacked weights
reads them once, and its backward pass makes the input's gradient in one product instead of three products
and two sums. The modules stay separate, so adapters, checkpoints and readers see `q_proj`, `k_proj`, `v_proj`;
a projection that is no longer a plain `nn.Linear` (LoRA, quantized) simply runs alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def joint_linear(x: Tensor, *projections: nn.Module) -> tuple[Tensor, ...]:
    """Apply each projection to `x` [..., D]; the results equal calling them one after another."""
    if not all(type(p) is nn.Linear and not p._forward_hooks for p in projections):
        return tuple(p(x) for p in projections)
    weight = torch.cat([p.weight for p in projections])  # type: ignore[misc]
    biases = [p.bias for p in projections]
    bias = torch.cat(biases) if all(b is not None for b in biases) else None  # type: ignore[arg-type]
    if bias is None and any(b is not None for b in biases):
        return tuple(p(x) for p in projections)
    return F.linear(x, weight, bias).split([p.out_features for p in projections], dim=-1)
