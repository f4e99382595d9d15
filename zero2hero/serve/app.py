"""The routes: what can be asked, and who answers.

Each route checks a request (schema.py has done most of it), makes an object of it that knows the prompt and the form of
the answer, and returns an `Answer`, which runs it. What takes long on the CPU (templates, tokenizers, schemas) is done
in another thread than the event loop's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from zero2hero import __version__
from zero2hero.serve.answers import Answer
from zero2hero.serve.chat import Chat
from zero2hero.serve.completions import Completion
from zero2hero.serve.embeddings import embeddings
from zero2hero.serve.errors import ApiError, ErrorBody, explain_errors
from zero2hero.serve.metrics import Metrics
from zero2hero.serve.prompts import check_size, served
from zero2hero.serve.responses import TextResponse
from zero2hero.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from zero2hero.serve.security import Gate
from zero2hero.serve.worker import Worker

if TYPE_CHECKING:
    from zero2hero.generate.engine import Engine


@dataclass(frozen=True)
class Served:
    """The one model that is served, what clients call it, and the names of the adapters that it can wear."""

    worker: Worker
    name: str
    adapters: tuple[str, ...]
    started: int  # seconds since 1970

    def adapter(self, asked: str) -> str | None:
        """The adapter of that name; None for the model itself. A name is compared with those known, never opened."""
        self.worker.engine  # noqa: B018 (503 while there is none)
        if asked not in (self.name, *self.adapters):
            message = f"there is no model {asked[:80]!r} here; /v1/models lists what there is"
            raise ApiError(404, message, param="model", code="model_not_found")
        return None if asked == self.name else asked

    def card(self, adapter: str | None = None) -> dict[str, Any]:
        context = served(self.worker.engine).model.config.max_position_embeddings
        about = {"id": adapter or self.name, "object": "model", "created": self.started, "owned_by": "zero2hero"}
        return about | {"max_model_len": context} | ({"parent": self.name} if adapter else {})


def create_app(
    load: Callable[[], Engine],
    name: str,
    key: str | None = None,
    with_metrics: bool = False,
    adapters: Sequence[str] = (),
) -> FastAPI:
    """The application, its gate included.

    Args:
        load: loads the model, in the worker's thread.
        name: what clients call the model.
        key: what they must know; None: answer without, to this machine alone.
        with_metrics: show at /metrics what is counted.
        adapters: the names of those that `load` puts on the model; each is a model to clients.
    """
    metrics = Metrics()
    worker = Worker(load, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    # the pages that FastAPI would make of the description load scripts from elsewhere
    app = FastAPI(
        title="zero2hero", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )  # fmt: skip
    app.state.worker = worker
    app.add_middleware(Gate, key=key, metrics=metrics)
    explain_errors(app)
    _describe_errors(app)
    model = Served(worker, name, tuple(adapters), int(time.time()))
    for add in (_add_models, _add_texts, _add_tokenizer):
        add(app, model)
    if with_metrics:

        @app.get("/metrics")
        async def show_metrics() -> Response:
            return PlainTextResponse(metrics.text(worker.engine.counters), media_type="text/plain; version=0.0.4")

    return app


def _add_models(app: FastAPI, it: Served) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 when the model is ready, 503 while it is being loaded."""
        it.worker.engine  # noqa: B018 (503 while there is none)
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, and its adapters."""
        return {"object": "list", "data": [it.card(), *map(it.card, it.adapters)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return it.card(it.adapter(model))


def _add_texts(app: FastAPI, it: Served) -> None:
    worker = it.worker

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        work = await asyncio.to_thread(Completion, worker.engine, body, it.adapter(body.model))
        return Answer(chunks=work.chunks(worker)) if body.stream else Answer(lambda: work.whole(worker))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        work = await asyncio.to_thread(Chat, worker.engine, body, it.adapter(body.model))
        return Answer(chunks=work.chunks(worker)) if body.stream else Answer(lambda: work.whole(worker))

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest) -> Response:
        work = await asyncio.to_thread(TextResponse, worker.engine, body, it.adapter(body.model))
        if body.stream:
            return Answer(chunks=work.chunks(worker), named_events=True)
        return Answer(lambda: work.whole(worker))

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingsRequest) -> Response:
        adapter = it.adapter(body.model)
        return Answer(lambda: embeddings(worker, body, adapter))


def _add_tokenizer(app: FastAPI, it: Served) -> None:
    """The tokenizer's routes, for programs that score texts."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The ids of a text, in which special tokens are text; a special token alone asks for its id."""
        lm = served(it.worker.engine)
        check_size(lm, len(body.prompt.encode()))
        is_text = lm.tokenizer.token_to_id(body.prompt) not in lm.tokenizer.all_special_ids
        ids = await asyncio.to_thread(lm.tokenizer.encode, body.prompt, body.add_special_tokens, is_text)
        return {"tokens": ids, "count": len(ids), "max_model_len": lm.model.config.max_position_embeddings}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        tokenizer = served(it.worker.engine).tokenizer
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        lm = served(it.worker.engine)
        ends = [lm.tokenizer.id_to_token(i) for i in sorted(lm.eos_ids)]
        special = {role: lm.tokenizer.special_token(role) for role in ("bos_token", "pad_token", "unk_token")}
        return special | {
            "eos_token": lm.tokenizer.special_token("eos_token") or next(iter(ends), None),
            "vocab_size": lm.tokenizer.vocab_size,
            "chat_template": lm.tokenizer.chat_template,
        }


def _describe_errors(app: FastAPI) -> None:
    """Take FastAPI's own form of validation errors, which is not used here, out of the description."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        description = make()
        for path in description["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return description

    app.openapi = openapi  # type: ignore[method-assign]
