"""An adapter added into its base: the same function, and an ordinary model again.

    model = merge(model)       # W + s B A in the place of W; then save_pretrained writes it like any other

A quantized matrix becomes an ordinary one of its dequantized numbers: merged into the quantized form, what the adapter
learned would be rounded away. The base that the adapter was trained on was the dequantized one, so this is exact.

Nothing is taken on trust: each merged module is compared with the adapted one on random inputs, then the whole model.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.models.decoder import Decoder
from zero2hero.models.encoder import Encoder
from zero2hero.models.encoder_decoder import EncoderDecoder
from zero2hero.tune.adapters import SavedModule, adapted_modules, adapter_names, set_adapter
from zero2hero.tune.lora import Adapted, LoraEmbedding

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the outputs' size


@torch.no_grad()
def merge(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Merge an adapter into the base and take all adapters off. The same model, changed in place.

    Args:
        model: has adapters on it.
        adapter_name: which one; the active one by default.

    Raises:
        UserError: no adapter is active, an adapter with numbers that are not finite, one of two matrices that this
            model cannot hold apart (BERT's embedding and head), or a result that differs from what was merged.
    """
    wrappers = adapted_modules(model)
    if adapter_name is not None:
        set_adapter(model, adapter_name)
    if not any(w.current is not None for w in wrappers.values()):
        raise UserError(f"no adapter is active; the model has {', '.join(adapter_names(model)) or 'none'}")
    training = model.training
    model.eval()
    untied = _untied(model, wrappers)
    before, dequantized = _outputs(model), []
    dtype = next(p.dtype for name, p in model.named_parameters() if ".adapters." not in name)
    for name, wrapper in wrappers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _merged(name, wrapper, dtype))
        if not isinstance(wrapper, SavedModule) and hasattr(wrapper.base, "dequantize") and wrapper.current is not None:
            dequantized.append(name)
    if untied:
        config: Any = model.config
        model.config = dataclasses.replace(config, tie_word_embeddings=False)
    if before is not None:
        _compare("the model", before, _outputs(model))
    if dequantized:
        warnings.warn(f"merged into the dequantized weights of {len(dequantized)} quantized matrices", stacklevel=3)
    return model.requires_grad_(True).train(training)


def _untied(model: nn.Module, wrappers: dict[str, Adapted]) -> bool:
    """Whether two modules share a matrix that an adapter changes for one of them, or for each in its own way."""
    changed = [f"{name}.base.weight" for name, wrapper in wrappers.items() if wrapper.current is not None]
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tied = next((names for names in owners.values() if len(names) > 1 and set(names) & set(changed)), None)
    if tied and not getattr(model.config, "tie_word_embeddings", False):
        names = " and ".join(name.replace(".base.", ".") for name in tied)
        raise UserError(
            f"{names} are one matrix in this kind of model, and the adapter makes them two: it cannot be merged"
        )
    return tied is not None


def _merged(name: str, wrapper: Any, dtype: torch.dtype) -> nn.Module:
    """The module that does alone what base and adapter do together."""
    adapter, base = wrapper.current, wrapper.base
    if adapter is None:
        return base
    if isinstance(wrapper, SavedModule):
        return adapter
    if isinstance(wrapper, LoraEmbedding):
        inputs = torch.arange(min(16, base.num_embeddings), device=base.weight.device)
    else:
        noise = torch.randn(16, base.in_features, generator=torch.Generator().manual_seed(0))
        inputs = noise.to(wrapper.weight.device, dtype)
    expected, weight = wrapper(inputs), wrapper.weight.to(dtype)
    if not weight.isfinite().all():
        raise UserError(f"the adapter of {name} makes numbers that are not finite; nothing can be merged")
    if type(base) not in (nn.Linear, nn.Embedding):
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.bias, base = base.bias, plain
    base.weight = nn.Parameter(weight)  # a new one: what was tied to the old one keeps it
    _compare(name, expected, base(inputs))
    return base


def _outputs(model: nn.Module) -> Tensor | None:
    """What the model says of a few tokens, where it is one that reads nothing else."""
    if not isinstance(model, (Decoder, Encoder, EncoderDecoder)):
        return None
    longest = getattr(model.config, "longest", getattr(model.config, "max_position_embeddings", 16))
    count = min(16, longest, model.config.vocab_size)
    ids = torch.arange(count, device=model.embed_tokens.weight.device)[None]
    return model.logits(model(ids, ids) if isinstance(model, EncoderDecoder) else model(ids))


def _compare(what: str, before: Tensor, after: Tensor | None) -> None:
    assert after is not None
    size = before.float().norm()
    error = float((after.float() - before.float()).norm() / size) if size else float(after.float().norm())
    if not error <= TOLERANCE.get(before.dtype, 1e-4):
        raise UserError(
            f"merged, {what} differs from what it was with its adapter: by {error:.1%} of its outputs' size"
        )
