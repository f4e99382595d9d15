"""Prompt tuning: a few vectors before every text are learned (Lester et al. 2021, arXiv 2104.08691), and nothing else.

A prompt in words picks a point among the embeddings of words; here it is any point, found by gradient descent. What is
learned is n x D numbers, and one model serves many tasks side by side. The first vectors are those of real tokens.

    model = add_prompt(model, num_virtual_tokens=20)     # hidden = model(ids) as before; train it like any other
    save_virtual_tokens(model, "runs/prompt")            # PEFT's files
    model = load_prompt(base, "runs/prompt")

To write with it: `generate_tokens(model, [model.with_room(ids)], ...)`. The prompt takes n places of the context.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.fetch import find_folder
from zero2hero.io import atomic_write
from zero2hero.models.checkpoint import read_json, save_tensors
from zero2hero.models.decoder import Decoder
from zero2hero.nn.kv_cache import KVCache
from zero2hero.tune.interchange import CONFIG, WEIGHTS


class VirtualTokens(nn.Module):
    """A frozen decoder behind n learned tokens, which are no tokens of the vocabulary. Used like the decoder itself.

    `prompt_embeddings` [n, width]: the only parameters that require a gradient.
    """

    kind: str  # PEFT's name

    def __init__(self, model: Decoder, first: Tensor) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompt_embeddings = nn.Parameter(first.detach().float().clone())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def with_room(self, ids: Sequence[int]) -> list[int]:
        """A prompt for generation: ids that stand for the virtual tokens, whatever they are, before the others."""
        return [0] * len(self.prompt_embeddings) + list(ids)

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D], as `Decoder.forward`; a new cache is filled from ids `with_room`.

        Raises:
            UserError: packed rows: each document would need the virtual tokens before it.
        """
        if document_ids is not None:
            raise UserError("virtual tokens stand before a whole row: leave out packing (one document a row)")
        if cache is None:
            return self.read(ids_BT, None)
        if cache.end:
            return self.model(ids_BT, positions=positions, cache=cache)
        n = len(self.prompt_embeddings)
        hidden = self.read(ids_BT[:, n:], cache)
        return torch.cat([hidden.new_zeros(len(hidden), n, hidden.shape[-1]), hidden], 1)

    def read(self, ids_BT: Tensor, cache: KVCache | None) -> Tensor:
        """Hidden states [B, T, D] of the tokens behind the virtual ones; both enter the cache."""
        raise NotImplementedError


class PromptTuned(VirtualTokens):
    """The virtual tokens are vectors in the place of embeddings."""

    kind = "PROMPT_TUNING"

    def read(self, ids_BT: Tensor, cache: KVCache | None) -> Tensor:
        x = self.model.embed_tokens(ids_BT)
        prompt = self.prompt_embeddings.to(x.dtype).expand(len(ids_BT), -1, -1)
        return self.model(torch.cat([prompt, x], 1), cache=cache)[:, len(self.prompt_embeddings) :]


def add_prompt(
    model: Decoder, num_virtual_tokens: int = 20, ids: Sequence[int] | None = None, seed: int = 0
) -> PromptTuned:
    """The model behind a prompt that can be trained; the model itself is frozen.

    Args:
        num_virtual_tokens: n, at least 1.
        ids: tokens to begin as, repeated or cut to n; random ones by default.
        seed: of the random ones.
    """
    return PromptTuned(model, model.embed_tokens(first_ids(model, num_virtual_tokens, ids, seed)[0]))


def first_ids(model: Decoder, count: int, ids: Sequence[int] | None, seed: int) -> Tensor:
    """The tokens [1, n] that the virtual ones begin as.

    Raises:
        UserError: there is no room for so many.
    """
    longest = model.config.max_position_embeddings
    if not 1 <= count < longest:
        raise UserError(f"num_virtual_tokens is from 1 to {longest - 1}, what the context has room for, not {count}")
    if not ids:
        ids = torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    repeated = (list(ids) * count)[:count]
    return torch.tensor([repeated], device=model.embed_tokens.weight.device)


def load_prompt(model: Decoder, folder: str | Path) -> PromptTuned:
    """The model behind a prompt that PEFT or `save_virtual_tokens` wrote."""
    return PromptTuned(model, read_virtual_tokens(folder, "PROMPT_TUNING", model.config.hidden_size))


def read_virtual_tokens(folder: str | Path, kind: str, width: int) -> Tensor:
    """`prompt_embeddings` [n, width] of a folder in PEFT's format.

    Raises:
        UserError: another kind of adapter, or virtual tokens of another model.
    """
    folder = find_folder(folder, needed=CONFIG, files=(CONFIG, WEIGHTS))
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != kind or config.get("prefix_projection"):
        raise UserError(f"{folder / CONFIG} is not of peft_type {kind} (without a projection)")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    found, wanted = {n: list(t.shape) for n, t in tensors.items()}, [config.get("num_virtual_tokens"), width]
    if found != {"prompt_embeddings": wanted}:
        raise UserError(f"{folder / WEIGHTS} holds {found}; for this model it should be prompt_embeddings {wanted}")
    return tensors["prompt_embeddings"]


def save_virtual_tokens(model: VirtualTokens, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
    """Write a learned prompt or prefix as PEFT does."""
    c, n = model.config, len(model.prompt_embeddings)
    heads, width = c.num_attention_heads, c.hidden_size
    if model.kind == "PREFIX_TUNING":
        heads, width = c.num_key_value_heads, c.num_key_value_heads * c.head_dim
    content = {
        "peft_type": model.kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": n, "token_dim": width,
        "num_transformer_submodules": 1, "num_attention_heads": heads, "num_layers": c.num_hidden_layers,
        "inference_mode": True, "base_model_name_or_path": base_model_name_or_path,
    }  # fmt: skip
    save_tensors(Path(folder) / WEIGHTS, {"prompt_embeddings": model.prompt_embeddings.detach().float().cpu()})
    atomic_write(Path(folder) / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")
