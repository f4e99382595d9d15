"""From image files to the pixels that a model reads.

    processor = ImageProcessor.from_pretrained("runs/clip")
    pixels_BCHW = processor([open_image("cat.png"), open_image("dog.jpg")])

The steps and their settings are those of preprocessor_config.json: resize, cut out the middle, scale to 0 ... 1,
subtract the mean and divide by the standard deviation. A model sees well only what is prepared as in its training, down
to the filter that resizes; so the resizing is Pillow's, as in the reference, and only PNG, JPEG and WebP are opened.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zero2hero.errors import UserError, did_you_mean
from zero2hero.fetch import find_folder
from zero2hero.io import atomic_write
from zero2hero.models.checkpoint import read_json

if TYPE_CHECKING:
    from typing import Self

    from PIL.Image import Image

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
FILE = "preprocessor_config.json"

_HALF, _CLIP_MEAN, _CLIP_STD = (
    (0.5, 0.5, 0.5),
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
_SQUARE = {"height": 224, "width": 224}
_CLIP = {"size": {"shortest_edge": 224}, "crop_size": _SQUARE, "do_center_crop": True, "resample": 3,
         "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD}  # fmt: skip
# The kinds of processors, and what their absent settings mean.
_KINDS: dict[str, dict[str, Any]] = {
    "ViT": {"size": _SQUARE, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
    "CLIP": _CLIP,
    "Llava": _CLIP,
    "Siglip": {"size": _SQUARE, "resample": 3, "image_mean": _HALF, "image_std": _HALF},
}


def open_image(source: str | Path | bytes | Image, mode: str = "RGB", max_pixels: int | None = None) -> Image:
    """A PNG, JPEG or WebP file (or its bytes, or an image in memory), turned upright, in colours (or grey: "L").

    Raises:
        UserError: no such file, another format, a damaged image, or one of more than `max_pixels` (`MAX_PIXELS`);
            nothing is fetched from an address.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("images need Pillow: pip install 'zero2hero[vision]'") from None
    if isinstance(source, Image.Image):
        return source.convert(mode)
    name = "the image" if isinstance(source, bytes) else str(source)
    if re.match(r"[a-z]+://", name):
        raise UserError(f"{name}: nothing is fetched from an address. Download the image and give its path.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            most = max_pixels or MAX_PIXELS
            if width * height > most:
                raise UserError(f"{name} has {width} x {height} pixels; at most {most:,} are read")
            return ImageOps.exif_transpose(image).convert(mode)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no image {name}") from None
    except Exception as error:  # of many kinds: damaged files fail wherever their decoder notices
        reason = "not an image" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise UserError(f"{name} cannot be read as PNG, JPEG or WebP: {reason}") from None


@dataclass(frozen=True)
class ImageProcessor:
    """How images become pixels, under the names of preprocessor_config.json."""

    kinds: ClassVar[dict[str, dict[str, Any]]] = _KINDS

    size: Mapping[str, int]  # height and width, or shortest_edge: the proportions stay
    crop_size: Mapping[str, int] = dataclasses.field(default_factory=lambda: _SQUARE)  # height, width
    resample: int = 2  # Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming
    image_mean: Sequence[float] = _HALF  # of each channel; one number: the images are grey
    image_std: Sequence[float] = _HALF
    rescale_factor: float = 1 / 255
    do_pad: bool = False  # make it a square first, with borders of the mean colour
    do_resize: bool = True
    do_center_crop: bool = False
    do_rescale: bool = True
    do_normalize: bool = True
    image_processor_type: str = "ViTImageProcessor"

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> Self:
        """The processor of a model's directory or hub id.

        Raises:
            UserError: no such file, an unknown kind of processor, or settings without a meaning.
        """
        folder = find_folder(path_or_id)
        whole = folder / "processor_config.json"
        if (folder / FILE).exists() or not whole.exists():
            said, path = read_json(folder / FILE), folder / FILE
        else:
            said, path = read_json(whole).get("image_processor") or {}, whole
        kind = str(said.get("image_processor_type") or said.get("feature_extractor_type"))
        match = re.fullmatch(r"(\w+?)(ImageProcessor|FeatureExtractor)(Fast|Pil)?", kind)
        name = match[1] if match else kind
        if name not in cls.kinds:
            near = did_you_mean(name, cls.kinds)
            raise UserError(f"{path}: unknown image processor {kind!r}; known: {', '.join(cls.kinds)}.{near}")
        fields = {field.name for field in dataclasses.fields(cls)}
        given = cls.kinds[name] | {k: v for k, v in said.items() if k in fields and v is not None}
        if isinstance(given["size"], int):
            given["size"] = _square(given["size"]) if name != "CLIP" else {"shortest_edge": given["size"]}
        if isinstance(given.get("crop_size"), int):
            given["crop_size"] = _square(given["crop_size"])
        given["image_processor_type"] = f"{name}ImageProcessor"
        try:
            return cls(**given)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def __post_init__(self) -> None:
        known = [{"height", "width"}, {"shortest_edge"}]
        for name, sizes in (("size", known), ("crop_size", known[:1])):
            value = getattr(self, name)
            if set(value) not in sizes or not all(isinstance(n, int) and n > 0 for n in value.values()):
                raise UserError(f"{name} should give height and width (or, of size, shortest_edge), not {dict(value)}")
        self._check_colours()

    def _check_colours(self) -> None:
        if self.resample not in range(6):
            raise UserError(f"resample should be the number of one of Pillow's filters, 0 to 5, not {self.resample}")
        if len(self.image_mean) not in (1, 3) or len(self.image_mean) != len(self.image_std):
            raise UserError("image_mean and image_std should have a number for each channel: three, or one for grey")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write preprocessor_config.json."""
        content = dataclasses.asdict(self) | {"do_convert_rgb": len(self.image_mean) == 3}
        atomic_write(Path(directory) / FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def __call__(self, images: Sequence[str | Path | bytes | Image]) -> Tensor:
        """[B, C, H, W] in fp32; images as for `open_image`."""
        return torch.stack([self._prepare(open_image(x, "RGB" if len(self.image_mean) == 3 else "L")) for x in images])

    def in_text(self, image: Image, mark: str) -> str:
        """What stands for an image in a text: one image token `mark` for each of the pictures that are made of it."""
        return mark

    def _prepare(self, image: Image) -> Tensor:
        if self.do_pad:
            image = self._squared(image)
        if self.do_resize:
            image = image.resize(self._resized(*image.size), resample=self.resample)
        if self.do_center_crop:
            width, height = self.crop_size["width"], self.crop_size["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black where there is no image
        return self._numbers(image)

    def _numbers(self, image: Image) -> Tensor:
        """[C, H, W]"""
        x = torch.from_numpy(np.array(image)).float().view(image.height, image.width, -1).permute(2, 0, 1)
        if self.do_rescale:
            x = x * self.rescale_factor
        if self.do_normalize:
            mean, std = (torch.tensor(list(v))[:, None, None] for v in (self.image_mean, self.image_std))
            x = (x - mean) / std
        return x

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """The size after resizing; (width, height), as Pillow has it."""
        if "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        short = self.size["shortest_edge"]
        long = int(short * max(width, height) / min(width, height))
        return (short, long) if width <= height else (long, short)

    def _squared(self, image: Image) -> Image:
        from PIL import Image

        side = max(image.size)
        colour = tuple(int(mean * 255) for mean in self.image_mean)
        square = Image.new(image.mode, (side, side), colour if len(colour) > 1 else colour[0])
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}
