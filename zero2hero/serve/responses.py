"""POST /v1/responses: the newer API for conversations, of which text is served.

It is the chat of chat.py under other names, and its stream tells more: events say when an answer, an item of it and a
part of that item begin and end. Nothing is stored, so an answer cannot be referred to later.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from zero2hero.serve.chat import Chat
from zero2hero.serve.schema import ChatMessage, ChatRequest, ResponseFormat, ResponsesRequest, SchemaFormat
from zero2hero.serve.worker import Worker

if TYPE_CHECKING:
    from zero2hero.generate.engine import Engine


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request in chat's words."""
    given = body.input if isinstance(body.input, list) else None
    messages = [ChatMessage(role="user", content=body.input)] if isinstance(body.input, str) else []
    messages += [ChatMessage(role=message.role, content=message.content) for message in given or []]
    if body.instructions:
        messages.insert(0, ChatMessage(role="system", content=body.instructions))
    asked = body.text.format if body.text else None
    form = None
    if asked and asked.type == "json_schema":
        assert asked.schema_ is not None
        form = ResponseFormat(
            type="json_schema", json_schema=SchemaFormat(name=asked.name or "answer", schema=asked.schema_)
        )
    elif asked:
        form = ResponseFormat(type=asked.type)
    return ChatRequest(
        model=body.model, messages=messages, max_completion_tokens=body.max_output_tokens, temperature=body.temperature,
        top_p=body.top_p, response_format=form,
    )  # fmt: skip


class TextResponse:
    """One request and its answer."""

    def __init__(self, engine: Engine, body: ResponsesRequest, adapter: str | None = None) -> None:
        self.body, self.chat = body, Chat(engine, as_chat(body), adapter)
        self.id, self.item = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self.created = int(time.time())

    def response(self, status: str, text: str | None = None, reason: str | None = None) -> dict[str, Any]:
        """The answer as it stands: without `text` it has only begun."""
        body, usage = self.body, None
        if text is not None:
            counts = self.chat.usage
            usage = {
                "input_tokens": counts["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counts["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            }  # fmt: skip
        asked = body.text.format if body.text else None
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None, "model": body.model,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "temperature": body.temperature, "top_p": body.top_p, "previous_response_id": None, "store": False,
            "tools": [], "tool_choice": "none", "parallel_tool_calls": False, "metadata": {},
            "text": {"format": asked.model_dump(by_alias=True, exclude_none=True) if asked else {"type": "text"}},
            "output": [] if text is None else [self.message(text, status)], "usage": usage,
        }  # fmt: skip

    def message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    async def whole(self, worker: Worker) -> dict[str, Any]:
        """The answer in one piece."""
        last: dict[str, Any] = {}
        async with aclosing(self.chunks(worker)) as chunks:
            async for chunk in chunks:
                last = chunk
        return last["response"]

    async def chunks(self, worker: Worker) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream, numbered."""
        number = 0
        async with aclosing(self._events(worker)) as events:
            async for event in events:
                yield event | {"sequence_number": number}
                number += 1

    async def _events(self, worker: Worker) -> AsyncGenerator[dict[str, Any], None]:
        item = {"output_index": 0}
        part = item | {"item_id": self.item, "content_index": 0}
        pieces, reason, begun = [], None, False
        async with aclosing(self.chat.deltas(worker)) as deltas:
            async for delta in deltas:
                if not begun:
                    begun = True
                    yield {"type": "response.created", "response": self.response("in_progress")}
                    yield {"type": "response.in_progress", "response": self.response("in_progress")}
                    yield {"type": "response.output_item.added", "item": self.message(None, "in_progress")} | item
                    yield {"type": "response.content_part.added", "part": _part("")} | part
                if delta.content:
                    pieces.append(delta.content)
                    yield {"type": "response.output_text.delta", "delta": delta.content, "logprobs": []} | part
                reason = delta.finish_reason or reason
        text = "".join(pieces)
        status = "incomplete" if reason == "length" else "completed"
        yield {"type": "response.output_text.done", "text": text, "logprobs": []} | part
        yield {"type": "response.content_part.done", "part": _part(text)} | part
        yield {"type": "response.output_item.done", "item": self.message(text, status)} | item
        yield {"type": f"response.{status}", "response": self.response(status, text, reason)}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
