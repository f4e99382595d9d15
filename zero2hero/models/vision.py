"""The vision Transformer: an image is cut into squares, and each square is read as a word.

ViT (Dosovitskiy et al. 2020, arXiv 2010.11929): a linear map turns a patch of pixels into a vector, a learned vector
says where it was, and the layers are a decoder's (decoder.py) without the mask: every patch sees every other. One more
token, which stands for no patch, gathers what the whole image shows. CLIP's image model is the same with one more norm;
SigLIP's has no such token, and one learned query gathers by attention over the patches.

B images, C channels, H height, W width, T patches (and the class token), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.model_configs import VisionConfig
from zero2hero.models.decoder import Block
from zero2hero.nn.attention import CrossAttention
from zero2hero.nn.feedforward import FeedForward
from zero2hero.nn.masks import Mask


class VisionTransformer(nn.Module):
    """`hidden = model(pixels)`, `logits = model.logits(hidden)`; what the logits are depends on `config.task`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = c = config.derived()
        D, shape = c.hidden_size, c.blocks()
        self.embed_patches = nn.Conv2d(c.num_channels, D, c.patch_size, stride=c.patch_size, bias=c.patch_bias)
        self.embed_positions = nn.Embedding(c.num_patches + c.class_token, D)
        if c.class_token:
            self.embed_class = nn.Parameter(torch.zeros(1, D))
        if c.first_norm:
            self.first_norm = nn.LayerNorm(D, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(Block(shape) for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(D, eps=c.norm_eps)
        if c.task == "image_classification":
            self.classifier = nn.Linear(D, len(c.id2label))
        elif c.task == "features":
            self.pooler = nn.Linear(D, D)
        elif c.task == "attention":
            self.pooling = AttentionPooling(c)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Hidden states [B, T, D] after the last norm; the class token, where there is one, comes first."""
        return self.norm(self.states(pixels_BCHW, [-1])[0])

    def states(self, pixels_BCHW: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """What leaves each of these layers, [B, T, D]; 0 is what enters the first, and -1 is the last.

        Raises:
            UserError: pixels of another size than the model reads.
        """
        c = self.config
        expected = (c.num_channels, c.image_size, c.image_size)
        if pixels_BCHW.dim() != 4 or tuple(pixels_BCHW.shape[1:]) != expected:
            raise UserError(f"images should be [B, {', '.join(map(str, expected))}], not {list(pixels_BCHW.shape)}")
        x = self.patches(pixels_BCHW)
        if c.class_token:
            x = torch.cat([self.embed_class.expand(len(x), 1, -1), x], 1)
        return self.through_layers(x + self.embed_positions.weight, Mask(None), layers)

    def patches(self, pixels_BCHW: Tensor) -> Tensor:
        """The vector of each patch [B, T, D], row by row, which does not know its place yet."""
        return self.embed_patches(pixels_BCHW.to(self.embed_patches.weight.dtype)).flatten(2).transpose(1, 2)

    def through_layers(self, x: Tensor, mask: Mask, layers: Sequence[int]) -> list[Tensor]:
        """What leaves each of these layers when vectors [B, T, D] with their places go in; see `states`."""
        x = self.dropout(x)
        if self.config.first_norm:
            x = self.first_norm(x)
        wanted = [layer % (len(self.layers) + 1) for layer in layers]
        found = {0: x}
        for i in range(max(wanted)):
            x = self.layers[i](x, mask, None, None, i, None)
            if i + 1 in wanted:
                found[i + 1] = x
        return [found[layer] for layer in wanted]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """What the head makes of hidden states: image_classification [B, labels]; otherwise one vector [B, D]."""
        if self.config.task == "image_classification":
            return self.classifier(hidden_BTD[:, 0])
        if self.config.task == "features":
            return torch.tanh(self.pooler(hidden_BTD[:, 0]))
        return self.pooling(hidden_BTD) if self.config.task == "attention" else hidden_BTD[:, 0]


class AttentionPooling(nn.Module):
    """One learned query looks at all patches (Lee et al. 2018, arXiv 1810.00825): [B, T, D] -> [B, D]."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        D, heads = c.hidden_size, c.num_attention_heads
        self.embed_probe = nn.Parameter(torch.zeros(1, D))
        self.attention = CrossAttention(D, heads, heads, D // heads, bias=True, output_bias=True)
        self.norm = nn.LayerNorm(D, eps=c.norm_eps)
        self.mlp = FeedForward(D, c.intermediate_size, c.feedforward, bias=True)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        probe = self.embed_probe.expand(len(hidden_BTD), 1, -1)
        x = self.attention(probe, *self.attention.keys_and_values(hidden_BTD), Mask(None))
        return (x + self.mlp(self.norm(x)))[:, 0]
