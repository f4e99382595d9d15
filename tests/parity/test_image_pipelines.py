"""Pipelines with images give what transformers' give for the same tiny model; see test_pipelines.py.

visual-question-answering is gone from version 5, so its answer is computed here from the reference's model.
"""

from __future__ import annotations

import itertools
import json

import pytest
from test_idefics3 import VISION as TILE_VISION
from test_images import picture
from test_pipelines import SENTENCES, SHAPE, compare, randomized, same

import zero2hero as z2h
from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.build import surround, train_bpe

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("one_thread")

VISION = SHAPE | {"image_size": 12, "patch_size": 4}
TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(16, 16), (20, 31), (40, 9)]
    for i, size in enumerate(sizes):
        picture(*size).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(len(sizes))]


def tokenizer(end: bool, *more: str) -> Tokenizer:
    """Byte-level, <s> before each text, and </s> behind it where asked for."""
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>"}
    raw = train_bpe(SENTENCES, 330, "gpt2", [*roles.values(), *more])
    raw.add_special_tokens([*roles.values(), *more])
    after = ["</s>"] if end else []
    surround(raw, ["<s>", "$A", *after], ["$B", *after])
    return Tokenizer(raw, roles | {"model_input_names": ["input_ids", "attention_mask"]})


# --- labels ---------------------------------------------------------------------------------------------------


def test_image_classification(tmp_path, files):
    config = transformers.ViTConfig(**SHAPE, image_size=16, patch_size=4, num_labels=7)
    randomized(transformers.ViTForImageClassification(config)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    settings = [{}, {"top_k": 1}, {"top_k": 99}, {"function_to_apply": "sigmoid"}]
    compare("image-classification", tmp_path, itertools.product([files[0], files[:1], files], settings))
    ours = z2h.pipeline(model=tmp_path, device="cpu")
    same(ours(Image.open(files[1])), ours(files[1]))
    with pytest.raises(UserError, match="an image: a file"):
        ours(3)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_zero_shot_image_classification(tmp_path, files, kind):
    words = tokenizer(end=True)
    text = SHAPE | {"vocab_size": words.vocab_size, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 3}
    whole = {"projection_dim": 16} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION, **whole)
    randomized(getattr(transformers, f"{kind}Model")(config), 0.1).save_pretrained(tmp_path)
    if kind == "Siglip":
        words.config["model_input_names"] = ["input_ids"]  # it reads padding too
    words.save_pretrained(tmp_path, model_max_length=64)
    size = {"height": 12, "width": 12}
    sizes = {"size": {"shortest_edge": 12}, "crop_size": size} if kind == "CLIP" else {"size": size}
    getattr(transformers, f"{kind}ImageProcessor")(**sizes).save_pretrained(tmp_path)
    labels = ["a film", "dogs", "Paris and London"]
    settings = [{}, {"hypothesis_template": "It is {}!"}, {"candidate_labels": ["dogs"]}]
    calls = [(inputs, {"candidate_labels": labels} | s) for s in settings for inputs in (files[0], files[:1], files)]
    compare("zero-shot-image-classification", tmp_path, calls)
    ours = z2h.pipeline(model=tmp_path, device="cpu")
    assert ours.task == "zero-shot-image-classification"
    together = ours(files, labels)
    same(ours(files, candidate_labels="a film, dogs,Paris and London"), together)
    same(list(ours(iter(files), labels, batch_size=2)), together)
    with pytest.raises(UserError, match="needs candidate_labels"):
        ours(files[0])


# --- texts ----------------------------------------------------------------------------------------------------


def llava(words: Tokenizer, vocabulary):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=language(words), image_seq_length=9,
        image_token_index=words.token_to_id("<image>"),
    )  # fmt: skip
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return (transformers.LlavaForConditionalGeneration(config),
            transformers.LlavaProcessor(images, vocabulary, chat_template=TEMPLATE, **settings))  # fmt: skip


def idefics3(words: Tokenizer, vocabulary):
    config = transformers.Idefics3Config(
        text_config=language(words), vision_config=TILE_VISION, image_token_id=words.token_to_id("<image>"),
    )  # fmt: skip
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 40}, max_image_size={"longest_edge": 24})
    return (transformers.Idefics3ForConditionalGeneration(config),
            transformers.Idefics3Processor(images, vocabulary, image_seq_len=9, chat_template=TEMPLATE))  # fmt: skip


def language(words: Tokenizer):
    return transformers.LlamaConfig(
        **SHAPE, vocab_size=words.vocab_size, num_key_value_heads=2, max_position_embeddings=400, pad_token_id=0,
        bos_token_id=1, eos_token_id=3,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[llava, idefics3])
def seer(request, tmp_path_factory):
    """The folder of a tiny model that sees, with its tokenizer, processor and template, as transformers writes it."""
    folder = tmp_path_factory.mktemp("seer")
    tags = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    words = tokenizer(False, "<image>", *(tags if request.param is idefics3 else ()), *rows[:5])
    words.save_pretrained(folder / "words", model_max_length=400)
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder / "words", padding_side="left")
    model, processor = request.param(words, vocabulary)
    randomized(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"do_sample": False}))
    return folder


def asked(*parts: str) -> dict:
    """A message of images (names of files) and text."""
    kinds = [{"type": "image", "image": p} if p.endswith(".png") else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": kinds}


def test_image_text_to_text(seer, files):
    chat = [asked(files[0], "What is it?")]
    two = [asked("Is", files[1], "larger than", files[2], "?")]
    begun = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    settings = [{"max_new_tokens": 9}, {"max_new_tokens": 9, "return_full_text": False}]
    inputs = [
        (chat, {}), ([chat], {}), ([chat, two, [asked("Hello!")]], {}), (begun, {}),
        (files[0], {"text": "<image> Who?"}), (files[1:], {"text": "<image>, <image>"}),
        (files, {"text": ["One <image>", "two <image> and <image> things"]}),
        (None, {"text": SENTENCES[0]}), (None, {"text": SENTENCES}),
        ({"images": files[:2], "text": "Who <image>? <image>"}, {}),
    ]  # fmt: skip
    compare("image-text-to-text", seer, [(one, text | s) for one, text in inputs for s in settings])
    ours = z2h.pipeline(model=seer, device="cpu")
    assert ours.task == "image-text-to-text"
    pairs = [{"images": file, "text": "A <image>"} for file in files]
    assert ours(pairs, max_new_tokens=5) == [ours(pair, max_new_tokens=5) for pair in pairs]
    with Image.open(files[0]) as image:
        inside = [asked("What is it?")]
        inside[0]["content"].insert(0, {"type": "image", "image": image})
        answer = ours(inside, max_new_tokens=9)[0]["generated_text"][-1]
    assert answer == ours(chat, max_new_tokens=9)[0]["generated_text"][-1]
    several = ours(chat, max_new_tokens=4, do_sample=True, num_return_sequences=3, seed=1)
    assert len({record["generated_text"][-1]["content"] for record in several}) > 1
    for images, text in ((files[0], "Who?"), (files, "<image>"), (None, "<image>"), (files, ["<image>", "<image>"])):
        with pytest.raises(UserError, match=r"places? for images \(<image>\)"):
            ours(images, text)
    with pytest.raises(UserError, match="an image in a message is"):
        ours([{"role": "user", "content": [{"type": "image", "image": 3}]}])
    with pytest.raises(UserError, match="a conversation, "):
        ours({"images": files[0]})


@pytest.mark.parametrize("template", [True, False])
def test_visual_question_answering(seer, files, template, tmp_path):
    folder = seer
    if not template:
        folder = tmp_path
        for file in seer.iterdir():
            if file.is_file() and "chat_template" not in file.name:
                (folder / file.name).symlink_to(file)
    processor = transformers.AutoProcessor.from_pretrained(seer)
    model = transformers.AutoModelForImageTextToText.from_pretrained(seer).eval()

    def wanted(file: str, question: str) -> list[dict[str, str]]:
        text = f"USER: <image>\n{question} ASSISTANT:" if template else f"<image>\n{question}\n"
        with Image.open(file) as image:
            given = processor(images=image, text=text, return_tensors="pt")
        said = model.generate(**given, max_new_tokens=9, do_sample=False)[0, given["input_ids"].shape[1] :]
        return [{"answer": processor.tokenizer.decode(said, skip_special_tokens=True).strip()}]

    ours = z2h.pipeline("vqa", folder, device="cpu", max_new_tokens=9)
    first, second = "Who?", "Is it red?"
    pair = {"image": files[0], "question": first}
    assert ours(pair) == ours(files[0], first) == ours(image=files[0], question=first) == wanted(files[0], first)
    assert ours([pair]) == ours([files[0]], first) == [wanted(files[0], first)]
    assert ours(files[0], [first, second]) == [wanted(files[0], first), wanted(files[0], second)]
    every = [wanted(file, question) for question in (first, second) for file in files[:2]]
    assert ours(files[:2], [first, second]) == every
    assert len({answer["answer"] for [answer] in every}) > 1
    with pytest.raises(UserError, match=r'an input of visual-question-answering is \{"image"'):
        ours({"image": files[0]})
