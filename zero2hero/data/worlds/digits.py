"""Digits: pictures of the digits 0 to 9 in a small bitmap font, no two alike.

Each picture turns, leans, scales, shifts and bends the font's 5 x 7 dots and draws them with a pen of another width,
in the manner of the distortions that made handwritten digits easy (Simard et al. 2003, "Best practices for
convolutional neural networks applied to visual document analysis"). White on black, 28 x 28, as MNIST.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zero2hero.data.worlds.base import BaseWorld, document_rng
from zero2hero.data.worlds.raster import Floats, Pixels

# Seven rows of five dots, top to bottom; the dots of a row are the bits of a number, the leftmost the highest.
FONT = {
    "0": "0e 11 11 11 11 11 0e", "1": "04 0c 04 04 04 04 0e", "2": "0e 11 01 02 04 08 1f", "3": "0e 11 01 06 01 11 0e",
    "4": "02 06 0a 12 1f 02 02", "5": "1f 10 1e 01 01 11 0e", "6": "06 08 10 1e 11 11 0e", "7": "1f 01 02 04 04 08 08",
    "8": "0e 11 11 0e 11 11 0e", "9": "0e 11 11 0f 01 02 0c",
}  # fmt: skip
DETAIL = 4  # points for each dot, across and down, in the glyph that is looked up
BORDER = 2  # dots around it


def _glyph(rows: str) -> Floats:
    """The digit as a smooth relief: 1 on its dots, falling to 0 between and around them."""
    bits = np.array([[int(row, 16) >> i & 1 for i in (4, 3, 2, 1, 0)] for row in rows.split()], np.float32)
    fine = np.pad(bits, BORDER).repeat(DETAIL, 0).repeat(DETAIL, 1)
    kernel = np.hanning(2 * DETAIL + 1).astype(np.float32)
    for axis in (0, 1):
        fine = np.apply_along_axis(np.convolve, axis, fine, kernel / kernel.sum(), "same")
    return fine


GLYPHS = {digit: _glyph(rows) for digit, rows in FONT.items()}


class Digits(BaseWorld):
    """A picture [S, S] for each index; the label is its digit."""

    name = "digits"

    def __init__(self, seed: int = 0, image_size: int = 28) -> None:
        super().__init__(seed)
        self.image_size = image_size

    def document(self, index: int, split: str = "train") -> str:
        """The digit."""
        return document_rng(self.name, self.seed, split, index).choice(list(FONT))

    def record(self, index: int, split: str = "train") -> dict[str, Any]:
        rng = document_rng(self.name, self.seed, split, index)
        digit = rng.choice(list(FONT))
        return {"image": self._draw(GLYPHS[digit], np.random.default_rng(rng.getrandbits(64))), "label": digit}

    def _draw(self, glyph: Floats, rng: np.random.Generator) -> Pixels:
        side = self.image_size
        y, x = np.mgrid[0:side, 0:side].astype(np.float32) / (side - 1) * 2 - 1  # -1 ... 1
        phase, strength = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0, 0.08, 2)
        x, y = x + strength[0] * np.sin(3 * y + phase[0]), y + strength[1] * np.sin(3 * x + phase[1])
        x, y = x - rng.uniform(-0.15, 0.15), y - rng.uniform(-0.15, 0.15)
        angle, lean, scale, ratio = (
            rng.normal(0, 0.17),
            rng.normal(0, 0.2),
            rng.uniform(0.6, 0.9),
            rng.uniform(0.8, 1.2),
        )
        x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        x = (x + lean * y) / ratio
        per_unit = 3.5 * DETAIL / scale  # points of the glyph: half the height of seven dots is 1
        relief = _between(glyph, y * per_unit + glyph.shape[0] / 2 - 0.5, x * per_unit + glyph.shape[1] / 2 - 0.5)
        width, ink = rng.uniform(0.25, 0.45), rng.uniform(0.75, 1.0)
        drawn = ink / (1 + np.exp(-(relief - width) * 25)) + rng.normal(0, 0.02, relief.shape)
        return np.clip(drawn * 255, 0, 255).astype(np.uint8)


def _between(values: Floats, y: Floats, x: Floats) -> Floats:
    """`values` at places between its points, by bilinear interpolation; beyond its edges, those of the edge."""
    y, x = np.clip(y, 0, values.shape[0] - 1.001), np.clip(x, 0, values.shape[1] - 1.001)
    top, left = y.astype(int), x.astype(int)
    down, right = y - top, x - left
    upper = values[top, left] * (1 - right) + values[top, left + 1] * right
    lower = values[top + 1, left] * (1 - right) + values[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down
