"""Images in conversations: what the server answers is what the pipeline answers; what is none is refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import openai
import pytest
import torch
from conftest import make_model, serving
from PIL import Image

import zero2hero as z2h
from zero2hero.data.images import ImageProcessor
from zero2hero.model_configs import VisionConfig, VisionLanguageConfig
from zero2hero.models import init_weights, save_pretrained
from zero2hero.models.vision_language import VisionLanguage
from zero2hero.options import ServeConfig
from zero2hero.serve.command import load as load_engine
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.tokenizer import SPECIAL_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA that looks hard at its images."""
    folder = tmp_path_factory.mktemp("seer")
    texts = ["Ada found a red ball. It was lost again. Ben asked: where is it? user: assistant:\n"] * 4
    tokenizer = Tokenizer.train(texts, vocab_size=330, special_tokens=[*SPECIAL_TOKENS, "<image>"])
    tokenizer.chat_template = PARTS
    vision = VisionConfig(
        image_size=12, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        patch_bias=False, first_norm=True, norm_eps=1e-5, feedforward="quick_gelu", task="none",
    )  # fmt: skip
    text = make_model().model.config
    model = VisionLanguage(VisionLanguageConfig(text, vision, image_token_index=tokenizer.token_to_id("<image>")))
    init_weights(model, 3)
    model.language_model.load_state_dict(make_model().model.state_dict())
    with torch.no_grad():
        for parameter in (*model.vision_tower.parameters(), *model.projector.parameters()):
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    ImageProcessor({"height": 12, "width": 12}, image_processor_type="CLIPImageProcessor").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path, all_threads: int):
    with serving(lambda: load_engine(ServeConfig(model=str(folder)))) as served:
        yield served.client()


def picture(seed: int) -> Image.Image:
    numbers = torch.randint(256, (12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(numbers.numpy())


def address(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def message(*parts: str | Image.Image) -> dict:
    return {"role": "user", "content": [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": address(part)}} for part in parts
    ]}  # fmt: skip


def answer(client: openai.OpenAI, *parts: str | Image.Image, **more) -> str:
    given = {"model": "tiny", "max_tokens": 12, "temperature": 0} | more
    return client.chat.completions.create(messages=[message(*parts)], **given).choices[0].message.content


def test_the_server_sees_what_the_pipeline_sees(client, folder):
    see = z2h.pipeline(model=str(folder), device="cpu", max_new_tokens=12)
    found = set()
    for parts in ((picture(1), "Where is it?"), ("Ball: ", picture(2), " or ", picture(3)), ("Ada found",)):
        kinds = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        said = see([{"role": "user", "content": kinds}])[0]["generated_text"][-1]["content"]
        assert answer(client, *parts) == said
        found.add(said)
    assert len(found) == 3
    stream = client.chat.completions.create(
        model="tiny", messages=[message(picture(1), "Where is it?")], max_tokens=12, temperature=0, stream=True, n=2
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [answer(client, picture(1), "Where is it?")] * 2


def test_responses_take_images_too(client):
    parts = [{"type": "input_text", "text": "Where is it?"}, {"type": "input_image", "image_url": address(picture(1))}]
    given = client.responses.create(
        model="tiny", input=[{"role": "user", "content": parts}], max_output_tokens=12, temperature=0
    )
    assert given.output_text == answer(client, "Where is it?", picture(1))


def test_a_mark_that_the_user_writes_is_text(client):
    assert answer(client, "<image>", picture(1)) != answer(client, picture(1))
    assert isinstance(answer(client, "What is <image>?"), str)


def test_a_template_that_knows_no_parts_gets_one_text(folder, tmp_path, all_threads):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"
    (tmp_path / "chat_template.jinja").write_text(whole)
    with (
        serving(lambda: load_engine(ServeConfig(model=str(tmp_path)))) as served,
        serving(lambda: load_engine(ServeConfig(model=str(folder)))) as usual,
    ):
        parts = ("Where is ", picture(1), "it?")
        assert answer(served.client(), *parts) == answer(usual.client(), *parts)


BOMB = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\0\1\0\0" * 2 + b"\x08\2\0\0\0" + b"\0" * 4).decode()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1/cat.png", "no address is fetched"),
        ("file:///etc/passwd", "no address is fetched"),
        ("/etc/passwd", "no address is fetched"),
        ("data:image/png;base64,@@@", "base64 is damaged"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "not an image"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "not an image"),
        (address(picture(1))[:-40], "cannot be read|base64 is damaged"),
        (f"data:image/png;base64,{BOMB}", "pixels; at most|cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(client, url, says):
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.BadRequestError, match=says) as raised:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}])
    assert raised.value.code == "invalid_image"


def test_too_many_images_and_models_without_eyes(client, served):
    with pytest.raises(openai.BadRequestError, match="may have 8 images"):
        answer(client, *[picture(1)] * 9)
    with pytest.raises(openai.BadRequestError, match="no eyes"):
        answer(served.client(), picture(1))
    with pytest.raises(openai.BadRequestError, match="not both"):
        answer(client, picture(1), tools=[{"type": "function", "function": {"name": "look"}}])
