"""The reference: the policy as it was before training, from which alignment may not stray far.

    reference = Reference.of(model)            # before the first step
    with reference(model) as before:           # no gradients, no dropout
        logprobs = token_logprobs(before(ids), before.head_weight, targets)

A policy that learns through a new adapter needs no second model: with the adapter switched off it is its reference, bit
for bit. An adapter that was there already is remembered (it is small); where every weight is trained, a frozen copy of
the model is kept. Where all that is ever asked is known beforehand, as in offline preference learning, ask before the
first step and let go of the reference: then nothing is kept at all (Rafailov et al. 2023, arXiv 2305.18290, app. B).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from zero2hero.tune import disable_adapter
from zero2hero.tune.adapters import SavedModule, adapted_modules, adapter_parameters


class Reference:
    """What the policy was; see `Reference.of`.

    frozen: the copy, where there must be one. weights: those of an adapter that had learned something before.
    """

    def __init__(self, frozen: nn.Module | None = None, weights: dict[str, torch.Tensor] | None = None) -> None:
        self.frozen, self.weights = frozen, weights

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None = None, device: Any = None) -> Reference:
        """The reference that is `model` as it is now.

        Args:
            dtype, device: of the copy, where there must be one: those that the policy is trained with.
        """
        if adapted := adapted_modules(model):
            if all(_new(module) for module in adapted.values()):
                return cls()
            worn = {name for module in adapted.values() for name in [module.active] if name}
            weights = {name: p for each in worn for name, p in adapter_parameters(model, each).items()}
            return cls(weights={name: p.detach().clone() for name, p in weights.items()})
        frozen = copy.deepcopy(model).to(device=device, dtype=dtype).requires_grad_(False)
        return cls(frozen.eval())

    @contextmanager
    def __call__(self, policy: nn.Module) -> Iterator[Any]:
        """The model to run in the place of `policy`, in evaluation mode and without gradients."""
        if self.frozen is not None:
            with torch.no_grad():
                yield self.frozen
            return
        training = policy.training
        policy.eval()
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self._as_it_was(policy) if self.weights else disable_adapter(policy))
                yield policy
        finally:
            policy.train(training)

    @contextmanager
    def _as_it_was(self, policy: nn.Module) -> Iterator[None]:
        """Within the block the adapter has its first weights."""
        assert self.weights is not None
        now = {name: p for name, p in policy.named_parameters() if name in self.weights}
        learned = {name: p.data for name, p in now.items()}
        try:
            for name, p in now.items():
                p.data = self.weights[name].to(p.device, p.dtype)
            yield
        finally:
            for name, p in now.items():
                p.data = learned[name]


def _new(module: Any) -> bool:
    """Whether the active adapter of a wrapped module changes nothing yet."""
    adapter = module.current
    if adapter is None:
        return True
    if isinstance(module, SavedModule):
        return all(torch.equal(mine, p) for mine, p in zip(adapter.parameters(), module.base.parameters()))
    return not (adapter.A.any() and adapter.B.any())
