"""The multi-layer perceptron: where the road begins. All pixels at once, layer after layer, to a score for each label.

    pixels -> flatten -> [linear -> activation -> dropout] for each of hidden_sizes -> linear -> logits

A layer without an activation would be for nothing: two matrices in a row are one. Dropout (Srivastava et al. 2014)
zeroes a share of each layer's units at random while training, so that no unit relies on another.

The first weights must neither blow a signal up nor let it die on its way through the layers. A sum of n inputs has n
times the variance of one, so weights of variance 1/n keep it; a ReLU then throws half of it away, and 2/n makes up for
that (He et al. 2015, arXiv 1502.01852). For each activation that factor is its `GAIN`.

transformers has no class for such a model; its directory is opened by zero2hero alone.

B images, C channels, H height, W width, D width of the last hidden layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.model_configs import MLPConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,  # max(x, 0): cheap, and it does not saturate
    "gelu": F.gelu,  # x times the share of a Gaussian below x: a ReLU without the corner
    "silu": F.silu,  # x * sigmoid(x)
    "tanh": torch.tanh,  # -1 ... 1, saturates at both ends
    "sigmoid": torch.sigmoid,  # 0 ... 1, and never steeper than 1/4: gradients shrink in every layer
}
GAIN = {"relu": 2.0, "gelu": 2.0, "silu": 2.0, "tanh": 1.0, "sigmoid": 16.0}  # variance of the weights, times n


class MLP(nn.Module):
    """`hidden = model(pixels)`, `logits = model.logits(hidden)`."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = c = config
        sizes = [c.num_channels * c.image_size**2, *c.hidden_sizes]
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], len(c.id2label))
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """The last hidden layer's values [B, D].

        Raises:
            UserError: pixels of another size than the model reads.
        """
        c = self.config
        expected = (c.num_channels, c.image_size, c.image_size)
        if pixels_BCHW.dim() != 4 or tuple(pixels_BCHW.shape[1:]) != expected:
            raise UserError(f"images should be [B, {', '.join(map(str, expected))}], not {list(pixels_BCHW.shape)}")
        x = pixels_BCHW.flatten(1).to(self.classifier.weight.dtype)
        for layer in self.layers:
            x = self.dropout(ACTIVATIONS[c.activation](layer(x)))
        return x

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """A score for each label [B, labels]."""
        return self.classifier(hidden_BD)


@torch.no_grad()
def init_mlp(model: MLP, seed: int = 0) -> None:
    """First weights as above; biases, and what gives the scores, begin at zero: every label is as likely then."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        assert isinstance(layer, nn.Linear)
        layer.weight.normal_(0.0, math.sqrt(GAIN[model.config.activation] / layer.in_features), generator=generator)
        layer.bias.zero_()
    model.classifier.weight.zero_()
    model.classifier.bias.zero_()
