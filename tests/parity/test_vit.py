"""Invariants 2 and 8 for ViT: every head equals transformers', in both directions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from seeing import VISION, pixels, randomize, reread, same, same_config, there_and_back

from zero2hero.errors import UserError
from zero2hero.models import (
    VisionConfig,
    VisionTransformer,
    from_pretrained,
    init_weights,
    save_pretrained,
)

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {
    "ViTForImageClassification": {},
    "ViTForImageClassification, three labels": {"id2label": {0: "cat", 1: "dog", 2: "owl"}},
    "ViTForImageClassification, relu, no bias": {"hidden_act": "relu", "qkv_bias": False, "layer_norm_eps": 1e-3},
    "ViTForImageClassification, grey, large patches": {"num_channels": 1, "image_size": 16, "patch_size": 8},
    "ViTModel": {},
}


@pytest.fixture(scope="module", params=VIT)
def vit(request, tmp_path_factory):
    kind = getattr(transformers, request.param.split(",")[0])
    theirs = randomize(kind(transformers.ViTConfig(**VISION | VIT[request.param])))
    return there_and_back(theirs, tmp_path_factory.mktemp("vit"))


def test_vit_answers_in_both_directions(vit):
    theirs, ours, theirs_folder, ours_folder = vit
    x = pixels(ours.config)
    for model in (theirs, reread(theirs, ours_folder)):
        with torch.no_grad():
            out, hidden = model(x, output_hidden_states=True), ours(x)
            same(ours.logits(hidden), out.logits if "logits" in out else out.pooler_output)
            for got, want in zip(ours.states(x, [0, 1, 2]), out.hidden_states, strict=True):
                same(got, want)
            if "last_hidden_state" in out:
                same(hidden, out.last_hidden_state)
    same_config(theirs_folder, ours_folder)
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs_folder, ours_folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    kinds = {json.loads((folder / "config.json").read_text())["architectures"][0] for folder in vit[2:]}
    assert kinds == {type(theirs).__name__}


def test_a_batch_of_images_equals_each_image_alone(vit):
    _, ours, *_ = vit
    x = pixels(ours.config)
    with torch.no_grad():
        together, alone = ours(x), torch.cat([ours(x[i : i + 1]) for i in range(len(x))])
    assert (together - alone).abs().max() < 1e-5


def test_a_vit_made_here_opens_there(tmp_path):
    ours = VisionTransformer(VisionConfig(**VISION, id2label=dict(enumerate("abc")))).eval()
    init_weights(ours, 3)
    assert ours.embed_class.std() > 0
    randomize(ours)
    save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate("abc"))
    x = pixels(ours.config)
    with torch.no_grad():
        same(ours.logits(ours(x)), theirs(x).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["ViTForImageClasification"]}, "Did you mean 'ViTForImageClassification'"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "missing for vit: vit.encoder.layer.2"),
        ({"hidden_size": 64}, "shape"),
        ({"image_size": 16}, r"position_embeddings has shape \[1, 10, 32\].*\[1, 17, 32\]"),
        ({"image_size": 3}, "image_size 3 is smaller than patch_size 4"),
        ({"patch_size": "4"}, "wrong kind"),
        ({"id2label": {"0": "a", "2": "b"}}, "labels 0, 1, 2"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path)


def test_pixels_of_another_size_are_refused():
    model = VisionTransformer(VisionConfig(**VISION))
    with pytest.raises(UserError, match=r"\[B, 3, 12, 12\], not \[1, 3, 16, 12\]"):
        model(torch.zeros(1, 3, 16, 12))
