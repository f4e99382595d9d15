"""The decoder-only Transformer: GPT-2, Llama, Qwen3 or Mixtral, by its configuration (for Gemma see gemma.py).

One block, repeated: normalize, attend, add; normalize, feed forward, add. The families differ in a few choices only,
each a field of `DecoderConfig`:

              positions   normalization   feed-forward         extras
    GPT-2     learned     LayerNorm       GELU                 biases everywhere
    Llama     rotary      RMSNorm         SwiGLU               grouped-query attention
    Mistral   rotary      RMSNorm         SwiGLU               sliding window
    Mixtral   rotary      RMSNorm         experts of SwiGLU
    Qwen3     rotary      RMSNorm         SwiGLU (or experts)  QK-norm
    Arcee     rotary      RMSNorm         ReLU²

The model returns hidden states, and logits when asked. It knows no loss, no device, no precision policy
and no data set: those are functions around it. Papers: Radford et al. 2019 (GPT-2); Touvron et al. 2023,
arXiv 2302.13971 (Llama); Yang et al. 2025, arXiv 2505.09388 (Qwen3).

B batch, T time, D width, H heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.nn.attention import Attention
from zero2hero.nn.feedforward import FeedForward
from zero2hero.nn.kv_cache import KVCache
from zero2hero.nn.masks import Mask, causal_mask, make_mask
from zero2hero.nn.moe import MixtureOfExperts
from zero2hero.nn.norms import OffsetRMSNorm, make_norm
from zero2hero.nn.positions import Rotary, sinusoidal_table


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feedforward(norm(x)); by default those of the configuration."""

    def __init__(self, c: DecoderConfig, attention: Attention | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.input_layernorm = make_norm(c.norm, c.hidden_size, c.norm_eps)
        self.self_attn = attention or Attention(**attention_options(c))
        self.post_attention_layernorm = make_norm(c.norm, c.hidden_size, c.norm_eps)
        self.mlp = mlp or FeedForward(c.hidden_size, c.intermediate_size, c.feedforward, c.mlp_bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Mask, rotation, cache: KVCache | None, layer: int, slots) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), mask, rotation, cache, layer, slots))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


def attention_options(c: DecoderConfig) -> dict[str, Any]:
    """What `Attention` is made with."""
    return {
        "width": c.hidden_size, "num_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim, "bias": c.attention_bias, "output_bias": c.output_bias,
        "qk_norm_eps": c.norm_eps if c.qk_norm else None, "dropout": c.dropout,
    }  # fmt: skip


class Decoder(nn.Module):
    """`hidden = model(ids)`, `logits = model.logits(hidden)`."""

    position_table: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = c = config.derived()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.position == "learned":
            self.embed_positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        elif c.position == "sinusoidal":
            table = sinusoidal_table(c.max_position_embeddings, c.hidden_size)
            self.register_buffer("position_table", table, persistent=False)
        elif c.position == "rotary":
            self.rotary = Rotary(c.head_dim, c.rope_theta, c.max_position_embeddings, c.rope_scaling)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(self.make_block(c, i) for i in range(c.num_hidden_layers))
        self.norm = make_norm(c.norm, c.hidden_size, c.norm_eps)
        if self.classifies:
            self.score = nn.Linear(c.hidden_size, len(c.id2label), bias=False)
            return
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def make_block(self, c: DecoderConfig, layer: int) -> Block:
        """One layer; variants of the decoder make another kind."""
        m = c.moe
        if not m.num_experts or layer in m.dense_layers:
            return Block(c)
        experts = m.intermediate_size, c.feedforward, m.num_experts, m.num_experts_per_tok, m.norm_topk_prob
        return Block(c, mlp=MixtureOfExperts(c.hidden_size, *experts))

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        branch_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm.

        Args:
            ids_BT: token ids; or vectors [B, T, D] in the place of their embeddings.
            positions: [B, T] position of each token; by default 0, 1, 2, ... (after what the cache holds).
            document_ids: [B, T] for packed rows: tokens of different documents do not see each other.
            cache: keys and values of earlier tokens; this call's are added to it.
            branch_ids: [B, T] for documents that go on in several ways (needs positions and document_ids): 0 for their
                beginning, 1, 2, ... for the branches, which see the beginning and not each other.

        Raises:
            UserError: a position beyond `max_position_embeddings` of a learned or sinusoidal table.
        """
        past = cache.end if cache is not None else 0
        T = ids_BT.shape[1]
        plain = positions is None
        if positions is None:
            positions = torch.arange(past, past + T, device=ids_BT.device)[None]
        masks, slots = self._masks_and_slots(positions, plain, document_ids, cache, T, past, branch_ids)
        x = self.dropout(self._embed(ids_BT, positions, past + T))
        rotations = self._rotations(positions, x.dtype, past, past + T)
        for i, layer in enumerate(self.layers):
            x = layer(x, masks[i], rotations[i], cache, i, slots)
        return self.norm(x)

    @property
    def classifies(self) -> bool:
        """Whether the head gives a score for each label, in the place of one for each token of the vocabulary."""
        return self.config.task == "sequence_classification"

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]; or [..., C] for the labels, which are read from a text's last token."""
        return self.score(hidden) if self.classifies else self.lm_head(hidden)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits, for losses that never build all logits.

        Raises:
            UserError: the model classifies texts, so it knows no probabilities of tokens.
        """
        if self.classifies:
            raise UserError("this model gives scores to texts (ForSequenceClassification): it does not write any")
        return self.lm_head.weight

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, like this model's weights."""
        c, like = self.config, self.embed_tokens.weight
        return KVCache(
            c.num_hidden_layers,
            batch_size,
            c.num_key_value_heads,
            max_length,
            c.head_dim,
            like.dtype,
            like.device,
        )

    def _embed(self, ids_BT: Tensor, positions: Tensor, end: int) -> Tensor:
        x = ids_BT if ids_BT.is_floating_point() else self.embed_tokens(ids_BT)
        if self.config.position in ("learned", "sinusoidal"):
            longest = self.config.max_position_embeddings
            if end > longest and int(positions.max()) >= longest:
                raise UserError(f"position {int(positions.max())} is past this model's last, {longest - 1}")
            learned = self.config.position == "learned"
            table = self.embed_positions.weight if learned else self.position_table
            x = x + F.embedding(positions, table).to(x.dtype)
        return x

    def _rotations(self, positions: Tensor, dtype: torch.dtype, past: int, end: int) -> list:
        """The rotation of each layer."""
        rotation = self.rotary(positions, dtype, past, end) if self.config.position == "rotary" else None
        return [rotation] * len(self.layers)

    def _masks_and_slots(
        self, positions: Tensor, plain: bool, document_ids, cache: KVCache | None, T: int, past: int, branch_ids=None
    ):
        """The mask of each layer (one for each width of window), and where in the cache this call's tokens go."""
        slots, end = None, T
        if cache is not None:
            if document_ids is not None:
                raise ValueError("a cache holds one document per row; document_ids are for packed training")
            end = past + T if plain else int(positions.max()) + 1
            if end > cache.max_length:
                raise UserError(f"the cache holds {cache.max_length} tokens and {end} are needed")
            cache.end = max(cache.end, end)
            slots = slice(past, past + T) if plain else positions

        def make(window: int | None) -> Mask:
            whole = plain and document_ids is None and (window is None or window >= end)
            if whole and past == 0:
                return causal_mask(T, positions.device)
            if whole and T == 1:
                return Mask(None)
            if cache is not None:
                return make_mask(positions, torch.arange(cache.end, device=positions.device)[None], window=window)
            if branch_ids is not None:
                documents = {"query_documents_BT": document_ids, "key_documents_BS": document_ids}
                return make_mask(positions, positions, window=window, branches_BT=branch_ids, **documents)
            # inside a packed row the order of the tokens is also the order of each document's positions
            order = torch.arange(T, device=positions.device)[None]
            return make_mask(
                order, order, window=window, query_documents_BT=document_ids, key_documents_BS=document_ids
            )

        made = {window: make(window) for window in set(self.config.windows)}
        return [made[window] for window in self.config.windows], slots


def scoring(model: Decoder, pad_token_id: int | None = None, seed: int = 0) -> Decoder:
    """Turn a language model into one that gives texts one score, in place: the head is new, all else is kept."""
    like = model.lm_head.weight
    del model.lm_head
    model.config = dataclasses.replace(
        model.config, task="sequence_classification", id2label={0: "LABEL_0"}, pad_token_id=pad_token_id,
        extra=model.config.extra | {"problem_type": "regression"},
    )  # fmt: skip
    model.score = nn.Linear(model.config.hidden_size, 1, bias=False, device=like.device, dtype=like.dtype)
    init_parameters([("score.weight", model.score.weight)], model.config.initializer_range, seed)
    return model


def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Every initial weight of a model, from one seed; see `init_parameters`."""
    config: Any = model.config
    init_parameters(model.named_parameters(), config.initializer_range, seed)
    for module in model.modules():
        if isinstance(module, OffsetRMSNorm):  # one is added to its weight
            nn.init.zeros_(module.weight)


def init_parameters(parameters: Iterable[tuple[str, Tensor]], std: float, seed: int = 0) -> None:
    """Initial weights of named parameters.

    Embeddings and input projections are Gaussian; biases are zero, norms one. The projections that write
    into the residual stream start at zero, so that each block starts as the identity and depth is learned
    (Zhang et al. 2019, "Fixup", arXiv 1901.09321; Yang et al. 2022, arXiv 2203.03466). A pooling is no such branch.
    The scale and offset of logits keep what their model gave them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            if name.endswith(("logit_scale", "logit_bias")):
                continue
            branch = name.endswith(("o_proj.weight", "down_proj.weight")) and "pooling." not in name
            if branch or name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
                parameter.copy_(values)
