"""A faster form of a decoder for generation, with the same mathematics.

For few tokens a step is matrix times vector: it costs the reading of the weights, and the fixed price of each small
operation (a few microseconds, some forty of them per layer). `PreparedDecoder` lays out the weights once for the
product at hand, and makes one of the projections that read the same input:

- fp32 on a CPU: transposed to [in, out], so that the product runs along contiguous rows of outputs;
- bf16 on a CPU: in oneDNN's blocked layout ("prepacked"), without which every product packs its weights anew;
- otherwise, and on GPUs: as they are.

A projection that is no plain `nn.Linear` (LoRA, quantized) is called as it is. Masks, positions and the cache are
the model's own, so every configuration of `Decoder` works. The price is a second copy of the weights, kept as
long as the model lives and its weights do not change.

B batch, T time, D width, H heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.models.decoder import Block, Decoder, DecoderConfig
from zero2hero.nn.attention import Attention, attend
from zero2hero.nn.feedforward import ACTIVATIONS, GATES, FeedForward
from zero2hero.nn.kv_cache import KVCache
from zero2hero.nn.masks import Mask
from zero2hero.nn.norms import RMSNorm

Function = Callable[[Tensor], Tensor]
Projection = Callable[..., Tensor]  # (rows, residual = None) -> rows
Rotation = tuple[Tensor, Tensor]

_PREPARED: WeakKeyDictionary[Decoder, tuple[list[tuple], PreparedDecoder]] = WeakKeyDictionary()


def prepare(model: Decoder) -> PreparedDecoder | PlainDecoder:
    """The fast form of a model, made anew only when its weights have changed since the last time.

    A model that is not put together as usual (a hook, another kind of block), or runs under autocast, is used
    as it is.
    """
    if not is_plain(model):
        return PlainDecoder(model)
    fingerprint = _fingerprint(model)
    known, prepared = _PREPARED.get(model, (None, None))
    if prepared is None or known != fingerprint:
        prepared = PreparedDecoder(model)
        _PREPARED[model] = fingerprint, prepared
    return prepared


def forget(model: Decoder) -> None:
    """Let go of the copy of a model's weights."""
    _PREPARED.pop(model, None)


def _fingerprint(model: Decoder) -> list[tuple]:
    """What tells whether any weight has changed. It costs about as much as one token: each weight is read once.

    Version counters alone would not do: fused optimizers do not advance them. So the bits are added up as well.
    """
    parameters = [p.detach().reshape(-1) for p in model.parameters()]
    sums = torch.stack([_words(p).sum() for p in parameters]).tolist()
    versions = [0 if p.is_inference() else p._version for p in model.parameters()]
    return [(p.dtype, p.device, version, total) for p, version, total in zip(parameters, versions, sums)]


def _words(flat: Tensor) -> Tensor:
    """The bits of a tensor as integers, eight bytes at a time where they are aligned."""
    bytes_per_item = flat.element_size()
    aligned = all(n * bytes_per_item % 8 == 0 for n in (flat.numel(), flat.storage_offset()))
    return flat.view(torch.int64 if aligned else torch.uint8)


def is_plain(model: Decoder) -> bool:
    """Whether a model is put together as usual."""
    device = model.embed_tokens.weight.device.type
    kinds = all(
        type(block) is Block and type(block.self_attn) is Attention and type(block.mlp) is FeedForward
        for block in model.layers
    )
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return type(model) is Decoder and kinds and not hooks and not torch.is_autocast_enabled(device)


class PlainDecoder:
    """The model itself, called like a `PreparedDecoder`."""

    def __init__(self, model: Decoder) -> None:
        self.logits = model.logits

    def __call__(self, model: Decoder, ids_BT: Tensor, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        return model(ids_BT, positions=positions, cache=cache)


class PreparedDecoder:
    """`hidden = prepared(model, ids, ...)` equals `hidden = model(ids, ...)`, faster for few tokens.

    It holds no reference to the model itself, so that a cache of prepared decoders keeps no model alive.
    """

    def __init__(self, model: Decoder) -> None:
        self.blocks = [_PreparedBlock(block, model.config) for block in model.layers]  # type: ignore[arg-type]
        self.norm = _norm(model.norm)
        # [N, D] -> [N, V]
        self.logits = _linear(model.lm_head)

    def __call__(self, model: Decoder, ids_BT: Tensor, cache: KVCache, positions: Tensor | None = None) -> Tensor:
        past, (B, T) = cache.end, ids_BT.shape[:2]
        plain = positions is None
        if positions is None:
            positions = torch.arange(past, past + T, device=ids_BT.device)[None]
        masks, slots = model._masks_and_slots(positions, plain, None, cache, T, past)
        x = model._embed(ids_BT, positions, past + T).view(B * T, -1)
        rotation = None
        if model.config.position == "rotary":  # x cos + swapped(x) (-sin, sin), in pairs of halves
            cos, sin = model.rotary(positions, x.dtype, past, past + T)
            rotation = torch.stack([cos, cos], -2), torch.stack([-sin, sin], -2)
        for i, block in enumerate(self.blocks):
            x = block(x, B, masks[i], rotation, cache, i, slots)
        return self.norm(x).view(B, T, -1)


class _PreparedBlock:
    """`Block.forward` with prepared weights. Tokens are rows [B * T, D], heads are pairs of halves [.., 2, K/2]."""

    def __init__(self, block: Block, config: DecoderConfig) -> None:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(mlp, FeedForward)
        self.input_norm, self.post_norm = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        self.qkv = _linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output, self.down = _linear(attention.o_proj), _linear(mlp.down_proj)
        self.H, self.G, self.K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scale = attention.scale
        self.qk_norm: Function | None = None
        if attention.qk_norm:  # one norm for query and key heads, each with its weight
            weight = torch.cat([attention.q_norm.weight.expand(self.H, -1), attention.k_norm.weight.expand(self.G, -1)])
            self.qk_norm = _rms_norm(weight.detach(), attention.q_norm.eps)
        self.gated = mlp.kind in GATES
        self.up = _linear(mlp.gate_proj, mlp.up_proj) if self.gated else _linear(mlp.up_proj)
        self.inner, self.activation = config.intermediate_size, (GATES | ACTIVATIONS)[mlp.kind]

    def __call__(
        self, x: Tensor, B: int, mask: Mask, rotation: Rotation | None, cache: KVCache, layer: int, slots: Any
    ) -> Tensor:
        y = self._attention(self.qkv(self.input_norm(x)), B, mask, rotation, cache, layer, slots)
        x = self.output(y, x)
        y = self.up(self.post_norm(x))
        y = self.activation(y[:, : self.inner]).mul_(y[:, self.inner :]) if self.gated else self.activation(y)
        return self.down(y, x)

    def _attention(
        self, qkv: Tensor, B: int, mask: Mask, rotation: Rotation | None, cache: KVCache, layer: int, slots: Any
    ) -> Tensor:
        H, G, K = self.H, self.G, self.K
        heads = qkv.view(B, -1, H + 2 * G, K)
        T, qk, v = heads.shape[1], heads[:, :, : H + G], heads[:, :, H + G :]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if rotation is not None:
            halves = qk.unflatten(-1, (2, K // 2))
            qk = torch.addcmul(halves * rotation[0], halves.flip(-2), rotation[1]).flatten(-2)
        q = qk[:, :, :H]
        keys, values = cache.update(layer, qk[:, :, H:], v, slots)
        if T > 1:
            return attend(q.transpose(1, 2), keys, values, mask, self.scale).transpose(1, 2).reshape(B * T, H * K)
        # a single query: the heads that share keys take the place of time, and nothing is copied
        allowed = None if mask.allowed is None else mask.allowed[:, None]
        y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, K), keys, values, allowed, scale=self.scale)
        return y.view(B, H * K)


# ---------------------------------------------------------------- the parts


def _linear(*projections: nn.Module) -> Projection:
    """Apply projections of one input together: rows [N, D] -> their outputs side by side, plus a residual."""
    linears = [p for p in projections if type(p) is nn.Linear]
    if len(linears) < len(projections):
        return _with_residual(lambda x: torch.cat([p(x) for p in projections], -1))
    weights = [p.weight.detach() for p in linears]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias: Tensor | None = None
    if any(p.bias is not None for p in linears):
        zeros = [w.new_zeros(w.shape[0]) for w in weights]
        bias = torch.cat([z if p.bias is None else p.bias.detach() for p, z in zip(linears, zeros)])
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return _transposed(weight, bias)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return _prepacked(weight, bias)
    return _with_residual(lambda x: F.linear(x, weight, bias))


def _transposed(weight: Tensor, bias: Tensor | None) -> Projection:
    weight = weight.t().contiguous()

    def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.mm(x, weight) if residual is None else torch.addmm(residual, x, weight)
        return y if bias is None else y.add_(bias)

    return linear


def _prepacked(weight: Tensor, bias: Tensor | None) -> Projection:
    weight, apply = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise

    def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return apply(x, weight, bias, "none", [], "")
        return apply.binary(x, residual, weight, bias, "add")

    return linear


def _with_residual(function: Function) -> Projection:
    return lambda x, residual=None: function(x) if residual is None else residual + function(x)


def _norm(norm: nn.Module) -> Function:
    return _rms_norm(norm.weight.detach(), norm.eps) if type(norm) is RMSNorm else norm


def _rms_norm(weight: Tensor, eps: float) -> Function:
    """`RMSNorm.forward` in five operations instead of a dozen."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    offset, mean = torch.tensor(eps, dtype=dtype, device=weight.device), 1 / weight.shape[-1]

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=dtype)
        inverse = torch.addcmul(offset, length, length, value=mean).rsqrt_()
        return (x * inverse).to(x.dtype).mul_(weight)

    return norm
