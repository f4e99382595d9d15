"""Attention: each token gathers what it needs from the tokens it may see.

Scaled dot-product and multi-head attention (Vaswani et al. 2017, arXiv 1706.03762): softmax(q k^T / sqrt(K)) v
in H heads side by side. Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): G < H heads of keys
and values, each shared by H / G query heads, so that the cache shrinks by that factor. QK-norm (Henry et al.
2020, arXiv 2010.04245; Qwen3): an RMSNorm on each query and key head before the rotation keeps the logits tame.

Two ways to compute it. The fused kernel (FlashAttention, Dao et al. 2022, arXiv 2205.14135) never stores the
[T, S] weights: right for GPUs, long contexts, and fp32 on CPUs. The explicit one (two batched products
and a softmax) is faster on CPUs in bf16 for short contexts, where the weights fit in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zero2hero.nn import native
from zero2hero.nn.kv_cache import KVCache
from zero2hero.nn.linear import joint_linear, linear
from zero2hero.nn.masks import Mask
from zero2hero.nn.norms import RMSNorm
from zero2hero.nn.positions import rotate_queries_and_keys


def use_explicit(q_BHTK: Tensor) -> bool:
    """Whether the explicit form is the faster one here (measured in bench/attention.py)."""
    return q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16 and 1 < q_BHTK.shape[2] <= 512


def explicit_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(q k^T * scale + bias) v with plain products. All [B, H, T, K] -> [B, H, T, K]."""
    if native.usable(q_BHTK, k_BHSK, v_BHSK):
        return _ExplicitAttention.apply(q_BHTK, k_BHSK, v_BHSK, mask, scale)
    B, H, T, K = q_BHTK.shape
    q, k, v = (x.reshape(B * H, -1, K) for x in (q_BHTK, k_BHSK, v_BHSK))
    if mask.allowed is None:
        scores = torch.bmm(q * scale, k.transpose(1, 2))
    else:
        scores = torch.baddbmm(mask.bias(B, H, q.dtype), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, K)


class _ExplicitAttention(torch.autograd.Function):
    """The same, with the softmax in the scores' memory: y = p v with p = softmax(scale q k^T).

    dv = p^T dy; the scores' gradient ds comes from dp = dy v^T through the softmax; dq = ds k and dk = ds^T q.
    """

    @staticmethod
    def forward(ctx, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Mask, scale: float) -> Tensor:
        B, H, T, K = q_BHTK.shape
        q, k, v = (x.reshape(B * H, -1, K) for x in (q_BHTK, k_BHSK, v_BHSK))
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, T, -1)
        p = native.softmax_(scores, mask.allowed, mask.causal, scale).view(B * H, T, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.causal, ctx.scale, ctx.batch_size = mask.causal, scale, B
        return torch.bmm(p, v).view(B, H, T, K)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, p = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        grad_p = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = native.softmax_backward_(p, grad_p, ctx.causal, ctx.scale)
        grads = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), grad)
        return *(g.view(ctx.batch_size, -1, *g.shape[1:]) for g in grads), None, None


def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask, scale: float, dropout: float = 0.0) -> Tensor:
    """Attention of queries over keys and values, by whichever form is faster. -> [B, H, T, K].

    Keys and values may have fewer heads than queries (grouped-query attention).
    """
    repeats = q_BHTK.shape[1] // k_BGSK.shape[1]
    if use_explicit(q_BHTK) and not dropout and mask.position_bias is None:
        if repeats > 1:
            k_BGSK, v_BGSK = (x.repeat_interleave(repeats, 1) for x in (k_BGSK, v_BGSK))
        return explicit_attention(q_BHTK, k_BGSK, v_BGSK, mask, scale)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask.for_fused(q_BHTK.dtype), is_causal=mask.causal, scale=scale,
        dropout_p=dropout, enable_gqa=repeats > 1,
    )  # fmt: skip


class Attention(nn.Module):
    """Self-attention of one block: x [B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout = head_dim, dropout
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=output_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps)
        self.qk_norm = qk_norm_eps is not None

    def forward(
        self,
        x_BTD: Tensor,
        mask: Mask,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        slots: slice | Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in joint_linear(x_BTD, self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k, v = rotate_queries_and_keys(q, k, v, *rotation)
        if cache is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        else:
            assert slots is not None
            k, v = cache.update(layer, k, v, slots)
        y = self.attend(q.transpose(1, 2), k, v, mask)
        return linear(y.transpose(1, 2).reshape(B, T, -1), self.o_proj)

    def attend(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask) -> Tensor:
        """Attention of queries over keys and values -> [B, H, T, K]; the step that variants change."""
        return attend(q_BHTK, k_BGSK, v_BGSK, mask, self.scale, self.dropout if self.training else 0.0)


class CrossAttention(Attention):
    """Attention from one text to another: queries from x [B, T, D], keys and values from a source [B, S, D].

    The source does not change while x grows, so its keys and values are made once, apart.
    """

    def keys_and_values(self, source_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Two [B, G, S, K]."""
        B, S, _ = source_BSD.shape
        k, v = joint_linear(source_BSD, self.k_proj, self.v_proj)
        return k.view(B, S, -1, self.head_dim).transpose(1, 2), v.view(B, S, -1, self.head_dim).transpose(1, 2)

    def forward(self, x_BTD: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:  # type: ignore[override]
        B, T, _ = x_BTD.shape
        q = linear(x_BTD, self.q_proj).view(B, T, -1, self.head_dim).transpose(1, 2)
        y = self.attend(q, keys, values, mask)
        return linear(y.transpose(1, 2).reshape(B, T, -1), self.o_proj)
