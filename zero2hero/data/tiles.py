"""A large image as tiles, with words that say where each one was: how Idefics3 and SmolVLM see small print.

    processor = TilingProcessor.from_pretrained("runs/smolvlm")
    pixels_ICHW = processor([open_image("page.png")])       # all tiles, and then the whole image in a tile's size

The image is enlarged or shrunk until its longer side is `size`, then a little more until both sides are multiples of
a tile's, and cut. In the text, each tile's image token stands behind a tag, row by row, and then that of the whole:

    <fake_token_around_image><row_1_col_1><image><fake_token_around_image><row_1_col_2><image>
    ...
                                                                (an empty line)
    <fake_token_around_image><global-img><image><fake_token_around_image>

An image that fits into one tile is only the whole. The tags are those of Laurençon et al. 2024 (arXiv 2408.12637).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from zero2hero.data.images import ImageProcessor, open_image
from zero2hero.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 4096  # pixels of a side, whatever `size` says
_ABSENT = {"size": {"longest_edge": 1456}, "resample": 1}  # what absent settings mean
BORDER, WHOLE = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True)
class TilingProcessor(ImageProcessor):
    """How images become tiles, under the names of preprocessor_config.json."""

    kinds: ClassVar[dict[str, dict[str, Any]]] = {"Idefics3": _ABSENT, "SmolVLM": _ABSENT}

    max_image_size: Mapping[str, int] = field(default_factory=lambda: {"longest_edge": 364})  # the side of a tile
    do_image_splitting: bool = True  # False: the whole image alone, as one tile
    do_pad: bool = True  # all tiles are of one size, so there is nothing to pad

    def __post_init__(self) -> None:
        for name, known in (("size", [{"longest_edge"}, {"height", "width"}]), ("max_image_size", [{"longest_edge"}])):
            value = getattr(self, name)
            if set(value) not in known or not all(isinstance(n, int) and n > 0 for n in value.values()):
                raise UserError(f"{name} should give longest_edge, not {dict(value)}")
        self._check_colours()

    def __call__(self, images: Sequence[str | Path | bytes | Image]) -> Tensor:
        """[I, C, S, S] in fp32: the tiles of each image row by row, then the whole; images as for `open_image`."""
        tiles = []
        for image in map(open_image, images):
            image = image.resize(self._resized(*image.size), self.resample)
            if self.do_image_splitting:
                image = image.resize(self._multiple(*image.size), self.resample)
                tiles += self._cut(image)
            tiles.append(image.resize((self.side, self.side), self.resample))
        return torch.stack([self._numbers(tile) for tile in tiles])

    def in_text(self, image: Image, mark: str) -> str:
        rows, columns = self.grid(*image.size)
        lines = [
            "".join(f"{BORDER}<row_{row}_col_{column}>{mark}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        ]
        return "".join([*lines, "\n" if rows else "", BORDER, WHOLE, mark, BORDER])

    @property
    def side(self) -> int:
        """Height and width of a tile, in pixels."""
        return self.max_image_size["longest_edge"]

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tiles of an image of this size; (0, 0) when there is only the whole."""
        width, height = self._multiple(*self._resized(width, height))
        if not self.do_image_splitting or max(width, height) == self.side:
            return 0, 0
        return height // self.side, width // self.side

    def _cut(self, image: Image) -> list[Image]:
        corners = [(x, y) for y in range(0, image.height, self.side) for x in range(0, image.width, self.side)]
        if len(corners) == 1:
            return []
        return [image.crop((x, y, x + self.side, y + self.side)) for x, y in corners]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) with a longer side of `size`, the shorter one rounded up to an even number."""
        if not self.do_resize:
            return width, height
        if "longest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        long, ratio = self.size["longest_edge"], width / height
        if width >= height:
            short = int(long / ratio)
            width, height = long, max(1, short + short % 2)
        else:
            short = int(long * ratio)
            width, height = max(1, short + short % 2), long
        if max(width, height) > LARGEST:
            ratio = width / height
            width, height = (LARGEST, int(LARGEST / ratio)) if width >= height else (int(LARGEST * ratio), LARGEST)
        return max(1, width), max(1, height)

    def _multiple(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) rounded up to whole tiles: the longer side first, and the other in proportion to it."""
        ratio = width / height
        if width >= height:
            width = self._whole(width)
            return width, self._whole(int(width / ratio))
        height = self._whole(height)
        return self._whole(int(height * ratio)), height

    def _whole(self, pixels: int) -> int:
        return math.ceil(pixels / self.side) * self.side
