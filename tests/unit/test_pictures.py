"""Images from the disk: each layout, what is held out, and one clear error for each fault."""

from __future__ import annotations

import gzip
import json
import zipfile

import numpy as np
import pytest

from zero2hero.data.augment import augment
from zero2hero.data.pictures import Pictures, fingerprint, open_pictures
from zero2hero.data.worlds.raster import png
from zero2hero.errors import UserError
from zero2hero.model_configs import AugmentConfig
from zero2hero.task_configs import ImageClassificationConfig
from zero2hero.train.image_classification import label_names
from zero2hero.train.image_tasks import Pixels, processor_for

pytest.importorskip("PIL")
torch = pytest.importorskip("torch")


def picture(value: int, side: int = 8) -> bytes:
    return png(np.full((side, side, 3), value, np.uint8))


@pytest.fixture
def classes(tmp_path):
    """Five images of cats and five of dogs."""
    for i in range(10):
        file = tmp_path / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(20 * i))
    return tmp_path / "pets"


def test_a_folder_for_each_label(classes):
    train, held = open_pictures(str(classes), validation_fraction=0.3, seed=1)
    assert (len(train), len(held)) == (7, 3)
    assert {row["label"] for row in train.rows + held.rows} == {"cat", "dog"}
    again, _ = open_pictures(str(classes), validation_fraction=0.3, seed=1)
    assert [row["image"] for row in again.rows] == [row["image"] for row in train.rows]
    pictures, table = Pictures.read(train, processor_for(8, 3))
    for row, number in zip(table.rows, pictures.of_record):
        assert (pictures.pixels[number] == 20 * int(row["image"].stem)).all()


def test_what_the_model_reads_is_what_its_processor_makes(classes):
    train, _ = open_pictures(str(classes))
    for processor in (processor_for(8, 3), processor_for(5, 1), processor_for(12, 3, "CLIP", resample=3)):
        pictures, table = Pictures.read(train, processor)
        expected = processor([row["image"] for row in table.rows])
        assert torch.allclose(Pixels(pictures, processor)(range(len(table))), expected, atol=1e-6)


def test_easy_vqa_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "vqa.zip", "w") as archive:
        for split, count in (("train", 3), ("test", 2)):
            rows = [[f"is it {i}?", "yes", i] for i in range(count)] + [["again?", "no", 0]]
            archive.writestr(f"vqa/data/{split}/questions.json", json.dumps(rows))
            for i in range(count):
                archive.writestr(f"vqa/data/{split}/images/{i}.png", picture(i))
    train, held = open_pictures(str(tmp_path / "vqa.zip"))
    assert (len(train), len(held)) == (4, 3)
    assert train.rows[0] | {"image": None} == {"question": "is it 0?", "answer": "yes", "image": None}
    pictures, table = Pictures.read(train, processor_for(8, 3))
    assert len(pictures.pixels) == 3  # one of them is asked about twice
    assert pictures.of_record.tolist() == [0, 1, 2, 0]


def test_a_table_names_its_images_and_holds_out_whole_ones(tmp_path):
    rows = [{"file_name": f"{i % 4}.png", "text": f"picture {i}"} for i in range(12)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    train, held = open_pictures(str(tmp_path / "captions.jsonl"), validation_fraction=0.25)
    assert (len(train), len(held)) == (9, 3)
    assert not {row["image"] for row in train.rows} & {row["image"] for row in held.rows}


def write_mnist(folder, images, labels):
    head = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    head = bytes([0, 0, 8, 1]) + np.array(labels.shape, ">u4").tobytes()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels.tobytes()))


def test_mnist(tmp_path):
    images, labels = np.arange(90, dtype=np.uint8).reshape(10, 3, 3), np.arange(10, dtype=np.uint8)
    write_mnist(tmp_path, images, labels)
    train, held = open_pictures(str(tmp_path), validation_fraction=0.2)
    assert len(held) == 2
    for row in train.rows + held.rows:
        assert np.array_equal(row["image"], images[int(row["label"])])
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"labels are missing.*t10k-labels-idx1-ubyte.gz"):
        open_pictures(str(tmp_path))
    write_mnist(tmp_path, images, labels[:5])
    with pytest.raises(UserError, match=r"10 images.*5 labels"):
        open_pictures(str(tmp_path))
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte.gz is no whole idx file"):
        open_pictures(str(tmp_path))


def test_faults(classes, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        open_pictures(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file: nowhere"):
        open_pictures("nowhere")
    bad = classes / "cat" / "1.png"
    bad.write_bytes(picture(3)[:40])
    train, _ = open_pictures(str(classes), validation_fraction=0.1, seed=2)
    with pytest.raises(UserError, match=r"cat/1\.png cannot be read"):
        Pictures.read(train, processor_for(8, 3))
    pictures, table = Pictures.read(train, processor_for(8, 3), "skip")
    assert len(table) == len(pictures.of_record) == len(train) - 1
    one = train.part(i for i, row in enumerate(train.rows) if row["label"] == "cat")
    with pytest.raises(UserError, match="every label is 'cat'"):
        label_names(one, "label")
    (tmp_path / "t.jsonl").write_text('{"picture": "1.png", "label": 3}')
    with pytest.raises(UserError, match=r"t\.jsonl, line 1: no image.*--image_column; columns: picture, label"):
        open_pictures(str(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl").write_text('{"image": "absent.png", "label": 3}')
    with pytest.raises(UserError, match=r"there is no image .*absent\.png"):
        Pictures.read(open_pictures(str(tmp_path / "t.jsonl"), str(classes))[0], processor_for(8, 3))
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"broken\.zip cannot be unpacked"):
        open_pictures(str(tmp_path / "broken.zip"))


def test_a_changed_pixel_is_other_data(classes):
    def print_of():
        table, _ = open_pictures(str(classes), seed=1)
        return fingerprint(table, Pictures.read(table, processor_for(8, 3))[0])

    before = print_of()
    assert before == print_of()
    table, _ = open_pictures(str(classes), seed=1)
    table.rows[0]["image"].write_bytes(picture(77))
    assert print_of() != before


def test_augmentation():
    dot = torch.zeros(64, 1, 9, 9)
    dot[:, 0, 4, 4] = 1.0
    assert torch.equal(augment(dot, AugmentConfig(), 0), dot)
    turned = augment(dot, AugmentConfig(rotation=180), 3)  # about the centre: the dot stays
    assert (turned[:, 0, 4, 4] > 0.99).all()
    moved = augment(dot, AugmentConfig(shift=1 / 3), 3)
    places = moved.flatten(1).argmax(1)
    rows, columns = places // 9, places % 9
    assert rows.min() == columns.min() == 1
    assert rows.max() == columns.max() == 7
    assert torch.equal(moved, augment(dot, AugmentConfig(shift=1 / 3), 3))
    assert not torch.equal(moved, augment(dot, AugmentConfig(shift=1 / 3), 4))
    halves = [augment(dot[i : i + 32], AugmentConfig(shift=1 / 3), 3, i) for i in (0, 32)]
    assert torch.equal(moved, torch.cat(halves))  # however a step is cut
    side = torch.zeros(200, 1, 9, 9)
    side[:, 0, :, 0] = 1.0
    mirrored = augment(side, AugmentConfig(flip=True), 0)[:, 0, 4, 8] > 0.5
    assert 70 < int(mirrored.sum()) < 130
    blotted = (augment(torch.ones(200, 1, 20, 20), AugmentConfig(erasing=0.5), 0) == 0).float().mean((1, 2, 3))
    assert 70 < int((blotted > 0).sum()) < 130
    assert blotted.max() < 0.36


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="shift must be below 1"):
        AugmentConfig(shift=1.0)
    with pytest.raises(UserError, match="Did you mean 'mlp'"):
        ImageClassificationConfig(architecture="mpl")
