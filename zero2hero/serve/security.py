"""Who may ask, and how much: decided for every route at once, before any of them sees the request.

A server on one's own machine can be reached by more than its owner. Every web page that is open in a browser can send
requests to 127.0.0.1; a page whose name is made to point there (DNS rebinding) can read the answers too. So:

- Host: without a key, only the names of this machine's loopback are answered, which a foreign page cannot have.
- Origin: a request that a browser sends for a page of another address is refused; there is no CORS.
- Content-Type: bodies are application/json, which a page cannot send elsewhere without asking first.
- Key: on any other address than loopback's there must be one. It guards every path but /health, unknown paths as well.

And nothing is read without a limit: headers, bodies, their nesting, and the time they take.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from zero2hero.errors import UserError
from zero2hero.serve.errors import ApiError
from zero2hero.serve.metrics import Metrics

PUBLIC = frozenset({("GET", "/health"), ("HEAD", "/health")})
BODY_BYTES, HEADER_BYTES = 2 * 2**20, 16 * 2**10
DEPTH = 32
HEADER_SECONDS, BODY_SECONDS = 20, 30
CONNECTIONS = 512
KEY_LENGTH = 16
FAILURES_PER_MINUTE = 10

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether this name or address is that of the machine itself, reachable from nowhere else."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def key_for(host: str, given: str | None) -> tuple[str | None, bool]:
    """The key that the server demands, and whether it was made here.

    Raises:
        UserError: a given key that could be guessed.
    """
    if given is not None and len(given) < KEY_LENGTH:
        raise UserError(f"the API key must have at least {KEY_LENGTH} characters; without --api_key one is made")
    if given is not None or is_loopback(host):
        return given, False
    return f"sk-{secrets.token_urlsafe(32)}", True


class Gate:
    """The ASGI application around the application: what passes is allowed, small enough, and complete."""

    def __init__(self, app: App, key: str | None, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.key = None if key is None else hashlib.sha256(key.encode()).digest()
        self.failures: dict[str, list[float]] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket: there is none here
            return await send({"type": "websocket.close", "code": 1008})
        name = f"req-{secrets.token_hex(12)}".encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(b"x-request-id", name), (b"x-content-type-options", b"nosniff")]
                route = scope.get(
                    "route"
                )  # of a path that exists: others would make as many counters as there are texts
                self.metrics.answered(getattr(route, "path", "other"), message["status"])
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        try:
            self.admit(scope, headers)
            body = await self.read(headers, receive)
        except ApiError as error:
            return await error.response()(scope, receive, send_named)
        await self.app(scope, _replay(body, receive), send_named)

    def admit(self, scope: Message, headers: Mapping[str, str]) -> None:
        """Raises `ApiError` for a request that is not to be answered."""
        if sum(len(name) + len(value) for name, value in headers.items()) + len(scope["path"]) > HEADER_BYTES:
            raise ApiError(431, f"the request's headers have more than {HEADER_BYTES:,} bytes")
        host = re.sub(r":\d*$", "", headers.get("host", ""))
        if self.key is None and not is_loopback(host):
            raise ApiError(403, f"this server answers to localhost and 127.0.0.1, not to the host {host[:80]!r}")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "requests of web pages of another origin are not answered")
        if self.key is not None and (scope["method"], scope["path"]) not in PUBLIC:
            self.check_key(headers.get("authorization", ""), (scope.get("client") or ("unknown",))[0])
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "the body must be JSON: Content-Type: application/json")

    def check_key(self, authorization: str, client: str) -> None:
        """The key is compared by its hash, in a time that does not tell how much of it is right."""
        assert self.key is not None
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()
        if hmac.compare_digest(given, self.key) and scheme.lower() == "bearer":
            return
        now = time.monotonic()
        if len(self.failures) > 1000:
            self.failures.clear()
        recent = [moment for moment in self.failures.get(client, []) if moment > now - 60]
        self.failures[client] = [*recent, now][-FAILURES_PER_MINUTE:]
        if len(recent) >= FAILURES_PER_MINUTE:
            raise ApiError(429, "too many requests with a wrong key", retry_after=60)
        raise ApiError(401, "give the server's key: Authorization: Bearer KEY", code="invalid_api_key")

    async def read(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body, if it is of a bearable size, depth and speed."""
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > BODY_BYTES:
            raise self.too_large()
        try:
            body = await asyncio.wait_for(self._collect(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s") from None
        if deeper_than(DEPTH, body):
            raise ApiError(400, f"the JSON is nested more than {DEPTH} deep", code="invalid_json")
        return body

    async def _collect(self, receive: Receive) -> bytes:
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client left before the body was complete")
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > BODY_BYTES:
                raise self.too_large()
        return b"".join(parts)

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {BODY_BYTES:,} bytes", code="request_too_large")


# strings are passed over as a whole, also one that is not closed: what is within them is no nesting
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?$)|[\[{]|[\]}]', re.S)


def deeper_than(limit: int, body: bytes) -> bool:
    """Whether lists and objects are nested more than `limit` deep; seen before they are parsed."""
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(body):
        first = body[found.start()]
        if first in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif first in b"]}":
            depth -= 1
    return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, in one piece, and then what else comes: that the client has left."""
    waiting = [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol, which closes a connection that never says what it wants."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:  # no request so far
            self.transport.close()
