"""The encoder: a Transformer that reads a whole text at once, each token in the light of all others.

BERT (Devlin et al. 2018, arXiv 1810.04805) and RoBERTa (Liu et al. 2019, arXiv 1907.11692), by configuration. It is
trained to guess masked words from both sides, then gets a head for a task: see heads.py. Blocks are post-norm, as
in the first Transformer: normalize after each addition, not before each part.

Padding is known by `attention_mask`, never by a token's id; it is a document of its own, which no other token sees.

B batch, T time, D width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.model_configs import EncoderConfig
from zero2hero.models.decoder import init_parameters
from zero2hero.models.heads import make_head
from zero2hero.nn.attention import Attention
from zero2hero.nn.feedforward import FeedForward
from zero2hero.nn.masks import Mask, make_mask


class EncoderBlock(nn.Module):
    """Post-norm block: norm(x + attention(x)), then norm(x + feedforward(x))."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        heads = c.num_attention_heads
        self.self_attn = Attention(
            c.hidden_size, heads, heads, c.hidden_size // heads,
            bias=True, output_bias=True, dropout=c.attention_probs_dropout_prob,
        )  # fmt: skip
        self.attention_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.mlp = FeedForward(c.hidden_size, c.intermediate_size, c.feedforward, bias=True)
        self.mlp_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.self_attn(x, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Encoder(nn.Module):
    """`hidden = model(ids)`, `logits = model.logits(hidden)`; what the logits are depends on `config.task`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = c = config.derived()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.embed_positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.embed_types = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.embed_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)
        self.layers = nn.ModuleList(EncoderBlock(c) for _ in range(c.num_hidden_layers))
        self.head = make_head(c, self.embed_tokens)

    def forward(
        self,
        ids_BT: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] of the last layer.

        Args:
            ids_BT: token ids.
            attention_mask: [B, T] 1 for a token, 0 for padding; by default everything is text.
            token_type_ids: [B, T] number of each token's segment; 0 by default.
            positions: [B, T] position of each token; by default 0, 1, 2, ..., padding not counted.
            document_ids: [B, T] for packed rows, instead of `attention_mask`: tokens of different documents do not
                see each other.

        Raises:
            UserError: a text longer than the table of positions.
        """
        T, longest = ids_BT.shape[1], self.config.longest
        if positions is None:
            if attention_mask is None:
                positions = torch.arange(T, device=ids_BT.device)[None]
            else:
                positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if longest < T and int(positions.max()) >= longest:
            raise UserError(f"position {int(positions.max())} is past this model's last, {longest - 1}")
        documents = attention_mask if document_ids is None else document_ids
        mask = Mask(None)
        if documents is not None:
            order = torch.arange(T, device=ids_BT.device)[None]
            mask = make_mask(order, order, causal=False, query_documents_BT=documents, key_documents_BS=documents)
        x = self.embed_tokens(ids_BT)
        x = x + F.embedding(positions + self.config.position_offset, self.embed_positions.weight)
        types = torch.zeros_like(ids_BT) if token_type_ids is None else token_type_ids
        x = self.dropout(self.embed_norm(x + F.embedding(types, self.embed_types.weight)))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """What the head makes of hidden states.

        masked_lm [B, T, V]; sequence_classification [B, C]; token_classification [B, T, C]; question_answering
        [B, T, 2], where the answer begins and ends; features [B, D], the first token's pooled state.
        """
        return self.head(hidden_BTD)


def with_head(model: Encoder, task: str, labels: Sequence[str] | None = None, seed: int = 0) -> Encoder:
    """A copy of a model whose head is new: how a pretrained encoder begins to learn a task.

    Args:
        task: see `EncoderConfig.task`.
        labels: their names, for classification; by default the model's own.
    """
    names = model.config.id2label if labels is None else dict(enumerate(labels))
    result = copy.deepcopy(model)
    result.config = dataclasses.replace(model.config, task=task, id2label=names)
    result.head = make_head(result.config, result.embed_tokens)
    fresh = [(n, p) for n, p in result.head.named_parameters() if p is not result.embed_tokens.weight]
    init_parameters(fresh, result.config.initializer_range, seed)
    return result.train(model.training)
