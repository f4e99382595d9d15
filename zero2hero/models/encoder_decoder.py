"""The encoder-decoder: one stack reads a text, another writes a text about it, looking back at the first.

This is the Transformer as it was invented, for translation (Vaswani et al. 2017, arXiv 1706.03762), with the pre-norm
blocks of T5 (Raffel et al. 2019, arXiv 1910.10683). Each decoder block has a cross-attention between its self-attention
and its feed-forward: queries from the text being written, keys and values from the text read. T5 has relative
positions, no biases, and scores that are not scaled; each of these is a field of the configuration.

Reading happens once (`encode`), writing token by token (`decode`), so the source's keys and values are kept.

B batch, S time of the source, T time of the target, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.model_configs import EncoderDecoderConfig
from zero2hero.nn.attention import Attention, CrossAttention
from zero2hero.nn.feedforward import FeedForward
from zero2hero.nn.kv_cache import KVCache
from zero2hero.nn.masks import Mask, make_mask
from zero2hero.nn.norms import make_norm
from zero2hero.nn.positions import RelativeBias, sinusoidal_table


@dataclass
class Source:
    """A text that was read: its hidden states [B, S, D], and what the decoder's layers look at.

    `keys` and `values`: [B, H, S, K] for each decoder layer. `attention_mask`: [B, S] 1 for text, 0 for padding, or
    None where nothing is padded.
    """

    hidden_BSD: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    attention_mask: Tensor | None

    def select(self, rows: Tensor) -> Source:
        """These rows, in this order, possibly repeated."""
        mask = self.attention_mask
        return Source(
            self.hidden_BSD[rows],
            [k[rows] for k in self.keys],
            [v[rows] for v in self.values],
            None if mask is None else mask[rows],
        )


class SeqBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), in a decoder x + cross-attention(norm(x)), x + feedforward(norm(x))."""

    def __init__(self, c: EncoderDecoderConfig, decoder: bool) -> None:
        super().__init__()

        def attention(kind: type[Attention]) -> Attention:
            heads, scale = c.num_attention_heads, None if c.scale_attention else 1.0
            return kind(c.hidden_size, heads, heads, c.head_dim, bias=c.bias, output_bias=c.bias, scale=scale,
                        dropout=c.dropout)  # fmt: skip

        self.self_attn_norm = make_norm(c.norm, c.hidden_size, c.norm_eps)
        self.self_attn = attention(Attention)
        if decoder:
            self.cross_attn_norm = make_norm(c.norm, c.hidden_size, c.norm_eps)
            self.cross_attn = attention(CrossAttention)
        self.mlp_norm = make_norm(c.norm, c.hidden_size, c.norm_eps)
        self.mlp = FeedForward(c.hidden_size, c.intermediate_size, c.feedforward, c.bias)
        self.dropout = nn.Dropout(c.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        source: tuple[Tensor, Tensor, Mask] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        slots: slice | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.self_attn_norm(x), mask, None, cache, layer, slots))
        if source is not None:
            x = x + self.dropout(self.cross_attn(self.cross_attn_norm(x), *source))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Stack(nn.Module):
    """The blocks of one side, their last norm and, for relative positions, the table that the layers share."""

    def __init__(self, c: EncoderDecoderConfig, decoder: bool) -> None:
        super().__init__()
        if c.position == "relative":
            self.embed_distances = RelativeBias(
                c.relative_attention_num_buckets, c.relative_attention_max_distance, c.num_attention_heads, decoder
            )
        self.relative = c.position == "relative"
        count = c.num_decoder_layers if decoder else c.num_hidden_layers
        self.layers = nn.ModuleList(SeqBlock(c, decoder) for _ in range(count))
        self.norm = make_norm(c.norm, c.hidden_size, c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)

    def mask(self, mask: Mask, query_positions_T: Tensor, key_positions_S: Tensor) -> Mask:
        """`mask` with the heads' biases for these positions."""
        if not self.relative:
            return mask
        return Mask(mask.allowed, position_bias=self.embed_distances(query_positions_T, key_positions_S))


class EncoderDecoder(nn.Module):
    """`hidden = model(ids, decoder_ids)`, `logits = model.logits(hidden)`."""

    position_table: Tensor

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = c = config.derived()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.source_vocab_size:
            self.embed_source = nn.Embedding(c.source_vocab_size, c.hidden_size)
        if c.position == "sinusoidal":
            table = sinusoidal_table(c.max_position_embeddings, c.hidden_size)
            self.register_buffer("position_table", table, persistent=False)
        self.encoder = Stack(c, decoder=False)
        self.decoder = Stack(c, decoder=True)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids_BS: Tensor, decoder_ids_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D] of the decoder: position t's predict the token behind `decoder_ids_BT[:, t]`.

        Args:
            ids_BS: the source.
            decoder_ids_BT: the target one place to the right, behind the start token.
            attention_mask: [B, S] 1 for text and 0 for padding of the source. Padding behind a target needs none.
        """
        return self.decode(decoder_ids_BT, self.encode(ids_BS, attention_mask))

    def encode(self, ids_BS: Tensor, attention_mask: Tensor | None = None) -> Source:
        """Read the source."""
        embedding = self.embed_source if self.config.source_vocab_size else self.embed_tokens
        positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        mask = Mask(None)
        if attention_mask is not None:
            mask = make_mask(
                positions[None], positions[None], causal=False,
                query_documents_BT=attention_mask, key_documents_BS=attention_mask,
            )  # fmt: skip
        mask = self.encoder.mask(mask, positions, positions)
        x = self._embed(ids_BS, embedding, positions, self.encoder)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        x = self.encoder.dropout(self.encoder.norm(x))
        readers: Any = [layer.cross_attn for layer in self.decoder.layers]
        keys, values = zip(*(reader.keys_and_values(x) for reader in readers))
        return Source(x, list(keys), list(values), attention_mask)

    def decode(self, decoder_ids_BT: Tensor, source: Source, cache: KVCache | None = None) -> Tensor:
        """Hidden states [B, T, D] of the next tokens of the target.

        Args:
            cache: keys and values of earlier tokens; this call's are added to it.

        Raises:
            UserError: more tokens than the cache, or a table of positions, has room for.
        """
        past, T = 0 if cache is None else cache.end, decoder_ids_BT.shape[1]
        positions = torch.arange(past, past + T, device=decoder_ids_BT.device)
        keys = torch.arange(past + T, device=decoder_ids_BT.device)
        if cache is not None:
            if past + T > cache.max_length:
                raise UserError(f"the cache holds {cache.max_length} tokens and {past + T} are needed")
            cache.end = past + T
        mask = self.decoder.mask(make_mask(positions[None], keys[None]), positions, keys)
        seen = None if source.attention_mask is None else source.attention_mask[:, None].bool()
        source_mask = Mask(None if seen is None else seen.expand(-1, T, -1))
        x = self._embed(decoder_ids_BT, self.embed_tokens, positions, self.decoder)
        for i, layer in enumerate(self.decoder.layers):
            x = layer(x, mask, (source.keys[i], source.values[i], source_mask), cache, i, slice(past, past + T))
        x = self.decoder.dropout(self.decoder.norm(x))
        return x * self.config.hidden_size**-0.5 if self.config.scale_decoder_outputs else x

    def _embed(self, ids: Tensor, embedding: nn.Embedding, positions: Tensor, stack: Stack) -> Tensor:
        x = embedding(ids)
        if self.config.position == "sinusoidal":
            longest = len(self.position_table)
            if int(positions[-1]) >= longest:
                raise UserError(f"position {int(positions[-1])} is past this model's last, {longest - 1}")
            x = x + self.position_table[positions].to(x.dtype)
        return stack.dropout(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.lm_head(hidden)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits, for losses that never build all logits."""
        return self.lm_head.weight

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` targets of up to `max_length` tokens, like this model's weights."""
        c, like = self.config, self.embed_tokens.weight
        return KVCache(
            c.num_decoder_layers, batch_size, c.num_attention_heads, max_length, c.head_dim, like.dtype, like.device
        )
