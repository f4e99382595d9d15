"""Adapters of one model, each a model to clients: in one batch, each with its own answers, template and ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from conftest import NAME, serving

from zero2hero.errors import UserError
from zero2hero.generate.engine import Engine
from zero2hero.language_model import load, with_adapters
from zero2hero.options import ServeConfig
from zero2hero.serve.command import load as load_engine
from zero2hero.tokenizer import Tokenizer
from zero2hero.tune import LoraConfig, adapter_names, add_lora, save_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "Ada found a red"


def make_adapter(base: Path, folder: Path, seed: int, template: str | None = None) -> str:
    """An adapter that changes what the model writes."""
    lm = load(base)
    add_lora(lm.model, LoraConfig(r=4, lora_alpha=64), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(0, 0.1, generator=generator)
    save_adapter(lm.model, folder, base_model_name_or_path=str(base))
    if template is not None:
        lm.tokenizer.chat_template = template
        lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    return {"warm": make_adapter(model_directory, folder / "warm", 1),
            "cold": make_adapter(model_directory, folder / "cold", 2, template)}  # fmt: skip


@pytest.fixture(scope="module")
def client(model_directory: Path, adapters: dict[str, str], all_threads: int):
    config = ServeConfig(model=str(model_directory), adapters=adapters)
    with serving(lambda: load_engine(config), adapters=list(adapters)) as served:
        yield served.client()


def alone(model_directory: Path, adapter: str | None = None) -> str:
    lm = load(adapter or model_directory)
    return lm.generate(PROMPT, max_new_tokens=12, temperature=0.0, return_full_text=False)


def test_each_adapter_is_a_model_and_writes_what_it_writes_alone(client, model_directory, adapters):
    assert [card.id for card in client.models.list()] == [NAME, *adapters]
    assert client.models.retrieve("cold").parent == NAME
    expected = {NAME: alone(model_directory)} | {name: alone(model_directory, at) for name, at in adapters.items()}
    assert len(set(expected.values())) == 3

    def ask(name: str) -> str:
        return client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text

    names = list(expected) * 3
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(ask, names)) == [expected[name] for name in names]


def test_an_adapter_has_its_own_template(client):
    def read(name: str) -> int:
        answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Ada"}], max_tokens=1)
        return answer.usage.prompt_tokens

    assert read("cold") < read("warm") == read(NAME)


def test_adapters_embed_and_unknown_ones_are_named(client):
    vectors = [client.embeddings.create(model=name, input="a ball").data[0].embedding for name in (NAME, "warm")]
    assert vectors[0] != vectors[1]
    with pytest.raises(openai.NotFoundError, match="no model 'hot'"):
        client.completions.create(model="hot", prompt="x")


def test_a_model_goes_on_wearing_what_it_wore(model_directory, adapters):
    lm = load(adapters["warm"])
    before = lm.generate(PROMPT, max_new_tokens=12, temperature=0.0)
    views = with_adapters(lm, {"cold": adapters["cold"]})
    assert adapter_names(lm.model) == ["default", "cold"]
    assert views["cold"].model is lm.model
    assert lm.generate(PROMPT, max_new_tokens=12, temperature=0.0) == before


def test_an_adapter_with_another_vocabulary_is_refused(model_directory, tmp_path):
    folder = make_adapter(model_directory, tmp_path / "other", 3)
    Tokenizer.train(["entirely other words"], vocab_size=300).save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizer is not the model's"):
        with_adapters(load(model_directory), {"other": folder})


def test_a_request_ends_as_its_adapter_ends(model_directory, adapters):
    lm = load(model_directory)
    views = with_adapters(lm, {"cold": adapters["cold"]})
    views["cold"].generation_config["eos_token_id"] = 7
    engine = Engine(lm, adapters=views)
    assert engine.wearing("cold").eos_ids == {7} != engine.wearing(None).eos_ids
