"""Invariants 2, 3 and 8 for models that see: every head equals transformers', in both directions."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.generate.decode import generate_tokens
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.model_configs import CLIP_TOWER, SIGLIP_TOWER, text_tower
from zero2hero.models import (
    VisionConfig,
    VisionLanguage,
    VisionLanguageConfig,
    VisionText,
    VisionTextConfig,
    VisionTransformer,
    from_pretrained,
    init_weights,
    save_pretrained,
)
from zero2hero.train.objectives import sigmoid_contrastive, softmax_contrastive, vision_language_lm

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
            for key in ("dtype", "_name_or_path", "head_dim"):  # null and its meaning are two spellings of one thing
                nested.pop(key, None)
    for key in ("text_config", "vision_config"):
        assert before.pop(key, None) == after.pop(key, None)
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


# ---------------------------------------------------------------- CLIP and SigLIP

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


# ---------------------------------------------------------------- LLaVA

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SEERS = {
    "clip, llama": ("clip_vision_model", "llama", {}, {}),
    "clip, llama, full, first layer, no bias": (
        "clip_vision_model", "llama", {},
        {"vision_feature_select_strategy": "full", "vision_feature_layer": 1, "multimodal_projector_bias": False},
    ),
    "clip, qwen2 tied, two layers": (
        "clip_vision_model", "qwen2", {"tie_word_embeddings": True},
        {"vision_feature_layer": [-1, 1], "projector_hidden_act": "relu"},
    ),
    "siglip, mistral": (
        "siglip_vision_model", "mistral", {"sliding_window": 6},
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
}  # fmt: skip


def seer_model(name: str):
    vision, text, text_settings, whole = SEERS[name]
    config = transformers.LlavaConfig(
        vision_config=transformers.AutoConfig.for_model(vision, **VISION),
        text_config=transformers.AutoConfig.for_model(text, **LLAMA | text_settings),
        image_token_index=60,
        image_seq_length=10 if name == "clip, llama, full, first layer, no bias" else 9,
        **whole,
    )
    model = randomize(transformers.LlavaForConditionalGeneration(config))
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=SEERS)
def seer(request, tmp_path_factory):
    return there_and_back(seer_model(request.param), tmp_path_factory.mktemp("seer"))


def prompts(model: VisionLanguage) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts with one, no and two images, and the images."""
    rows = [[3, 60, 7, 8], [9, 11, 5, 4, 6, 12], [60, 13, 60, 14, 2]]
    return [model.expand(row) for row in rows], pixels(model.config.vision_config)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()


def test_seers_answer_in_both_directions(seer):
    theirs, ours, theirs_folder, ours_folder = seer
    rows, x = prompts(ours)
    ids, mask = padded(rows)
    for model in (theirs, reread(theirs, ours_folder)):
        with torch.no_grad():
            want = model(input_ids=ids, pixel_values=x, attention_mask=mask).logits
            got = ours.logits(ours(ids, x))
            same(got[mask == 1], want[mask == 1])
            same(ours.logits(ours(ids[1:2])), model(input_ids=ids[1:2]).logits)
    same_config(theirs_folder, ours_folder)
    written = json.loads((ours_folder / "config.json").read_text())
    assert written["text_config"]["torch_dtype"] == written["vision_config"]["dtype"] == "float32"


def test_generation_with_images_equals_the_references(seer):
    """Cached decoding, in a batch and alone, equals transformers' and the full forward."""
    theirs, ours, *_ = seer
    rows, x = prompts(ours)
    images = [x[:1], None, x[1:]]
    settings = SamplingConfig(max_new_tokens=8, temperature=0.0)
    together: list[list[int]] = [[] for _ in rows]
    for token in generate_tokens(ours.language_model, rows, settings, embeddings=ours.embed_prompts(rows, x)):
        together[token.row].append(token.id)
    for row, some, found in zip(rows, images, together, strict=True):
        vectors = ours.embed_prompts([row], some)
        alone = [t.id for t in generate_tokens(ours.language_model, [row], settings, embeddings=vectors)]
        assert alone == found
        want = theirs.generate(
            input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
            **({} if some is None else {"pixel_values": some}),
        )  # fmt: skip
        assert found == want[0, len(row) :].tolist()
        with torch.no_grad():
            whole = torch.tensor([row + found[:-1]])
            vectors = torch.cat([vectors[0], ours.language_model.embed_tokens(whole[0, len(row) :])])[None]
            assert ours.logits(ours.language_model(vectors))[0, len(row) - 1 :].argmax(-1).tolist() == found


def test_the_other_spellings_of_llava(tmp_path):
    theirs = seer_model("clip, llama")
    theirs.save_pretrained(tmp_path)
    rows, x = prompts(from_pretrained(tmp_path))
    ids, mask = padded(rows)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=x, attention_mask=mask).logits[mask == 1]
    tensors = load_file(tmp_path / "model.safetensors")
    version_4 = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
    version_4["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    new = {f"model.{name}".replace("language_model.model.", "language_model."): t for name, t in version_4.items()}
    new["lm_head.weight"] = new.pop("model.language_model.lm_head.weight")
    for spelling in (version_4, new, theirs.state_dict()):
        save_file(dict(spelling), tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours = from_pretrained(tmp_path)
        with torch.no_grad():
            same(ours.logits(ours(ids, x))[mask == 1], want)


def test_what_trains_is_what_requires_a_gradient(seer):
    """First the projector, then the language model too; the image model stays as it is."""
    ours = copy.deepcopy(seer[1]).train()
    rows, x = prompts(ours)
    ids, mask = padded(rows)
    targets = ids.roll(-1, 1).masked_fill((ids.roll(-1, 1) == 60) | (mask.roll(-1, 1) == 0), -100)
    targets[:, -1] = -100
    batch = SimpleNamespace(ids_BT=ids, targets_BT=targets, positions_BT=None, document_ids_BT=None, pixels_ICHW=x)
    ours.requires_grad_(False)
    ours.projector.requires_grad_()
    for trained in (["projector"], ["projector", "language_model"]):
        for part in trained:
            getattr(ours, part).requires_grad_()
        loss = vision_language_lm(ours, batch)
        want = torch.nn.functional.cross_entropy(
            ours.logits(ours(ids, x)).flatten(0, 1), targets.flatten(), reduction="sum"
        )
        assert torch.allclose(loss.sum, want, rtol=1e-5)
        assert loss.weight == (targets != -100).sum()
        loss.sum.backward()
        for name, parameter in ours.named_parameters():
            if name.split(".")[0] in trained:
                assert parameter.grad.abs().sum() > 0, name
            else:
                assert parameter.grad is None, name
        ours.zero_grad()


def test_a_seer_made_here_opens_there(tmp_path):
    text = DecoderConfig(**LLAMA, qk_norm=True)
    ours = VisionLanguage(VisionLanguageConfig(text, VisionConfig(**VISION, **CLIP_TOWER), image_token_index=60)).eval()
    init_weights(ours, 1)
    randomize(ours)
    save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert theirs.config.text_config.model_type == "qwen3"
    rows, x = prompts(ours)
    ids, mask = padded(rows)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=x, attention_mask=mask).logits
        same(ours.logits(ours(ids, x))[mask == 1], want[mask == 1])


def test_image_tokens_and_images_that_do_not_fit(seer):
    _, ours, *_ = seer
    rows, x = prompts(ours)
    each = ours.config.num_image_tokens
    dropped = ours.config.vision_feature_select_strategy == "default"
    assert each == 9 + ours.config.vision_config.class_token - dropped
    for ids, images in ((rows[0][:-3], x[:1]), (rows[0], x[:2]), (rows[0], None), (rows[1], x[:1])):
        with pytest.raises(UserError, match=f"image tokens.*images of {each} need"):
            ours(torch.tensor([ids]), images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -4}, "vision_feature_layer -4 is not one of the image model's 2 layers"),
        ({"vision_feature_select_strategy": "all"}, "vision_feature_select_strategy"),
        ({"image_token_index": 61}, "image_token_index 61"),
        ({"projector_hidden_act": "mish"}, "projector_hidden_act"),
        ({"text_config": {**LLAMA, "model_type": "lama"}}, "Did you mean 'llama'"),
        ({"vision_config": {**VISION, "model_type": "pixtral"}}, "'pixtral' is not one"),
        ({"text_config": {**LLAMA, "model_type": "llama", "num_hidden_layers": 3}},
         r"missing for llava: language_model\.model\.layers\.2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_in_llava_is_named(change, message, tmp_path):
    seer_model("clip, llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path)
