"""Images become the same pixels as in transformers, and what is no image is refused in one line."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

from zero2hero.data import images
from zero2hero.data.images import ImageProcessor, open_image
from zero2hero.errors import UserError

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

SMALL = {"height": 20, "width": 28}
CASES = {
    "ViTImageProcessor": {"size": SMALL},
    "ViTImageProcessor, another filter": {"size": SMALL, "resample": 1, "image_mean": [0.1, 0.2, 0.3]},
    "ViTImageProcessor, as it is": {"do_resize": False, "do_normalize": False, "rescale_factor": 0.5},
    "CLIPImageProcessor": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
    "CLIPImageProcessor, odd, larger than the image": {
        "size": {"shortest_edge": 19}, "crop_size": {"height": 30, "width": 23},
    },
    "SiglipImageProcessor": {"size": SMALL},
    "LlavaImageProcessor, squared": {
        "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_pad": True,
    },
}  # fmt: skip


def picture(width: int, height: int):
    """Soft shapes and noise, so that filters and crops matter."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(x / (3 + c) + y / (5 + c)) for c in range(3)], -1)
    noise = np.random.default_rng(width).integers(0, 28, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_the_references(case, tmp_path):
    name = case.split(",")[0]
    theirs = getattr(transformers, f"{name}Pil")(**CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ImageProcessor.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert ImageProcessor.from_pretrained(tmp_path / "ours") == ours
    for size in ((47, 33), (33, 47), (24, 24), (300, 20)):
        image = picture(*size)
        got = ours([image])
        for processor in (theirs, again):
            want = processor(images=image, return_tensors="pt")["pixel_values"]
            assert got.shape == want.shape
            assert (got - want).abs().max() < 1e-5


def test_old_and_short_files(tmp_path):
    """As google/vit-base-patch16-224 and openai/clip-vit-base-patch32 have them."""
    for said, meant in (
        ({"image_processor_type": "ViTFeatureExtractor", "size": 16}, {"size": {"height": 16, "width": 16}}),
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 12},
            {"size": {"shortest_edge": 16}, "crop_size": {"height": 12, "width": 12}, "do_center_crop": True},
        ),
        ({"image_processor_type": "CLIPImageProcessorFast"}, {"size": {"shortest_edge": 224}, "resample": 3}),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        processor = ImageProcessor.from_pretrained(tmp_path)
        assert {key: getattr(processor, key) for key in meant} == meant
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    assert ImageProcessor.from_pretrained(tmp_path) == processor


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"image_processor_type": "CLIBImageProcessor"}, "unknown image processor.*Did you mean 'CLIP'"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 3}}, "size should give height"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 0, "width": 3}}, "size should give height"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "resample"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5]}, "image_mean"),
    ],
)
def test_settings_without_a_meaning(said, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=message):
        ImageProcessor.from_pretrained(tmp_path)


def test_grey_images_have_one_channel():
    processor = ImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.0], image_std=[1.0])
    pixels = processor([picture(30, 30), Image.new("L", (8, 8), 51)])
    assert pixels.shape == (2, 1, 8, 8)
    assert torch.allclose(pixels[1], torch.tensor(0.2))


def test_three_formats_upright_and_without_transparency(tmp_path):
    image = picture(40, 30)
    for kind in ("PNG", "JPEG", "WEBP"):
        (tmp_path / kind).write_bytes(encoded(image, kind))
        assert (
            np.abs(np.array(open_image(tmp_path / kind)).astype(int) - np.array(image)).mean() < 10
        )  # noise is what they lose
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held on its side
    assert open_image(encoded(image, "PNG", exif=exif)).size == (30, 40)
    assert open_image(encoded(image.convert("RGBA"))).mode == "RGB"
    assert open_image(encoded(image.convert("P"))).mode == "RGB"


def test_what_is_no_image_is_refused(tmp_path, monkeypatch):
    whole = encoded(picture(60, 60))
    damaged = bytearray(whole)
    damaged[60:80] = b"\0" * 20
    bad = {
        "not an image": b"hello", "an image of another format": encoded(picture(9, 9), "BMP"), "empty": b"",
        "cut off": whole[: len(whole) // 2], "damaged": bytes(damaged), "cut in its header": whole[:20],
        "a cut photograph": encoded(picture(60, 60), "JPEG")[:300], "a cut WebP": encoded(picture(60, 60), "WEBP")[:90],
    }  # fmt: skip
    for what, content in bad.items():
        (tmp_path / "bad.png").write_bytes(content)
        for source in (content, tmp_path / "bad.png"):
            with pytest.raises(UserError, match="cannot be read as PNG, JPEG or WebP") as error:
                open_image(source)
            assert "\n" not in str(error.value), what
    with pytest.raises(UserError, match="nothing is fetched"):
        open_image("https://example.com/cat.png")
    with pytest.raises(UserError, match=r"there is no image .*cat\.png"):
        open_image(tmp_path / "cat.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)
    monkeypatch.setattr(images, "MAX_PIXELS", 3599)
    with pytest.raises(UserError, match="60 x 60 pixels; at most 3,599"):
        open_image(whole)
