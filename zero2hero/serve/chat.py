"""POST /v1/chat/completions: a conversation, and its answer.

The conversation becomes one prompt (prompts.py); what the model writes becomes deltas, pieces of an answer's text or of
a call of a tool. Streamed or not, for this API or for the one of responses.py, an answer is made of these.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from zero2hero.serve.answers import Delta
from zero2hero.serve.images import images_of
from zero2hero.serve.logprobs import TokenSpeller, chat_logprobs
from zero2hero.serve.prompts import chat_ids, check_context, require, sampling_settings, served
from zero2hero.serve.schema import ChatRequest
from zero2hero.serve.tools import ToolCalls, constraint_for
from zero2hero.serve.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

    from zero2hero.generate.engine import Engine, Event


class Chat:
    """One request: the conversation as the engine's requests, and the answer."""

    def __init__(self, engine: Engine, body: ChatRequest, adapter: str | None = None) -> None:
        from zero2hero.generate.engine import Request, SamplingParams

        self.body, self.lm, self.n = body, served(engine, adapter), body.n or 1
        require(body.top_logprobs is None or bool(body.logprobs), "top_logprobs needs logprobs", "top_logprobs")
        self.calls = ToolCalls.asked_for(self.lm, body)
        tools = self.calls.tools if self.calls else []
        images = images_of(self.lm, body.messages)
        require(not (images and tools), "a request has images or tools, not both", "tools")
        self.prompt = chat_ids(self.lm, body.messages, tools, images)
        self.pixels = self.lm.eyes.pixels(images) if self.lm.eyes else None
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        check_context(self.lm, [self.prompt], limit)
        params = SamplingParams(
            max_new_tokens=self.lm.model.config.max_position_embeddings if limit is None else limit,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            constraint=constraint_for(self.lm, body.response_format),
            **sampling_settings(self.lm, body),
        )  # fmt: skip
        self.requests = [Request(self.prompt, params, adapter, sample) for sample in range(self.n)]
        self.written = 0  # tokens
        self.frame = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}

    async def deltas(self, worker: Worker) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece."""
        if self.calls:
            async with aclosing(self.calls.deltas(self, worker)) as pieces:
                async for delta in pieces:
                    yield delta
            return
        requests = self.requests
        if self.pixels is not None:
            vectors = await worker.call(self.look)
            requests = [dataclasses.replace(request, embeddings=vectors) for request in requests]
        async with aclosing(worker.write(requests)) as events:
            async for number, event in events:
                yield self.delta(number, event)

    def look(self) -> Tensor:
        """What the model reads of the prompt and its images."""
        assert self.lm.eyes is not None
        return self.lm.eyes.vectors([self.prompt], self.pixels)[0]

    def delta(self, number: int, event: Event) -> Delta:
        self.written += len(event.token_ids)
        found = [token for token in event.logprobs if token.id not in event.sequence.ends]
        logprobs = chat_logprobs(TokenSpeller(self.lm.tokenizer), found)
        return Delta(number, event.text, logprobs=logprobs, finish_reason=event.finish_reason)

    @property
    def usage(self) -> dict[str, int]:
        read = len(self.prompt)
        return {"prompt_tokens": read, "completion_tokens": self.written, "total_tokens": read + self.written}

    # ---------------------------------------------------------------- this API's two forms

    async def chunks(self, worker: Worker) -> AsyncGenerator[dict[str, Any], None]:
        """What a stream of this answer consists of."""
        usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        frame = self.frame | {"object": "chat.completion.chunk"} | ({"usage": None} if usage else {})

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return frame | {"choices": [choice]}

        begun: set[int] = set()
        async with aclosing(self.deltas(worker)) as pieces:
            async for piece in pieces:
                if piece.index not in begun:
                    begun.add(piece.index)
                    yield chunk(piece.index, {"role": "assistant", "content": None if piece.call else ""})
                delta: dict[str, Any] = {"tool_calls": [piece.call]} if piece.call else {"content": piece.content}
                logprobs = {"content": piece.logprobs, "refusal": None} if piece.logprobs else None
                if piece.content or piece.call or logprobs:
                    yield chunk(piece.index, delta, logprobs)
                if piece.finish_reason:
                    yield chunk(piece.index, {}, None, piece.finish_reason)
        if usage:
            yield frame | {"choices": [], "usage": self.usage}

    async def whole(self, worker: Worker) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [_Choice() for _ in self.requests]
        async with aclosing(self.deltas(worker)) as pieces:
            async for piece in pieces:
                choices[piece.index].add(piece)
        finished = [choice.finished(i, bool(self.body.logprobs)) for i, choice in enumerate(choices)]
        return self.frame | {"object": "chat.completion", "choices": finished, "usage": self.usage}


class _Choice:
    """One answer, put together of its deltas."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.reason: str | None = None

    def add(self, piece: Delta) -> None:
        self.text.append(piece.content)
        self.logprobs += piece.logprobs
        self.reason = piece.finish_reason or self.reason
        if piece.call and "id" in piece.call:
            self.calls.append({key: value for key, value in piece.call.items() if key != "index"})
        elif piece.call:
            self.calls[-1]["function"]["arguments"] += piece.call["function"]["arguments"]

    def finished(self, index: int, logprobs: bool) -> dict[str, Any]:
        text = "".join(self.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if self.calls else ""),
            "refusal": None,
        }
        if self.calls:
            message["tool_calls"] = self.calls
        found = {"content": self.logprobs, "refusal": None} if logprobs else None
        return {"index": index, "message": message, "logprobs": found, "finish_reason": self.reason}
