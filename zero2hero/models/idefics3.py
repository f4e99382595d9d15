"""Idefics3 and SmolVLM: an image is read tile by tile, and neighbouring patches share one token.

A photograph shrunk to the few hundred pixels that an image model reads loses its small print. Idefics3 (Laurençon et
al. 2024, arXiv 2408.12637) cuts it into tiles, reads each one and a small view of the whole, and tells the language
model where each tile was (data/tiles.py). So that the tiles do not fill the whole context, squares of
scale_factor x scale_factor patches are laid side by side to one long vector, which one matrix makes a word's: "pixel
shuffle", backwards (Shi et al. 2016, arXiv 1609.05158). SmolVLM (Marafioti et al. 2025, arXiv 2504.05299) is the same
in small. Everything else is as in vision_language.py.

The image model is SigLIP's without a head. It also reads images of other sizes, and images with padding at the right
and below, by laying its table of positions over the part that is there (Dehghani et al. 2023, arXiv 2307.06304).

I tiles, C channels, H height, W width, R rows and S columns of patches, V width of the image model, D of the language
model, N image tokens for each tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.model_configs import Idefics3Config
from zero2hero.models.vision import VisionTransformer
from zero2hero.models.vision_language import VisionLanguage
from zero2hero.nn.masks import Mask


class AnySizeVision(VisionTransformer):
    """`hidden = model(pixels, seen)`: the states of all patches, padding included, which no other patch sees."""

    def forward(self, pixels_ICHW: Tensor, seen_IHW: Tensor | None = None) -> Tensor:
        """Hidden states [I, R * S, V] after the last norm; `seen` is True for the image, at the upper left."""
        x, size = self.patches(pixels_ICHW), self.config.patch_size
        rows, columns = (pixels // size for pixels in pixels_ICHW.shape[2:])
        if seen_IHW is None:
            patches_IRS = torch.ones(len(x), rows, columns, dtype=torch.bool, device=x.device)
            mask = Mask(None)
        else:
            patches_IRS = F.max_pool2d(seen_IHW[:, None].float(), size)[:, 0] > 0
            mask = Mask(patches_IRS.flatten(1)[:, None].expand(-1, rows * columns, -1))
        places = patch_places(patches_IRS, self.config.image_size // size)
        return self.norm(self.through_layers(x + self.embed_positions(places), mask, [-1])[0])


def patch_places(seen_IRS: Tensor, side: int) -> Tensor:
    """The row of a table of side x side positions for each patch: [I, R * S].

    Each patch takes the place that lies at the same fraction of the table as it does of the image; 0 for padding.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side, device=seen_IRS.device)

    def along(count_I: Tensor, length: int) -> Tensor:
        fractions = torch.arange(length, device=seen_IRS.device)[None] * (1.0 / count_I)[:, None]
        return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), bounds, right=True)

    _, R, S = seen_IRS.shape
    rows, columns = along(seen_IRS[:, :, 0].sum(1), R), along(seen_IRS[:, 0].sum(1), S)
    return (rows[:, :, None] * side + columns[:, None]).masked_fill(~seen_IRS, 0).flatten(1)


class PixelShuffle(nn.Module):
    """States of patches [I, R * R, V] -> vectors like those of words [I, N, D]."""

    def __init__(self, c: Idefics3Config) -> None:
        super().__init__()
        self.factor = c.scale_factor
        width = c.vision_config.hidden_size * c.scale_factor**2
        self.proj = nn.Linear(width, c.text_config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raises `UserError` for patches that are no square, or one that the factor does not divide."""
        side, f = int(x.shape[1] ** 0.5), self.factor
        if side**2 != x.shape[1] or side % f:
            raise UserError(
                f"{x.shape[1]} patches are not a square of squares of {f} x {f}: the tiles have a wrong size"
            )
        squares = x.unflatten(1, (side // f, f, side // f, f)).transpose(2, 3)
        return self.proj(squares.reshape(len(x), (side // f) ** 2, -1))


class Idefics3(VisionLanguage):
    """`hidden = model(ids, tiles)`, `logits = model.logits(hidden)`; see `VisionLanguage`."""

    tower_class = AnySizeVision
    projector_class = PixelShuffle

    def image_features(self, pixels_ICHW: Tensor, seen_IHW: Tensor | None = None) -> Tensor:
        """What takes the place of a tile's tokens: [I, N, D]; `seen` as for `AnySizeVision`."""
        return self.projector(self.vision_tower(pixels_ICHW, seen_IHW))
