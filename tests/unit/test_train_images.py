"""Models of images, trained by their verbs: they learn, resume bit for bit, and open in pipelines and elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import zero2hero as z2h
from zero2hero.cli import main
from zero2hero.config import DecoderConfig, TokenizerConfig, TrainConfig
from zero2hero.data.worlds import world
from zero2hero.data.worlds.raster import png
from zero2hero.errors import UserError
from zero2hero.model_configs import (
    CLIP_TOWER,
    MLPConfig,
    VisionConfig,
    VisionLanguageConfig,
    VisionTextConfig,
    text_tower,
)
from zero2hero.models import MLP, from_pretrained, init_mlp, save_pretrained
from zero2hero.models.vision_language import VisionLanguage
from zero2hero.task_configs import ImageClassificationConfig, ImageTextConfig, ZeroShotImageConfig
from zero2hero.train import image_classification, image_text_to_text, zero_shot_image_classification
from zero2hero.train.objectives import vision_language_lm
from zero2hero.tune import LoraConfig

pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = TrainConfig(max_steps=240, per_device_train_batch_size=32, learning_rate=1e-2, eval_steps=120)
RUN = {"precision": "fp32", "report_to": []}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def last(folder, name: str) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row][-1]


def files_of(name: str, count: int, folder, split: str = "validation"):
    """(paths, records) of a world's pictures."""
    records = [world(name).record(i, split) for i in range(count)]
    for i, record in enumerate(records):
        (folder / f"{i}.png").write_bytes(png(record["image"]))
    return [str(folder / f"{i}.png") for i in range(count)], records


def digits(architecture: str, folder, **changes) -> ImageClassificationConfig:
    vit = VisionConfig(patch_size=7, **TINY)
    return ImageClassificationConfig(
        data="digits:640", architecture=architecture, model=vit, mlp=MLPConfig([48]), train=TRAIN,
        output_dir=str(folder), **RUN, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["mlp", "vit"])
def test_image_classification(tmp_path, architecture):
    config = digits(architecture, tmp_path / "run")
    image_classification.train(config)
    found, guess = last(tmp_path / "run", "eval_accuracy"), 0.1
    assert found > 3 * guess
    paths, records = files_of("digits", 64, tmp_path)
    labels = [best[0]["label"] for best in z2h.pipeline("image-classification", tmp_path / "run")(paths)]
    assert sum(a == r["label"] for a, r in zip(labels, records)) / 64 == pytest.approx(found, abs=1e-6)
    shown = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert sum(map(sum, shown["confusion"])) == 64
    assert sum(shown["confusion"][i][i] for i in range(10)) == round(64 * found)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out accuracy" in page
    assert page.count('class="seen') == 36
    assert 'class="confusion"' in page
    if architecture == "vit":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.pipeline("image-classification", model=str(tmp_path / "run"), device="cpu")
        assert [best[0]["label"] for best in theirs(paths[:16])] == labels[:16]


def test_going_on_from_a_model_with_other_labels(tmp_path):
    image_classification.train(digits("vit", tmp_path / "base"))
    config = ImageClassificationConfig(
        data="shapes:200", base_model=str(tmp_path / "base"), output_dir=str(tmp_path / "shapes"),
        train=dataclasses.replace(TRAIN, learning_rate=0.0, max_steps=1), **RUN,
    )  # fmt: skip
    image_classification.train(config)
    before, after = from_pretrained(tmp_path / "base"), from_pretrained(tmp_path / "shapes")
    assert sorted(after.config.id2label.values()) == ["circle", "cross", "ring", "square", "triangle"]
    assert torch.equal(before.layers[0].mlp.up_proj.weight, after.layers[0].mlp.up_proj.weight)
    assert after.classifier.weight.shape == (5, 32)
    with pytest.raises(UserError, match="is a VisionTransformer; this task needs a model of images and texts"):
        zero_shot_image_classification.train(
            ZeroShotImageConfig(base_model=str(tmp_path / "base"), output_dir=str(tmp_path / "x"), **RUN)
        )


def test_an_adapter_learns_beside_a_base(tmp_path):
    image_classification.train(digits("vit", tmp_path / "base"))
    config = ImageClassificationConfig(
        data="shapes:200", base_model=str(tmp_path / "base"), output_dir=str(tmp_path / "shapes"), method="lora",
        lora=LoraConfig(r=2), train=dataclasses.replace(TRAIN, max_steps=3), **RUN,
    )  # fmt: skip
    image_classification.train(config)
    before, after = from_pretrained(tmp_path / "base"), from_pretrained(tmp_path / "shapes")
    update = after.layers[0].mlp.up_proj.weight - before.layers[0].mlp.up_proj.weight
    assert 1 <= torch.linalg.matrix_rank(update, tol=1e-5) <= 2
    assert torch.equal(before.embed_positions.weight, after.embed_positions.weight)
    assert z2h.pipeline("image-classification", tmp_path / "shapes").parts.model.classifier.weight.shape == (5, 32)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    train = dataclasses.replace(TRAIN, max_steps=6, eval_steps=3, save_steps=3)
    augmented = dataclasses.replace(digits("mlp", tmp_path / "whole"), train=train)
    augmented = dataclasses.replace(augmented, augment=dataclasses.replace(augmented.augment, shift=0.1, erasing=0.3))
    image_classification.train(augmented)
    again = dataclasses.replace(augmented, output_dir=str(tmp_path / "parts"))
    image_classification.train(again)
    newest = tmp_path / "parts" / "checkpoints" / "step-000006"
    for file in newest.rglob("*"):
        if file.is_file():
            file.unlink()
    image_classification.train(dataclasses.replace(again, resume=True))
    one, other = from_pretrained(tmp_path / "whole"), from_pretrained(tmp_path / "parts")
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_zero_shot_image_classification(tmp_path, loss):
    text = text_tower(max_position_embeddings=16, **TINY)
    model = VisionTextConfig(text, VisionConfig(image_size=32, patch_size=8, **TINY, **CLIP_TOWER), loss, 32)
    config = ZeroShotImageConfig(
        data="shapes:640", model=model, output_dir=str(tmp_path / "run"), **RUN,
        train=dataclasses.replace(TRAIN, max_steps=400),
    )  # fmt: skip
    zero_shot_image_classification.train(config)
    assert last(tmp_path / "run", "eval_batch_accuracy") > 3 / 32
    paths, _ = files_of("shapes", 4, tmp_path)
    names = {"candidate_labels": ["red circle", "white square"], "hypothesis_template": "a large {} on the left"}
    ours = z2h.pipeline("zero-shot-image-classification", tmp_path / "run")(paths, **names)
    assert len(ours) == 4
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "run").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    texts = [names["hypothesis_template"].format(name) for name in names["candidate_labels"]]
    padding = {"padding": "max_length", "max_length": 16} if loss == "sigmoid" else {"padding": True}
    ids = tokenizer(texts, return_tensors="pt", **padding)["input_ids"]
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run")(
        [transformers.image_utils.load_image(path) for path in paths], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        logits = theirs(input_ids=ids, pixel_values=pixels).logits_per_image
    scores = logits.softmax(-1) if loss == "softmax" else logits.sigmoid()
    for row, expected in zip(ours, scores.tolist()):
        assert {one["label"]: one["score"] for one in row} == pytest.approx(
            dict(zip(names["candidate_labels"], expected)), abs=1e-3
        )


def test_image_text_to_text_in_stages(tmp_path):
    config = ImageTextConfig(
        data="scenes:640", output_dir=str(tmp_path / "run"), **RUN, tokenizer=TokenizerConfig(vocab_size=400),
        vision=VisionConfig(image_size=32, patch_size=8, **TINY, **CLIP_TOWER),
        model=DecoderConfig(max_position_embeddings=64, **TINY),
        train=dataclasses.replace(TRAIN, max_steps=400),
    )  # fmt: skip
    image_text_to_text.train(config)
    found = last(tmp_path / "run", "eval_accuracy")
    assert found > 0.15
    # what counts as right is what the model writes
    paths, records = files_of("scenes", 64, tmp_path)
    asked = [{"image": path, "question": record["question"]} for path, record in zip(paths, records)]
    ours = [
        one[0]["answer"] for one in z2h.pipeline("visual-question-answering", tmp_path / "run")(asked, max_new_tokens=5)
    ]
    assert sum(a == r["answer"] for a, r in zip(ours, records)) / 64 == pytest.approx(found, abs=0.02)
    stages = {"projector": {"projector"}, "projector_and_language_model": {"projector", "language_model"}}
    before = from_pretrained(tmp_path / "run")
    for trained, learning in stages.items():
        image_text_to_text.train(
            dataclasses.replace(
                config, base_model=str(tmp_path / "run"), trained=trained, output_dir=str(tmp_path / trained),
                train=dataclasses.replace(TRAIN, max_steps=2),
            )
        )  # fmt: skip
        after = from_pretrained(tmp_path / trained)
        changed = {
            name.split(".")[0]
            for (name, old), new in zip(before.named_parameters(), after.parameters())
            if not torch.equal(old, new)
        }
        assert changed == learning
    image_text_to_text.train(
        dataclasses.replace(
            config, base_model=str(tmp_path / "run"), trained="projector_and_language_model", method="lora",
            output_dir=str(tmp_path / "lora"), train=dataclasses.replace(TRAIN, max_steps=2),
        )
    )  # fmt: skip
    after = from_pretrained(tmp_path / "lora")
    changed = {n for (n, old), new in zip(before.named_parameters(), after.parameters()) if not torch.equal(old, new)}
    assert {name.split(".")[0] for name in changed} == {"projector", "language_model"}
    assert not any("embed" in name or "norm" in name for name in changed)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "run")
    image = transformers.image_utils.load_image(paths[0])
    inputs = processor(images=image, text=f"<image>\n{records[0]['question']}\n", return_tensors="pt")
    written = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(written, skip_special_tokens=True).strip() == ours[0]


def test_questions_that_share_an_image_learn_what_they_do_alone():
    """Loss and gradients are equal, though the image is read once; none sees another question."""
    text = DecoderConfig(vocab_size=50, **TINY)
    vision = VisionConfig(image_size=16, patch_size=8, **TINY, **CLIP_TOWER)
    model = VisionLanguage(VisionLanguageConfig(text, vision, image_token_index=5, vision_feature_layer=-1))
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)

    def example():
        ids = np.concatenate([model.expand([1, 5]), rng.integers(6, 50, rng.integers(3, 8))])
        return ids, np.where(np.arange(len(ids)) < len(ids) - 2, -100, rng.integers(6, 50, len(ids)))

    rows = [[example() for _ in range(count)] for count in (3, 1, 2)]
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    alone = [[one] for row in rows for one in row], pixels[[0, 0, 0, 1, 2, 2]]
    found = []
    for some, images in ((rows, pixels), alone):
        model.zero_grad()
        loss = vision_language_lm(model, image_text_to_text._batch(some, images, 0, 5).to("cpu"))
        loss.sum.backward()
        found.append([loss.sum.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for shared, single in zip(*found, strict=True):
        torch.testing.assert_close(shared, single, atol=1e-5, rtol=1e-4)


def test_an_epoch_has_every_question_once_beside_others_of_its_image():
    image_of = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 7))
    config = ImageTextConfig(questions_per_row=4, train=dataclasses.replace(TRAIN, per_device_train_batch_size=4))
    rows = image_text_to_text.Rows(image_of, [(np.zeros(5), np.zeros(5))] * 56, config, together=1)
    epochs = [[row for batch in range(4) for row in rows[4 * epoch + batch]] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(record for row in epoch for record in row) == list(range(56))
        assert all(len({image_of[record] for record in row}) == 1 for row in epoch)
    assert epochs[0] != epochs[1]


def test_parts_of_other_models(tmp_path):
    """A LLaVA from a CLIP that was trained before and a language model: their weights are in it."""
    text = text_tower(max_position_embeddings=16, **TINY)
    vision = VisionConfig(image_size=32, patch_size=8, **TINY | {"num_hidden_layers": 2}, **CLIP_TOWER)
    few = dataclasses.replace(TRAIN, max_steps=2)
    zero_shot_image_classification.train(
        ZeroShotImageConfig(data="shapes:64", model=VisionTextConfig(text, vision, projection_dim=16), train=few,
                            output_dir=str(tmp_path / "clip"), **RUN)
    )  # fmt: skip
    image_text_to_text.train(
        ImageTextConfig(data="scenes:64", vision_model=str(tmp_path / "clip"), trained="projector", train=few,
                        model=DecoderConfig(**TINY), output_dir=str(tmp_path / "llava"), **RUN)
    )  # fmt: skip
    clip, llava = from_pretrained(tmp_path / "clip"), from_pretrained(tmp_path / "llava")
    assert llava.config.vision_feature_layer == -2
    for (name, a), b in zip(clip.vision_model.named_parameters(), llava.vision_tower.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_first_weights_keep_a_signal(tmp_path):
    """He et al. 2015: through ten layers of ReLUs the mean square stays about as it was."""
    for activation, bounds in {"relu": (0.3, 3.0), "tanh": (0.02, 1.0)}.items():
        model = MLP(MLPConfig([512] * 10, image_size=16, activation=activation))
        init_mlp(model, 1)
        pixels = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        assert bounds[0] < float(model(pixels).detach().square().mean()) < bounds[1]
    with torch.no_grad():
        for layer in model.layers:
            nn.init.normal_(layer.weight, std=0.1 * math.sqrt(1 / layer.in_features))
        assert model(pixels).square().mean() < 1e-6
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(pixels), model.eval()(pixels))
    with pytest.raises(UserError, match=r"images should be \[B, 1, 16, 16\]"):
        again(pixels[..., :8])


def test_the_verbs_say_what_is_wrong(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert (
        main(["train", "image-classification", "--data", str(tmp_path / "empty"), "--output_dir", str(tmp_path)]) == 2
    )
    assert "holds no image" in capsys.readouterr().err
    assert main(["train", "image-text-to-text", "--trained", "projecter"]) == 2
    assert "Did you mean 'projector'" in capsys.readouterr().err
    with pytest.raises(UserError, match="no column is called caption"):
        zero_shot_image_classification.train(
            ZeroShotImageConfig(data="digits:40", output_dir=str(tmp_path / "x"), **RUN)
        )
    with pytest.raises(UserError, match=r"have \d+ tokens; the model reads 8"):
        image_text_to_text.train(
            ImageTextConfig(data="scenes:40", output_dir=str(tmp_path / "y"), **RUN,
                            model=DecoderConfig(max_position_embeddings=8, **TINY))
        )  # fmt: skip
