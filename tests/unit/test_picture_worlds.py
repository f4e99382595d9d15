"""The worlds of pictures: what is said is what is to be seen, and what is held out was never shown."""

from __future__ import annotations

import io

import numpy as np
import pytest

from zero2hero.data.worlds import world
from zero2hero.data.worlds.digits import FONT
from zero2hero.data.worlds.raster import SHAPES, paint, png
from zero2hero.data.worlds.scenes import COLOURS, Scene, Scenes, Shapes, Thing

SCENE = Scene(
    (Thing("red", "circle", "large", 0, 0), Thing("blue", "cross", "small", 1, 2), Thing("red", "ring", "small", 2, 2)),
    seed=5, image_size=48,
)  # fmt: skip


def test_questions_have_the_answers_that_a_person_would_give():
    asked = {question.text: question.answer for question in SCENE.questions}
    assert asked["what colour is the circle?"] == "red"
    assert asked["what shape is the blue thing?"] == "cross"
    assert "what shape is the red thing?" not in asked  # there are two
    assert asked["how many things are there?"] == "three"
    assert asked.get("how many red things are there?", "two") == "two"
    assert SCENE.caption == "a large red circle left of a small blue cross above a small red ring"
    for text, answer in asked.items():
        if text.startswith("is there a "):
            named = text.removeprefix("is there a ").rstrip("?")
            assert answer == ("yes" if named in {"red circle", "blue cross", "red ring"} else "no")
        if " left or right of the " in text:
            assert answer == ("left" if text.startswith("is the red circle") else "right")


def test_every_answer_follows_from_the_things():
    """Counting and places checked against the scenes themselves."""
    kinds = set()
    for index in range(300):
        scene = Scenes(seed=1).scene(index)
        for question in scene.questions:
            words = question.text.rstrip("?").split()
            kinds.add(" ".join(words[:2]))
            if question.text.startswith("how many") and words[2] != "things":
                value = words[2].removesuffix("es") if words[2] == "crosses" else words[2].removesuffix("s")
                count = sum(value in (thing.colour, thing.shape) for thing in scene.things)
                assert question.answer == ("zero", "one", "two", "three")[count], question
    assert kinds == {"what shape", "what colour", "is there", "how many", "is the"}


def test_colours_are_where_the_scene_says():
    for index in range(30):
        scene = Shapes(seed=2).scene(index)
        thing, side = scene.things[0], scene.image_size
        saturation = np.ptp(scene.pixels.astype(int), axis=2) if thing.colour != "white" else scene.pixels.min(2)
        rows, columns = np.nonzero(saturation > 0.6 * saturation.max())
        assert int(rows.mean() * 3 / side) == thing.row
        assert int(columns.mean() * 3 / side) == thing.column
        mean = scene.pixels[rows, columns].mean(0) / 255
        nearest = min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
        assert nearest == thing.colour


def test_areas_of_shapes():
    known = {"circle": np.pi, "square": 1.7**2, "cross": 4 * 0.66 - 0.66**2 + 0.0, "ring": np.pi * (0.98**2 - 0.46**2)}
    for shape in SHAPES:
        canvas = np.zeros((64, 64, 3), np.float32)
        paint(canvas, shape, (1.0, 1.0, 1.0), 32, 32, 20)
        area = canvas[..., 0].sum() / 20**2
        if shape in known:
            assert area == pytest.approx(known[shape], rel=0.03), shape
        assert 0.5 < area < 4


@pytest.mark.parametrize("kind", [Scenes, Shapes])
def test_splits_share_no_combination(kind):
    made = kind(seed=3)
    both = [{made.combination(made.scene(i, split)) for i in range(400)} for split in ("train", "validation")]
    assert not both[0] & both[1]
    assert min(map(len, both)) > 20


@pytest.mark.parametrize("name", ["scenes", "shapes", "digits"])
def test_a_record_is_a_function_of_its_number(name):
    one, other = world(name, 4).record(7), world(name, 4).record(7)
    assert np.array_equal(one.pop("image"), other.pop("image"))
    assert one == other
    assert any(not np.array_equal(world(name, 4).record(i)["image"], world(name, 4).record(7)["image"]) for i in (8, 9))


def test_digits_differ_and_keep_inside():
    made = world("digits")
    records = [made.record(i) for i in range(200)]
    assert {record["label"] for record in records} == set(FONT)
    means = [np.mean([r["image"] for r in records if r["label"] == digit], 0) for digit in FONT]
    edges = np.mean([np.concatenate([r["image"][0], r["image"][-1], r["image"][:, 0]]).mean() for r in records])
    centre = np.mean([r["image"][7:21, 7:21].mean() for r in records])
    assert edges < 10 < 40 < centre
    right = sum(
        str(int(np.argmin([np.abs(record["image"] - mean).mean() for mean in means]))) == record["label"]
        for record in records
    )
    assert right > 100  # the nearest mean, a poor judge, tells most of them apart


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_is_read_back_by_pillow(shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(np.array(image.open(io.BytesIO(png(pixels)))), pixels)
