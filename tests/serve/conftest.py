"""A tiny model with a chat template, and servers of it in threads of the tests' process, which can be looked into."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from zero2hero.generate.engine import Engine
from zero2hero.language_model import LanguageModel, load, save
from zero2hero.models import Decoder, DecoderConfig, init_weights
from zero2hero.serve import security
from zero2hero.serve.app import create_app
from zero2hero.serve.prompts import TOOL_CALL
from zero2hero.serve.worker import Worker
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.tokenizer import SPECIAL_TOKENS

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(seed: int = 1) -> LanguageModel:
    """Random weights whose likeliest token stands out; the vocabulary knows no emoji as one token."""
    texts = ["Ada found a red ball. It was lost again. Ben asked: where is it? The café is closed.\n"] * 4
    tokenizer = Tokenizer.train(texts, vocab_size=330, special_tokens=[*SPECIAL_TOKENS, TOOL_CALL])
    tokenizer.chat_template = TEMPLATE
    config = DecoderConfig(
        vocab_size=336, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.15, model_type="llama",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.normal_(0.0, 0.3, generator=generator)
    ends = [tokenizer.eos_token_id, tokenizer.token_to_id("<|im_end|>")]
    return LanguageModel(model.eval(), tokenizer, generation_config={"eos_token_id": ends})


@dataclass
class Served:
    """A running server."""

    url: str
    app: FastAPI
    server: uvicorn.Server

    @property
    def worker(self) -> Worker:
        return self.app.state.worker

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    @property
    def lm(self) -> LanguageModel:
        return self.engine.lm

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | more))

    def http(self, **more: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, **more)

    def idle(self, seconds: float = 10) -> bool:
        """Whether all places become free, in time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            counters = self.engine.counters
            if not counters["running"] and not counters["waiting"]:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(load: Callable[[], Engine], ready: bool = True, **more: Any) -> Iterator[Served]:
    """A server on a free port."""
    app = create_app(load, NAME, **more)
    config = uvicorn.Config(
        app, http=security.PatientProtocol, ws="none", log_level="error", timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=security.HEADER_BYTES,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", app, server)
        until = time.monotonic() + 60
        while ready and time.monotonic() < until and app.state.worker._engine is None:
            time.sleep(0.01)
        try:
            yield served
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / NAME
    save(make_model(), folder)
    return folder


@pytest.fixture(scope="session")
def served(model_directory: Path, all_threads: int) -> Iterator[Served]:
    """The server that most tests ask."""
    with serving(lambda: Engine(load(model_directory), max_batch_size=16, max_waiting=64), with_metrics=True) as it:
        yield it


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    return served.client()
