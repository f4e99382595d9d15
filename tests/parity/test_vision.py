"""Invariants 2, 3 and 8 for models that see: every head equals transformers', in both directions."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from zero2hero.errors import UserError
from zero2hero.models import VisionConfig, VisionTransformer, from_pretrained, init_weights, save_pretrained

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

VISION = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
VIT = {
    "ViTForImageClassification": {},
    "ViTForImageClassification, three labels": {"id2label": {0: "cat", 1: "dog", 2: "owl"}},
    "ViTForImageClassification, relu, no bias": {"hidden_act": "relu", "qkv_bias": False, "layer_norm_eps": 1e-3},
    "ViTForImageClassification, grey, large patches": {"num_channels": 1, "image_size": 16, "patch_size": 8},
    "ViTModel": {},
}


def randomize(model, seed: int = 7):
    """Every weight of it random: biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    return model.eval()


def there_and_back(theirs, folder):
    """(their model, our model, folder with their file, folder with ours)."""
    theirs.save_pretrained(folder / "theirs")
    ours = from_pretrained(folder / "theirs")
    save_pretrained(ours, folder / "ours")
    return theirs, ours, folder / "theirs", folder / "ours"


def reread(theirs, folder):
    """Loaded by transformers, which must find every tensor and no other, byte for byte the same."""
    again, report = type(theirs).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return again.eval()


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert want.std() > 0.01, "a test of numbers that hardly differ proves nothing"
    assert (got - want).abs().max() < 1e-4


def same_config(theirs_folder, ours_folder, left_out=()) -> None:
    before, after = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (theirs_folder, ours_folder))
    for config in (before, after):
        for key in ("_name_or_path", "label2id", *left_out):
            config.pop(key, None)
        for nested in (config, config.get("text_config", {}), config.get("vision_config", {})):
            for key in ("dtype", "_name_or_path"):
                nested.pop(key, None)
    assert before == after


def pixels(config, count: int = 3) -> torch.Tensor:
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- ViT


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
        ({"image_size": 13}, "image_size 13 is not a multiple of patch_size 4"),
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
