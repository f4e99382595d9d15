"""What stands on top of an encoder: one small head for each task. And how one vector is read from many tokens.

Each head turns hidden states [B, T, D] into the numbers that its task asks for. BERT (Devlin et al. 2018, arXiv
1810.04805) and RoBERTa (Liu et al. 2019, arXiv 1907.11692) have the same heads under different names.

B batch, T time, D width, V vocabulary, C labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.model_configs import EncoderConfig
from zero2hero.nn.feedforward import ACTIVATIONS


class Pooler(nn.Module):
    """The first token's state, through one tanh layer: [B, T, D] -> [B, D]."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return torch.tanh(self.pooler(hidden_BTD[:, 0]))


class MaskedLMHead(nn.Module):
    """A score for each word of the vocabulary: [..., D] -> [..., V]. The last matrix is the embedding itself."""

    def __init__(self, c: EncoderConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(c.hidden_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.decoder = nn.Linear(c.hidden_size, c.vocab_size)
        self.decoder.weight = embedding.weight
        self.activation = c.feedforward

    def features(self, hidden: Tensor) -> Tensor:
        """What the last matrix multiplies: [..., D]."""
        return self.norm(ACTIVATIONS[self.activation](self.transform(hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.features(hidden))

    def as_product(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(features [..., D + 1], weight [V, D + 1]) whose product is the logits, for losses that never build all.

        The bias is the weight of a feature that is always 1.
        """
        features = F.pad(self.features(hidden), (0, 1), value=1.0)
        return features, torch.cat([self.decoder.weight, self.decoder.bias[:, None]], -1)


class SequenceHead(nn.Module):
    """A score for each label of a whole text, read from its first token: [B, T, D] -> [B, C]."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)
        self.dropout = nn.Dropout(classifier_dropout(c))
        self.out_proj = nn.Linear(c.hidden_size, len(c.id2label))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(hidden_BTD[:, 0]))))


class TokenHead(nn.Module):
    """A score for each label of each token: [..., D] -> [..., C]."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(classifier_dropout(c))
        self.classifier = nn.Linear(c.hidden_size, len(c.id2label))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.dropout(hidden))


class SpanHead(nn.Module):
    """Two scores for each token, that an answer begins and that it ends there: [..., D] -> [..., 2]."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.ends = nn.Linear(c.hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ends(hidden)


def classifier_dropout(c: EncoderConfig) -> float:
    return c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout


def make_head(c: EncoderConfig, embedding: nn.Embedding) -> nn.Module:
    """The head for the configuration's task."""
    if c.task == "masked_lm":
        return MaskedLMHead(c, embedding)
    kinds = {
        "features": Pooler,
        "sequence_classification": SequenceHead,
        "token_classification": TokenHead,
        "question_answering": SpanHead,
    }
    return kinds[c.task](c)


def last_states(hidden_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The hidden state of each text's last token, wherever its padding is: [B, D].

    A causal model's last token is the only one that has seen the whole text.
    """
    places = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device)
    last_B = (places * (attention_mask_BT != 0)).argmax(-1)
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


def mean_pool(hidden_BTD: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
    """The mean of each text's hidden states, padding left out (Reimers & Gurevych 2019, arXiv 1908.10084): [B, D]."""
    if attention_mask_BT is None:
        return hidden_BTD.mean(1)
    weight = attention_mask_BT.to(hidden_BTD.dtype)[..., None]
    return (hidden_BTD * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def embed(model: nn.Module, ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
    """One vector of length 1 for each text, so that the product of two is their cosine: [B, D]."""
    return F.normalize(mean_pool(model(ids_BT, attention_mask_BT), attention_mask_BT), dim=-1)
