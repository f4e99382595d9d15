"""Sending an answer: streamed as it is written, or whole.

Both are made of the same chunks, so what is streamed is what would have been sent whole. A stream is a sequence of
server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): `data: ` and a line of JSON each,
and at last `data: [DONE]`. The status is sent with the first chunk: what fails before is an error like any other; what
fails later is an event `{"error": ...}`, for which the client raises an exception.

A client that leaves ends the writing of its answer, streamed or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from zero2hero.serve.errors import as_api_error
from zero2hero.serve.worker import ANSWER_SECONDS

PING_SECONDS = 15
SLOWEST_CLIENT_SECONDS = ANSWER_SECONDS + 60  # by then an answer must have been taken

Chunks = AsyncGenerator[dict[str, Any], None]


@dataclass
class Delta:
    """A piece of choice `index`: of its text, or of a call; the last one says why it ended."""

    index: int
    content: str = ""
    call: dict[str, Any] | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class Answer(Response):
    """An object that `whole` makes, or the `chunks` of a stream; `named_events` as POST /v1/responses wants them."""

    def __init__(
        self,
        whole: Callable[[], Awaitable[dict[str, Any]]] | None = None,
        chunks: Chunks | None = None,
        named_events: bool = False,
    ) -> None:
        self.whole, self.chunks, self.named_events = whole, chunks, named_events
        self.status_code, self.background = 200, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_it = self._send_whole if self.whole else self._stream
        work = asyncio.ensure_future(send_it(scope, receive, send))
        gone = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({work, gone}, timeout=SLOWEST_CLIENT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = work.done()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if finished:
            work.result()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.whole is not None
        try:
            response = JSONResponse(await self.whole())
        except Exception as error:
            response = as_api_error(error).response()
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.chunks is not None
        pings = None
        try:
            async with aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    if pings is None:
                        await send(_START)
                        pings = asyncio.ensure_future(_ping(send))
                    await send(_body(self._event(chunk)))
        except Exception as error:
            refused = as_api_error(error)
            if pings is None:
                return await refused.response()(scope, receive, send)
            await send(_body(self._event({"type": "error", **refused.body} if self.named_events else refused.body)))
        finally:
            if pings is not None:
                pings.cancel()
        await send(_body(b"" if self.named_events else b"data: [DONE]\n\n", more=False))

    def _event(self, chunk: dict[str, Any]) -> bytes:
        name = f"event: {chunk['type']}\n" if self.named_events else ""
        return f"{name}data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


def _body(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _ping(send: Send) -> None:
    """Comments, which clients pass over, so that nothing between takes a slow stream for a dead one."""
    while True:
        await asyncio.sleep(PING_SECONDS)
        await send(_body(b": ping\n\n"))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
