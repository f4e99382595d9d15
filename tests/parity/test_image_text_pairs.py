"""Invariants 2, 3 and 8 for CLIP and SigLIP, and their losses: equal to transformers', in both directions."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeing import VISION, pixels, randomize, reread, same, same_config, there_and_back

from zero2hero.errors import UserError
from zero2hero.model_configs import CLIP_TOWER, SIGLIP_TOWER, text_tower
from zero2hero.models import (
    VisionConfig,
    VisionText,
    VisionTextConfig,
    from_pretrained,
    init_weights,
    save_pretrained,
)
from zero2hero.train.objectives import sigmoid_contrastive, softmax_contrastive

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 20,
}  # fmt: skip
PAIRS = {
    "CLIP": ({"eos_token_id": 59}, {}, {"projection_dim": 16}),
    "CLIP, as first published": ({"eos_token_id": 2}, {}, {"projection_dim": 16}),
    "CLIP, gelu": ({"eos_token_id": 59, "hidden_act": "gelu"}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {}),
    "Siglip": ({"projection_size": 32}, {}, {}),
    "Siglip, one width": ({"hidden_size": 32, "hidden_act": "gelu"}, {"layer_norm_eps": 1e-3}, {}),
}


def pair_model(name: str):
    text, vision, whole = PAIRS[name]
    kind = name.split(",")[0]
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT | text, vision_config=VISION | vision, **whole)
    model = randomize(getattr(transformers, f"{kind}Model")(config))
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    return there_and_back(pair_model(request.param), tmp_path_factory.mktemp("pair"))


def texts(model: VisionText, count: int = 4) -> torch.Tensor:
    """Texts of unequal length, padded; an end token closes each, and may stand behind it again."""
    generator = torch.Generator().manual_seed(2)
    end = model.config.text_config.eos_token_id if model.softmax else 57
    end = 60 if end == 2 else end
    rows = [[*torch.randint(3, 58, (n,), generator=generator).tolist(), end] for n in (5, 12, 9, 17)[:count]]
    return model.pad([[*rows[0], end, end], *rows[1:]])


def test_pairs_answer_in_both_directions(pair):
    theirs, ours, theirs_folder, ours_folder = pair
    ids, x = texts(ours), pixels(ours.config.vision_config)
    for model in (theirs, reread(theirs, ours_folder)):
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=x)
            vectors = ours(ids, x)
            same(vectors[0], out.text_embeds)
            same(vectors[1], out.image_embeds)
            same(ours.logits(*vectors), out.logits_per_image)
            want = out.logits_per_image.softmax(-1) if ours.softmax else out.logits_per_image.sigmoid()
            assert (ours.scores(ids, x) - want).abs().max() < 1e-4
            same(ours.vision_model(x[:1]) if not ours.softmax else ours.vision_model.states(x[:1], [-1])[0],
                 model.vision_model(x[:1]).last_hidden_state)  # fmt: skip
            same(ours.text_model(ids), model.text_model(ids).last_hidden_state)
    same_config(theirs_folder, ours_folder)
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs_folder, ours_folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_contrastive_losses_are_the_references(pair):
    theirs, ours, *_ = pair
    batch = SimpleNamespace(ids_BT=texts(ours, 3), pixels_BCHW=pixels(ours.config.vision_config))
    objective = softmax_contrastive if ours.softmax else sigmoid_contrastive
    loss = objective(ours, batch)
    want = theirs(input_ids=batch.ids_BT, pixel_values=batch.pixels_BCHW, return_loss=True).loss
    assert torch.allclose(loss.sum / loss.weight, want, atol=1e-4)
    (loss.sum / loss.weight).backward()
    want.backward()
    got, expected = (m.text_model.get_submodule(n).weight.grad for m, n in (
        (ours, "embed_tokens"), (theirs, "embeddings.token_embedding")))  # fmt: skip
    assert torch.allclose(got, expected, atol=1e-4)
    assert torch.allclose(ours.logit_scale.grad, theirs.logit_scale.grad, atol=1e-4)
    ours.zero_grad()


def test_a_text_padded_in_a_batch_equals_the_text_alone(pair):
    _, ours, *_ = pair
    ids = texts(ours)
    end = (ids[0] == ids[0, 5]).nonzero()[0].item() + 1
    alone = ours.pad([ids[0, :end].tolist()])
    with torch.no_grad():
        if ours.softmax:
            assert alone.shape[1] == 6 < ids.shape[1]
            assert (ours.text_features(ids)[:1] - ours.text_features(alone)).abs().max() < 1e-5
        else:
            assert ids.shape[1] == alone.shape[1] == 20
        assert (ours.text_features(ids) - torch.cat([ours.text_features(row[None]) for row in ids])).abs().max() < 1e-5
    with pytest.raises(UserError, match="21 tokens; the model reads 20"):
        ours.pad([[3] * 21])


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_pair_made_here_opens_there_and_learns(loss, tmp_path):
    tower = CLIP_TOWER if loss == "softmax" else SIGLIP_TOWER
    vision = VisionConfig(**VISION, **tower)
    ours = VisionText(VisionTextConfig(text_tower(**TEXT, eos_token_id=59, pad_token_id=1), vision, loss, 32))
    init_weights(ours, 1)
    assert ours.logit_scale.exp().item() == pytest.approx(1 / 0.07 if loss == "softmax" else 10)
    if loss == "sigmoid":
        assert ours.logit_bias.item() == -10
    batch = SimpleNamespace(ids_BT=texts(ours, 3), pixels_BCHW=pixels(vision))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    losses = []
    for _ in range(50):
        result = (softmax_contrastive if loss == "softmax" else sigmoid_contrastive)(ours, batch)
        optimizer.zero_grad()
        (result.sum / result.weight).backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters())
        optimizer.step()
        losses.append(result.sum.item())
    assert losses[-1] < losses[0] / 4
    save_pretrained(ours.eval(), tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        out = theirs(input_ids=batch.ids_BT, pixel_values=batch.pixels_BCHW)
        same(ours.logits(*ours(batch.ids_BT, batch.pixels_BCHW)), out.logits_per_image)


def test_files_of_clip_as_on_the_hub(tmp_path):
    """openai/clip-vit-base-patch32: numbered positions, nulls; laion's: the configurations given twice."""
    theirs = pair_model("CLIP")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"text_config_dict": config["text_config"] | {"architectures": None}, "vision_config_dict": None}
    config["text_config"] = {"hidden_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = from_pretrained(tmp_path)
    ids, x = texts(ours), pixels(ours.config.vision_config)
    with torch.no_grad():
        same(ours.logits(*ours(ids, x)), theirs(input_ids=ids, pixel_values=x).logits_per_image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {**TEXT, "model_type": "clip_txt_model"}}, "Did you mean 'clip_text_model'"),
        ({"text_config": 3}, "text_config should be an object"),
        ({"text_config": {**TEXT, "hidden_act": "mish"}}, "hidden_act"),
        ({"text_config": {**TEXT, "eos_token_id": [1, 2]}}, "eos_token_id"),
        ({"vision_config": {**VISION, "num_hidden_layers": 3}}, "missing for clip: vision_model.encoder.layers.2"),
        ({"projection_dim": 8}, r"projection.weight has shape \[16"),
    ],
)
def test_what_does_not_fit_in_a_part_is_named(change, message, tmp_path):
    pair_model("CLIP").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path)
