"""Which optimizer updates which weights.

    sgd         Robbins & Monro 1951, with Nesterov's momentum     torch's
    adam        Kingma & Ba 2014, arXiv 1412.6980                  torch's
    adamw       Loshchilov & Hutter 2017, arXiv 1711.05101         torch's: decay acts on the weight, not its gradient
    adafactor   Shazeer & Stern 2018, arXiv 1804.04235             torch's: second moments of rows and columns only
    lion        Chen et al. 2023, arXiv 2302.06675                 train/lion.py
    muon        Jordan et al. 2024, for matrices; the rest AdamW   train/muon.py
    adamw_8bit  Dettmers et al. 2021; embeddings, vectors AdamW    train/eight_bit.py

Of an adapter (tune/lora.py) the two factors have groups of their own, of AdamW where the rest is Muon's: orthogonal
steps in A and B are none in their product. LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B, which begins as zero, should
learn faster than A, by `loraplus_lr_ratio`.

Only the layers' matrices decay. Pulling a norm's scale towards zero does not regularize, and an embedding's rare rows
would fade away.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from zero2hero.config import TrainConfig
from zero2hero.train.eight_bit import AdamW8bit
from zero2hero.train.lion import Lion
from zero2hero.train.muon import Muon

Group = dict[str, Any]  # params, lr, weight_decay


def make_optimizers(
    parameters: dict[str, Tensor], config: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run for named (fp32) parameters; `dtype` is what the model computes in."""
    kinds: dict[str, list[Tensor]] = {"matrices": [], "embeddings": [], "heads": [], "vectors": [], "A": [], "B": []}
    for name, p in parameters.items():
        factor = re.search(r"\.adapters\.[^.]+\.([AB])$", name)
        if factor:
            kinds[factor[1]].append(p)
        elif "embed" in name:
            kinds["embeddings"].append(p)
        elif any(part in name for part in ("head.", "classifier.", "score.")):  # lm_head, or what says labels
            kinds["heads"].append(p)
        else:
            kinds["matrices" if p.dim() == 2 else "vectors"].append(p)
    lr = config.learning_rate
    embeddings = {"params": kinds["embeddings"], "lr": lr * config.embedding_lr_scale, "weight_decay": 0.0}
    heads = {"params": kinds["heads"], "lr": lr * config.head_lr_scale, "weight_decay": 0.0}
    vectors = {"params": kinds["vectors"], "lr": lr, "weight_decay": 0.0}
    matrices = {"params": kinds["matrices"], "lr": lr, "weight_decay": config.weight_decay}
    ratios = {"A": 1.0, "B": config.loraplus_lr_ratio}
    factors = [matrices | {"params": kinds[name], "lr": lr * ratio} for name, ratio in ratios.items()]
    if config.optim == "muon":
        wanted = [("muon", [matrices]), ("adamw", [embeddings, heads, vectors, *factors])]
    elif config.optim == "adamw_8bit":
        wanted = [("adamw_8bit", [matrices, heads, *factors]), ("adamw", [embeddings, vectors])]
    else:
        wanted = [(config.optim, [embeddings, heads, vectors, matrices, *factors])]
    optimizers = []
    for name, groups in wanted:
        groups = [group for group in groups if group["params"]]
        if not groups:
            continue
        optimizer = _make(name, groups, config, dtype)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        optimizers.append(optimizer)
    if config.l1_penalty and kinds["matrices"]:  # which the first optimizer has
        optimizers[0].register_step_pre_hook(lambda *_: add_l1_gradient(kinds["matrices"], config.l1_penalty))
    return optimizers


def _make(name: str, groups: list[Group], config: TrainConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    lr, betas, eps = config.learning_rate, (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    nesterov = config.nesterov and config.momentum > 0
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "adamw_8bit":
        return AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
    if name == "lion":
        return Lion(groups, lr=lr, betas=betas)
    if name == "adafactor":
        # 1e-15: the root of the paper's 1e-30. torch's default, 1e-7, would outweigh the gradients of a large model.
        return torch.optim.Adafactor(groups, lr=lr, eps=(1e-15, 1e-3))
    assert name == "muon"
    return Muon(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, dtype=dtype)


@torch.no_grad()
def add_l1_gradient(parameters: list[Tensor], penalty: float) -> None:
    """Add the gradient of penalty * sum |w| (Tibshirani 1996), which keeps pulling however small a weight is.

    It is a term of the update, not of the loss that is shown, and is not clipped.
    """
    for p in parameters:
        if p.grad is not None:
            p.grad.add_(p.sign(), alpha=penalty)
