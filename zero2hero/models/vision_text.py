"""A text model and an image model that learn to point the same way: CLIP and SigLIP.

Each turns its input into one vector of length 1; the product of two is high when text and image belong together. Nobody
names classes in training: the texts that people write under images are enough, and then any sentence is a class
("zero-shot"). CLIP (Radford et al. 2021, arXiv 2103.00020) asks which of the batch's texts belongs to an image, a
softmax; SigLIP (Zhai et al. 2023, arXiv 2303.15343) asks of each pair whether it belongs together, a sigmoid.

                 text sees       text's vector        image's vector
    CLIP         earlier words   the end token's      the class token's     each through a projection
    SigLIP       all words       the last token's     gathered by attention

SigLIP reads texts padded to their full length, padding included: the last token gathers what was said.

B texts, I images, T time, D width, P width of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.model_configs import VisionTextConfig
from zero2hero.models.decoder import Block
from zero2hero.models.vision import VisionTransformer
from zero2hero.nn.masks import Mask, causal_mask


class TextTower(nn.Module):
    """The layers of a decoder, with a mask or without, that end in hidden states."""

    def __init__(self, config: DecoderConfig, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] after the last norm.

        Raises:
            UserError: a text longer than the table of positions.
        """
        T, longest = ids_BT.shape[1], self.config.max_position_embeddings
        if longest < T:
            raise UserError(f"a text has {T} tokens; the model reads {longest}")
        x = self.embed_tokens(ids_BT) + self.embed_positions.weight[:T]
        mask = causal_mask(T, ids_BT.device) if self.causal else Mask(None)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None, None, i, None)
        return self.norm(x)


class VisionText(nn.Module):
    """`texts, images = model(ids, pixels)`, `logits = model.logits(texts, images)`."""

    def __init__(self, config: VisionTextConfig) -> None:
        super().__init__()
        self.config = c = config.derived()
        text, vision, P = c.text_config, c.vision_config, c.projection_dim
        self.softmax = c.loss == "softmax"
        self.text_model = TextTower(text, causal=self.softmax)
        self.vision_model = VisionTransformer(vision)
        self.text_projection = nn.Linear(text.hidden_size, P, bias=not self.softmax)
        if self.softmax:
            if not isinstance(text.eos_token_id, int):
                raise UserError("text_config.eos_token_id should be the number of the token that ends a text")
            self.vision_projection = nn.Linear(vision.hidden_size, P, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # its exponential is the scale
        else:
            self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
            self.logit_bias = nn.Parameter(torch.tensor([-10.0]))  # at first hardly any pair belongs together

    def forward(self, ids_BT: Tensor, pixels_ICHW: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of texts [B, P] and of images [I, P]."""
        return self.text_features(ids_BT), self.image_features(pixels_ICHW)

    def text_features(self, ids_BT: Tensor) -> Tensor:
        """Vectors [B, P] of length 1; ids as `pad` makes them."""
        hidden = self.text_model(ids_BT)
        last = self._last(ids_BT) if self.softmax else torch.full_like(ids_BT[:, 0], -1)
        return F.normalize(self.text_projection(hidden[torch.arange(len(hidden)), last]), dim=-1)

    def _last(self, ids_BT: Tensor) -> Tensor:
        """Where the first end token is, [B].

        The first files of CLIP name a wrong one, 2; there it is the highest id of the text.
        """
        end: Any = self.config.text_config.eos_token_id
        return (ids_BT if end == 2 else ids_BT.eq(end).int()).argmax(-1)

    def image_features(self, pixels_ICHW: Tensor) -> Tensor:
        """Vectors [I, P] of length 1."""
        vector = self.vision_model.logits(self.vision_model(pixels_ICHW))
        return F.normalize(self.vision_projection(vector) if self.softmax else vector, dim=-1)

    def logits(self, texts_BP: Tensor, images_IP: Tensor) -> Tensor:
        """How well each image and each text belong together: [I, B]."""
        logits = images_IP @ texts_BP.t() * self.logit_scale.exp()
        return logits if self.softmax else logits + self.logit_bias

    def scores(self, ids_BT: Tensor, pixels_ICHW: Tensor) -> Tensor:
        """The probability [I, B] of each text given the image: one among these texts (CLIP), or each alone (SigLIP)."""
        logits = self.logits(*self(ids_BT, pixels_ICHW))
        return logits.softmax(-1) if self.softmax else logits.sigmoid()

    def pad(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Texts of unequal length as ids [B, T]; SigLIP reads every text at full length."""
        c = self.config.text_config
        width = max(map(len, texts)) if self.softmax else c.max_position_embeddings
        padding = c.pad_token_id if c.pad_token_id is not None else 0
        rows = [[*text, *[padding] * (width - len(text))] for text in texts]
        if max(map(len, rows)) > c.max_position_embeddings:
            raise UserError(f"a text has {max(map(len, rows))} tokens; the model reads {c.max_position_embeddings}")
        return torch.tensor(rows, device=self.logit_scale.device)
