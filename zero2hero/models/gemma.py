"""Gemma 1, 2 and 3 (text): the decoder with Gemma's habits.

All three: embeddings times sqrt(D), GeGLU, RMSNorm by 1 + weight, a tied head (Gemma team 2024, arXiv 2403.08295).
Gemma 2 also normalizes what attention and feed-forward give back, caps the logits of both attention and head smoothly,
c tanh(x / c), and lets every other layer look back only as far as a window (arXiv 2408.00118). Gemma 3 drops the caps
for QK-norm, has five such layers for each one that sees everything, and rotates the two kinds by bases of their own
(arXiv 2503.19786).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zero2hero.config import DecoderConfig
from zero2hero.models.decoder import Block, Decoder, attention_options
from zero2hero.nn.attention import Attention
from zero2hero.nn.kv_cache import KVCache
from zero2hero.nn.logprobs import Head, SoftCappedHead, softcap
from zero2hero.nn.masks import Mask
from zero2hero.nn.norms import OffsetRMSNorm, make_norm
from zero2hero.nn.positions import Rotary


@dataclass(frozen=True)
class GemmaConfig(DecoderConfig):
    """What Gemma adds to the shape of a decoder, under the ecosystem's names."""

    query_pre_attn_scalar: float = 0  # attention's logits are divided by its square root; 0: head_dim
    post_norms: bool = False  # normalize what attention and feed-forward give back (Gemma 2 and 3)
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope_local_base_freq: float | None = None  # rope_theta of layers with a window (Gemma 3)

    def derived(self) -> GemmaConfig:
        config = super().derived()
        assert isinstance(config, GemmaConfig)
        return dataclasses.replace(config, query_pre_attn_scalar=self.query_pre_attn_scalar or config.head_dim)


class GemmaAttention(Attention):
    """Attention with a scale of its own and soft-capped logits."""

    def __init__(self, c: GemmaConfig) -> None:
        super().__init__(**attention_options(c))
        self.scale, self.cap = c.query_pre_attn_scalar**-0.5, c.attn_logit_softcapping
        if self.qk_norm:
            self.q_norm, self.k_norm = OffsetRMSNorm(c.head_dim, c.norm_eps), OffsetRMSNorm(c.head_dim, c.norm_eps)

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask) -> Tensor:
        if self.cap is None:
            return super().attend(q_BHTK, k_BGSK, v_BGSK, mask)
        repeats = q_BHTK.shape[1] // k_BGSK.shape[1]
        k, v = (x.repeat_interleave(repeats, 1) for x in (k_BGSK, v_BGSK))
        scores = softcap(q_BHTK @ k.transpose(2, 3) * self.scale, self.cap)
        if mask.allowed is not None:
            scores = scores.masked_fill(~mask.allowed[:, None], float("-inf"))
        p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return nn.functional.dropout(p, self.dropout, self.training) @ v


class GemmaBlock(Block):
    """x + norm(attention(norm(x))), then x + norm(feedforward(norm(x)))."""

    def __init__(self, c: GemmaConfig, attention: Attention) -> None:
        super().__init__(c, attention)
        self.pre_feedforward_layernorm = make_norm(c.norm, c.hidden_size, c.norm_eps)
        self.post_feedforward_layernorm = make_norm(c.norm, c.hidden_size, c.norm_eps)

    def forward(self, x: Tensor, mask: Mask, rotation, cache: KVCache | None, layer: int, slots) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), mask, rotation, cache, layer, slots)
        x = x + self.dropout(self.post_attention_layernorm(y))
        return x + self.dropout(self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))


class Gemma(Decoder):
    """`hidden = model(ids)`, `logits = model.logits(hidden)`."""

    config: GemmaConfig

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        c = self.config
        if c.rope_local_base_freq is not None:
            self.rotary_local = Rotary(c.head_dim, c.rope_local_base_freq, c.max_position_embeddings)

    def make_block(self, c: DecoderConfig, layer: int) -> Block:
        assert isinstance(c, GemmaConfig)
        return (GemmaBlock if c.post_norms else Block)(c, GemmaAttention(c))

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        return logits if self.classifies else softcap(logits, self.config.final_logit_softcapping)

    @property
    def head_weight(self) -> Head:  # type: ignore[override]
        """As `Decoder.head_weight`; with the cap of Gemma 2's logits."""
        cap = self.config.final_logit_softcapping
        return self.lm_head.weight if cap is None else SoftCappedHead(self.lm_head.weight, cap)

    def _embed(self, ids_BT: Tensor, positions: Tensor, end: int) -> Tensor:
        x = super()._embed(ids_BT, positions, end)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)

    def _rotations(self, positions: Tensor, dtype: torch.dtype, past: int, end: int) -> list:
        rotations = super()._rotations(positions, dtype, past, end)
        if self.config.rope_local_base_freq is None:
            return rotations
        local = self.rotary_local(positions, dtype, past, end)
        return [everywhere if window is None else local for everywhere, window in zip(rotations, self.config.windows)]
