"""Tools that a model may call, and answers of a given form.

A call is written as `<tool_call>`, a line of JSON with the tool's name and arguments, `</tool_call>`. Reading that out
of a free text goes wrong in many ways; so the text is not free. It is written in up to three parts, each a request of
its own that goes on where the last one ended (the engine remembers what it has read):

1. freely, until the model begins a call, where it may choose whether to (tool_choice "auto");
2. the name, constrained to the names of the tools, where there is a choice ("auto", "required");
3. the arguments, constrained to the tool's JSON schema.

So every call is of a tool that exists, with arguments of the right form, and these can be streamed as they are. After a
call the model may begin another at once, unless the client wants one (parallel_tool_calls: false) or has named the
tool; whatever else it writes there ends the answer and is not shown. The client sends the results and asks again.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from zero2hero.serve.answers import Delta
from zero2hero.serve.prompts import TOOL_CALL, TOOL_CALL_END, require
from zero2hero.serve.schema import ChatRequest, NamedTool, ResponseFormat, Tool
from zero2hero.serve.worker import Worker

if TYPE_CHECKING:
    from zero2hero.generate.constrained import Constraint
    from zero2hero.generate.engine import Event
    from zero2hero.language_model import LanguageModel
    from zero2hero.serve.chat import Chat

CALLS = 16  # of one answer
BEGINNING = 16  # tokens within which a further call must have begun


def constraint_for(lm: LanguageModel, asked: ResponseFormat | None) -> Constraint | None:
    """What `response_format` asks for. Raises `UserError` for a schema that is none."""
    if asked is None or asked.type == "text":
        return None
    from zero2hero.generate.constrained import Constraint

    if asked.json_schema is None:
        return Constraint.json_object(lm)
    return Constraint.json_schema(lm, asked.json_schema.schema_)


class ToolCalls:
    """The tools of one request, and how its answer comes to call one of them."""

    def __init__(self, lm: LanguageModel, tools: list[Tool], choice: str, most: int) -> None:
        from zero2hero.generate.constrained import Constraint

        self.lm, self.tools, self.choice = lm, tools, choice  # "auto", "required", or the one tool's name
        self.most = most  # calls
        schemas = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in tools}
        self.arguments = {name: Constraint.json_schema(lm, schema) for name, schema in schemas.items()}
        self.names = Constraint.json_schema(lm, {"enum": list(schemas)})

    @classmethod
    def asked_for(cls, lm: LanguageModel, body: ChatRequest) -> ToolCalls | None:
        """None where nothing can be called."""
        choice = body.tool_choice or "auto"
        tools = body.tools or []
        require(bool(tools) or choice in ("auto", "none"), "tool_choice needs tools", "tool_choice")
        if not tools or choice == "none":
            return None
        require(body.n in (None, 1), "with tools n must be 1", "n")
        require(
            body.response_format is None or body.response_format.type == "text",
            "an answer of a given form cannot call tools: give tools or response_format", "response_format",
        )  # fmt: skip
        if not isinstance(choice, NamedTool):
            return cls(lm, tools, choice, 1 if body.parallel_tool_calls is False else CALLS)
        name = choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        require(bool(tools), f"there is no tool {name!r}", "tool_choice")
        return cls(lm, tools, name, 1)

    async def deltas(self, chat: Chat, worker: Worker) -> AsyncGenerator[Delta, None]:
        """The answer: text, calls, or both."""
        ids = list(chat.prompt)
        if self.choice == "auto":
            async with aclosing(self._write(chat, worker, ids, None)) as events:
                async for event in events:
                    delta = chat.delta(0, event)
                    if event.finish_reason:
                        before = self._before_call(event)
                        delta.finish_reason = event.finish_reason if before is None else None
                    yield delta
            if before is None:
                return
            ids += self._encode(before)
        for index in range(self.most):
            async with aclosing(self._call(chat, worker, ids, index)) as pieces:
                async for delta in pieces:
                    yield delta
            if delta.finish_reason:
                return
            if index + 1 < self.most and not await self._begins_another(chat, worker, ids):
                break
        yield Delta(0, finish_reason="tool_calls")

    async def _call(self, chat: Chat, worker: Worker, ids: list[int], index: int) -> AsyncGenerator[Delta, None]:
        """One call in pieces, appended to `ids`; one that is cut off says so with its last piece."""
        name = self.choice
        ids += self._encode(f'{TOOL_CALL}\n{{"name": ')
        if self._is_full(ids):
            yield Delta(0, finish_reason="length")
            return
        if name in ("auto", "required"):
            written = ""
            async with aclosing(self._write(chat, worker, ids, self.names)) as events:
                async for event in events:
                    written += chat.delta(0, event).content
            if event.finish_reason != "stop":
                yield Delta(0, finish_reason=event.finish_reason)
                return
            name = json.loads(written)
        ids += self._encode(f'{json.dumps(name)}, "arguments": ')
        if self._is_full(ids):
            yield Delta(0, finish_reason="length")
            return
        call: dict[str, Any] = {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
        yield Delta(0, call=call | {"function": {"name": name, "arguments": ""}})
        async with aclosing(self._write(chat, worker, ids, self.arguments[name])) as events:
            async for event in events:
                delta = chat.delta(0, event)
                if delta.content:
                    yield Delta(0, call={"index": index, "function": {"arguments": delta.content}})
        if event.finish_reason != "stop":
            yield Delta(0, finish_reason=event.finish_reason)
        ids += [i for i in event.sequence.output_ids if i not in event.sequence.ends]
        ids += self._encode(f"}}\n{TOOL_CALL_END}")

    async def _begins_another(self, chat: Chat, worker: Worker, ids: list[int]) -> bool:
        """Whether what the model writes next, after a call, is the beginning of one."""
        if self._is_full(ids):
            return False
        before: str | None = None
        async with aclosing(self._write(chat, worker, ids, None, BEGINNING)) as events:
            async for event in events:
                chat.written += len(event.token_ids)
                if event.finish_reason:
                    before = self._before_call(event)
        if before is None or before.strip():
            return False
        ids += self._encode(before)
        return True

    def _is_full(self, ids: list[int]) -> bool:
        """Whether the model's context has no room for more."""
        return len(ids) >= self.lm.model.config.max_position_embeddings

    def _before_call(self, event: Event) -> str | None:
        """What was written before the beginning of a call; None where there is no such beginning."""
        text = self.lm.tokenizer.decode(event.sequence.output_ids, skip_special_tokens=False)
        return text[: text.index(TOOL_CALL)] if TOOL_CALL in text else None

    async def _write(
        self, chat: Chat, worker: Worker, ids: list[int], constraint: Constraint | None, most: int | None = None
    ) -> AsyncGenerator[Event, None]:
        """What follows these ids; without a constraint up to the beginning of a call."""
        request = chat.requests[0]
        params = request.params
        left = max(params.max_new_tokens - chat.written, 0)
        left = left if most is None else min(left, most)
        stop = () if constraint else (*params.stop, TOOL_CALL)
        params = dataclasses.replace(params, max_new_tokens=left, stop=stop, constraint=constraint)
        async with aclosing(worker.write([dataclasses.replace(request, prompt_ids=ids, params=params)])) as events:
            async for _, event in events:
                yield event

    def _encode(self, text: str) -> list[int]:
        return self.lm.tokenizer.encode(text, add_special_tokens=False)
