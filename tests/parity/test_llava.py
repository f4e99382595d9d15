"""Invariants 2, 3 and 8 for models that see and write: equal to transformers', in both directions."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeing import VISION, padded, pixels, randomize, reread, same, same_config, there_and_back

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.generate.decode import generate_tokens
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.model_configs import CLIP_TOWER
from zero2hero.models import (
    VisionConfig,
    VisionLanguage,
    VisionLanguageConfig,
    from_pretrained,
    init_weights,
    save_pretrained,
)
from zero2hero.train.objectives import vision_language_lm

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

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
    nothing = dict.fromkeys(("positions_BT", "document_ids_BT", "branch_ids_BT"))
    batch = SimpleNamespace(ids_BT=ids, targets_BT=targets, pixels_ICHW=x, **nothing)
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
