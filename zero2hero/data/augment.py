"""Training images changed at random, in ways that do not change what they show.

A model that has seen a digit shifted and turned will not learn where it stood: the cheapest way to more data (Simard et
al. 2003; Krizhevsky et al. 2012). Random erasing (Zhong et al. 2017, arXiv 1708.04896) blots out a rectangle, so that
no single part of a thing is relied on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zero2hero.model_configs import AugmentConfig


def augment(pixels_BCHW: Tensor, config: AugmentConfig, seed: int, first_row: int = 0) -> Tensor:
    """The same images, each turned, scaled, shifted, mirrored and blotted as `config` says; what comes in is 0.

    `first_row` is the first image's number in the run: what happens to an image is a function of the seed and its own
    number, however a step is cut into micro-batches.
    """
    if config == AugmentConfig():
        return pixels_BCHW
    numbers = range(first_row, first_row + len(pixels_BCHW))
    chance = torch.from_numpy(np.stack([np.random.default_rng([seed % 2**64, n]).random(10) for n in numbers])).float()
    if config.shift or config.rotation or config.scale or config.flip:
        pixels_BCHW = _moved(pixels_BCHW, config, chance[:, :5].t())
    return _erased(pixels_BCHW, config.erasing, chance[:, 5:].t()) if config.erasing else pixels_BCHW


def _moved(pixels: Tensor, config: AugmentConfig, chance_5B: Tensor) -> Tensor:
    """A linear map for each image says where each new pixel is taken from; between pixels, by interpolation."""
    angle, scale, x, y = (2 * chance_5B[:4] - 1).unbind()
    angle, scale = angle * math.radians(config.rotation), 1 + scale * config.scale
    mirror = torch.where(chance_5B[4] < 0.5 * config.flip, -1.0, 1.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = 2 * config.shift  # an image is 2 wide in the map's units
    rows = [torch.stack([cos * mirror, -sin, x * shift], -1), torch.stack([sin * mirror, cos, y * shift], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def _erased(pixels: Tensor, share: float, chance_5B: Tensor) -> Tensor:
    """A rectangle of 2 % to 25 % of the image, between thrice as wide and thrice as high, at a random place."""
    H, W = pixels.shape[-2:]
    chosen, area, aspect, x, y = chance_5B.unbind()
    area, aspect = 0.02 + 0.23 * area, 3 ** (2 * aspect - 1)
    height, width = (area * aspect).sqrt().clamp(max=1) * H, (area / aspect).sqrt().clamp(max=1) * W
    top, left = y * (H - height), x * (W - width)
    rows, columns = torch.arange(H)[None, :, None] + 0.5, torch.arange(W)[None, None, :] + 0.5
    inside = (rows >= top[:, None, None]) & (rows < (top + height)[:, None, None])
    inside = inside & (columns >= left[:, None, None]) & (columns < (left + width)[:, None, None])
    return pixels.masked_fill((inside & (chosen < share)[:, None, None])[:, None], 0.0)
