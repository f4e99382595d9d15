"""Invariants 2, 3 and 8 for Idefics3 and SmolVLM: tiles, their words, the model and its files equal transformers'."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from seeing import padded, randomize, reread, same, same_config, there_and_back
from test_images import picture

from zero2hero.config import DecoderConfig
from zero2hero.data.tiles import TilingProcessor
from zero2hero.errors import UserError
from zero2hero.generate.decode import generate_tokens
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.models import Idefics3, Idefics3Config, VisionConfig, from_pretrained, init_weights, save_pretrained

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 4,
}  # fmt: skip
# name -> (kind, language model, image model, the whole)
CASES = {
    "Idefics3": ("Idefics3", {}, {}, {"scale_factor": 2}),
    "Idefics3, tied, gelu": (
        "Idefics3", {"tie_word_embeddings": True}, {"hidden_act": "gelu"},
        {"scale_factor": 3, "tie_word_embeddings": True},
    ),
    "SmolVLM": ("SmolVLM", {}, {}, {"scale_factor": 3}),
    "SmolVLM, edge of the image unseen": ("SmolVLM", {}, {"image_size": 26}, {"scale_factor": 2}),
}  # fmt: skip


def reference(name: str):
    kind, text, vision, whole = CASES[name]
    config = getattr(transformers, f"{kind}Config")(
        text_config=transformers.LlamaConfig(**LLAMA | text), vision_config=VISION | vision, image_token_id=60, **whole
    )
    model = randomize(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return there_and_back(reference(request.param), tmp_path_factory.mktemp("idefics3"))


def prompts(model: Idefics3) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts with one, no and two tiles, and the tiles."""
    side = model.config.vision_config.image_size
    tiles = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    return [model.expand(row) for row in ([3, 60, 7, 8], [9, 11, 5, 4, 6, 12], [60, 13, 60, 14, 2])], tiles


def there(model, rows: list[list[int]], tiles: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of transformers, which wants the tiles of each text, padded with tiles of zeros."""
    ids, mask = padded(rows)
    pixels, pixel_mask = torch.zeros(3, 2, *tiles.shape[1:]), torch.zeros(3, 2, *tiles.shape[2:], dtype=torch.bool)
    pixels[0, 0], pixels[2] = tiles[0], tiles[1:]
    pixel_mask[0, 0], pixel_mask[2] = (True, True) if seen is None else (seen[0], seen[1:])
    with torch.no_grad():
        said = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, pixel_attention_mask=pixel_mask)
    return said.logits[mask == 1]


def test_logits_and_files_in_both_directions(case):
    theirs, ours, theirs_folder, ours_folder = case
    rows, tiles = prompts(ours)
    ids, mask = padded(rows)
    with torch.no_grad():
        got = ours.logits(ours(ids, tiles))[mask == 1]
        alone = [
            ours.logits(ours(torch.tensor([row]), some))[0] for row, some in zip(rows, (tiles[:1], None, tiles[1:]))
        ]
    assert (got - torch.cat(alone)).abs().max() < 1e-5
    for model in (theirs, reread(theirs, ours_folder)):
        same(got, there(model, rows, tiles))
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs_folder, ours_folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    same_config(theirs_folder, ours_folder)


def test_tiles_with_padding_and_of_other_sizes(case):
    """What the mask leaves of a tile is read as an image of its own: its places are spread over the whole table."""
    theirs, ours, *_ = case
    rows, tiles = prompts(ours)
    ids, mask = padded(rows)
    seen = torch.zeros(3, *tiles.shape[2:], dtype=torch.bool)
    for tile, (height, width) in zip(seen, ((24, 24), (9, 24), (13, 5))):
        tile[:height, :width] = True
    with torch.no_grad():
        vectors = ours.merge(ids, ours.image_features(tiles, seen))
        same(ours.logits(ours.language_model(vectors))[mask == 1], there(theirs, rows, tiles, seen))
        small = tiles[:, :, :12, :20]
        same(ours.vision_tower(small), theirs.model.vision_model(small).last_hidden_state)
        seen = torch.zeros(3, *tiles.shape[2:], dtype=torch.bool)
        seen[:, :12, :20] = True
        within = ours.vision_tower(tiles, seen).unflatten(1, (6, 6))[:, :3, :5].flatten(1, 2)
        assert (within - ours.vision_tower(small)).abs().max() < 1e-5
    with pytest.raises(UserError, match="not a square of squares"):
        ours.image_features(tiles[:, :, :9])


def test_generation_equals_the_references(case):
    theirs, ours, *_ = case
    rows, tiles = prompts(ours)
    found: list[list[int]] = [[] for _ in rows]
    settings = SamplingConfig(max_new_tokens=8, temperature=0.0)
    for token in generate_tokens(ours.language_model, rows, settings, embeddings=ours.embed_prompts(rows, tiles)):
        found[token.row].append(token.id)
    for row, some, text in zip(rows, (tiles[:1], None, tiles[1:]), found):
        want = theirs.generate(
            input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
            **({} if some is None else {"pixel_values": some[None]}),
        )  # fmt: skip
        assert text == want[0, len(row) :].tolist()


def test_a_model_made_here_opens_there(tmp_path):
    vision = VisionConfig(**VISION, task="none", class_token=False, feedforward="gelu_new", norm_eps=1e-6)
    ours = Idefics3(Idefics3Config(DecoderConfig(**LLAMA), vision, image_token_index=60)).eval()
    init_weights(ours, 1)
    randomize(ours)
    save_pretrained(ours, tmp_path)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "Idefics3ForConditionalGeneration"
    rows, tiles = prompts(ours)
    ids, mask = padded(rows)
    with torch.no_grad():
        same(ours.logits(ours(ids, tiles))[mask == 1], there(theirs, rows, tiles))


def test_files_as_on_the_hub(tmp_path):
    """SmolVLM-256M and its kin: a head's name in the nested configuration, the whole's name for the image model."""
    theirs = reference("Idefics3")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"architectures": ["VLlama3ForCausalLM"], "pixel_shuffle_factor": 2}
    config["vision_config"] |= {"model_type": "idefics3", "max_image_size": {"longest_edge": 24}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = from_pretrained(tmp_path)
    rows, tiles = prompts(ours)
    ids, mask = padded(rows)
    with torch.no_grad():
        same(ours.logits(ours(ids, tiles))[mask == 1], there(theirs, rows, tiles))
    save_pretrained(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vision_config"]["model_type"] == "idefics3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_factor": 4}, "6 patches across an image are not a multiple of scale_factor 4"),
        ({"scale_factor": 0}, "scale_factor"),
        ({"scale_factor": 3}, r"modality_projection.proj.weight has shape \[32, 96\].*\[32, 216\]"),
        ({"image_token_id": 61}, "image_token_index 61"),
        ({"vision_config": {**VISION, "model_type": "idefics2"}}, "'idefics2' is not one"),
        ({"vision_config": {**VISION, "num_hidden_layers": 3}}, r"missing for idefics3: model\.vision_model"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    reference("Idefics3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path)


# ---------------------------------------------------------------- tiles

SIZES = ((47, 33), (33, 47), (24, 24), (300, 20), (7, 90), (1, 1), (64, 63))
PROCESSORS = {
    "Idefics3ImageProcessor, three tiles across": {"size": {"longest_edge": 70}},
    "Idefics3ImageProcessor, one tile": {"size": {"longest_edge": 24}, "resample": 3},
    "Idefics3ImageProcessor, no tiles": {"do_image_splitting": False, "size": {"longest_edge": 60}},
    "Idefics3ImageProcessor, as large as it is": {"do_resize": False, "image_mean": [0.1, 0.2, 0.3]},
    "SmolVLMImageProcessor, very large": {"size": {"longest_edge": 5000}, "max_image_size": {"longest_edge": 1100}},
    "SmolVLMImageProcessor, bilinear": {"size": {"longest_edge": 70}, "resample": 2},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_tiles_are_the_references(case, tmp_path):
    settings = {"max_image_size": {"longest_edge": 24}} | PROCESSORS[case]
    theirs = getattr(transformers, f"{case.split(',')[0]}Pil")(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = TilingProcessor.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert TilingProcessor.from_pretrained(tmp_path / "ours") == ours
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    for size in SIZES[3:4] if "very large" in case else SIZES:
        image = picture(*size)
        got = ours([image])
        for processor in (theirs, again):
            want = processor(images=image, return_tensors="pt", return_row_col_info=True)
            assert ours.grid(*size) == (want["rows"][0][0], want["cols"][0][0])
            assert got.shape == want["pixel_values"][0].shape
            assert (got - want["pixel_values"][0]).abs().max() < 1e-5
    if "very large" not in case:
        pair = picture(47, 33), picture(24, 24)
        assert torch.equal(ours(pair), torch.cat([ours([image]) for image in pair]))


def test_words_of_tiles():
    ours = TilingProcessor(size={"longest_edge": 48}, max_image_size={"longest_edge": 24})
    border = "<fake_token_around_image>"
    whole = f"{border}<global-img><image>{border}"
    assert ours.in_text(picture(48, 20), "<image>") == (
        f"{border}<row_1_col_1><image>{border}<row_1_col_2><image>\n\n{whole}"
    )
    small = TilingProcessor(size={"longest_edge": 24}, max_image_size={"longest_edge": 24})
    assert small.in_text(picture(48, 20), "<image>") == whole
    with pytest.raises(UserError, match="max_image_size should give longest_edge, not"):
        TilingProcessor(size={"longest_edge": 48}, max_image_size={"height": 24})
