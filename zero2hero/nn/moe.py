"""Mixture of experts: several feed-forwards, of which each token takes only a few.

A router scores the experts for each token; the best k of them run, and their outputs are added, weighted by the
router's probabilities (Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024, "Mixtral", arXiv 2401.04088). So a
model holds many more weights than a token pays for.

Nothing in the loss of the next token keeps the router from sending everything to one expert. `load_balancing_loss`
does: it is least when all experts are chosen equally often (Fedus et al. 2021, "Switch", arXiv 2101.03961). A model
knows no loss, so what the routers said is listened to from outside:

    with router_logits(model) as logits:
        hidden = model(ids)
    penalty = load_balancing_loss(logits, top_k)

N tokens, D width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zero2hero.nn.feedforward import FeedForward


class MixtureOfExperts(nn.Module):
    """x [..., D] -> [..., D]. `normalize`: the chosen experts' probabilities are made to sum to one."""

    def __init__(
        self, width: int, inner: int, kind: str, num_experts: int, num_experts_per_tok: int, normalize: bool = True
    ) -> None:
        super().__init__()
        self.top_k, self.normalize = num_experts_per_tok, normalize
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, inner, kind) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights_Nk, chosen_Nk = self.route(rows)
        order = chosen_Nk.flatten().argsort(stable=True)  # the pairs (token, expert), expert by expert
        counts = chosen_Nk.flatten().bincount(minlength=len(self.experts)).tolist()
        tokens, weights = order // self.top_k, weights_Nk.flatten()[order]
        out = torch.zeros_like(rows)
        for expert, some, weight in zip(self.experts, tokens.split(counts), weights.split(counts)):
            if len(some) or torch.is_grad_enabled():  # in training even an idle expert gets a gradient, of zero
                out = out.index_add(0, some, expert(rows[some]) * weight[:, None])
        return out.view_as(x)

    def route(self, rows_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token, the weights and the numbers of its experts, both [N, k]. Probabilities are made in fp32."""
        probabilities = self.gate(rows_ND).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(rows_ND.dtype), chosen


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, each router of the model adds its scores [N, E] to the list."""
    heard: list[Tensor] = []
    routers = [m.gate for m in model.modules() if isinstance(m, MixtureOfExperts)]
    hooks = [r.register_forward_hook(lambda module, inputs, output: heard.append(output)) for r in routers]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def load_balancing_loss(logits: list[Tensor], top_k: int) -> Tensor:
    """E * sum over experts of (share of the choices) * (mean probability), over all layers together; k when balanced.

    Only the probabilities carry a gradient: choices are not differentiable.
    """
    probabilities = torch.cat(logits).softmax(-1, dtype=torch.float32)
    num_experts = probabilities.shape[-1]
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten().bincount(minlength=num_experts)
    return num_experts * (chosen / len(probabilities) * probabilities.mean(0)).sum()
