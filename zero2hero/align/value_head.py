"""A critic: what a policy expects to be worth from here on, read from its own hidden states.

PPO's advantage compares each token with a guess of the reward to come. The guess is one number a position, from a small
layer on top of the policy's last hidden states (policy and value share a trunk: Ziegler et al. 2019, arXiv 1909.08593,
section 2.1). So it costs next to nothing beside the log-probability there, where a value model of its own would double
the memory; `vf_coef` keeps its gradient from shaping the trunk too much. The layer begins at zero: the first advantages
are the rewards themselves.

The policy's own files know nothing of it: a finished run is an ordinary model, with value_head.safetensors beside.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.models.decoder import Decoder

FILE = "value_head.safetensors"


class ValueHead(nn.Linear):
    """[..., D] -> [...]: the value in units of reward, in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))[..., 0].float()


class ActorCritic(nn.Module):
    """A policy with its value head, to be trained as one."""

    def __init__(self, policy: Decoder) -> None:
        super().__init__()
        self.policy, self.value_head = policy, ValueHead(policy.config.hidden_size)
        self.config = policy.config

    def forward(self, ids_BT: Tensor, **where: Tensor | None) -> Tensor:
        """The policy's hidden states [B, T, D], from which both `policy.head_weight` and `value_head` read."""
        hidden: Tensor = self.policy(ids_BT, **where)
        return hidden

    @property
    def head_weight(self) -> Tensor:
        return self.policy.head_weight


def save_value_head(head: ValueHead, directory: str | Path) -> None:
    """Write the head into a model's directory, in fp32."""
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in head.named_parameters()}
    atomic_write(Path(directory) / FILE, save(tensors))


def load_value_head(head: ValueHead, directory: str | Path) -> bool:
    """Take the head from a model's directory; False where there is none.

    Raises:
        UserError: it is of another width.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return False
    tensors = load_file(path)
    if set(tensors) != {"weight", "bias"} or tensors["weight"].shape != head.weight.shape:
        raise UserError(f"{path} is no value head of width {head.in_features}: delete it, and a new one is learned")
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(tensors[name])
    return True
