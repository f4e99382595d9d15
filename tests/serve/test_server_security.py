"""Who may ask and how much: keys, hosts, origins, limits, hostile bodies."""

from __future__ import annotations

import hmac
import json
import socket
import time
from contextlib import closing

import pytest
from conftest import make_model, serving
from fastapi.routing import APIRoute

from zero2hero.errors import UserError
from zero2hero.generate.engine import Engine
from zero2hero.serve import security
from zero2hero.serve.security import deeper_than, is_loopback, key_for

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "sk-" + "a" * 40
POST = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def guarded():
    with serving(lambda: Engine(make_model()), key=KEY, with_metrics=True) as served:
        yield served


def forgive(served):
    """Forget the wrong keys that came so far."""
    layer = served.app.middleware_stack
    while not isinstance(layer, security.Gate):
        layer = layer.app
    layer.failures.clear()


def in_envelope(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


# --- keys ---------------------------------------------------------------------------------------------------


def test_every_route_but_one_demands_the_key(guarded):
    http = guarded.http()
    routes = [route for route in guarded.app.routes if getattr(route, "methods", None)]
    assert len([route for route in routes if isinstance(route, APIRoute)]) >= 11
    paths = {(method, route.path) for route in routes for method in route.methods}
    paths |= {("GET", "/nothing"), ("GET", "/v1"), ("POST", "/health"), ("OPTIONS", "/v1/models"), ("GET", "//health")}
    for method, path in sorted(paths):
        forgive(guarded)
        answer = http.request(method, path.replace("{model:path}", "tiny"), json={} if method == "POST" else None)
        if (method, path) == ("GET", "/health"):
            assert answer.status_code == 200
        elif method == "HEAD":
            assert answer.status_code in (401, 405)
        else:
            assert in_envelope(answer, 401)["type"] == "authentication_error", (method, path)


def test_the_key_opens_and_is_compared_in_constant_time(guarded, monkeypatch):
    compared = []
    original = hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda *both: (compared.append(both), original(*both))[1])
    assert guarded.client(api_key=KEY).models.list().data
    for wrong in (
        f"Bearer {KEY[:-1]}b",
        "Bearer",
        "",
        KEY,
        f"Basic {KEY}",
        "Bearer \xff",
        f"Bearer {KEY}\x00".replace("\x00", "x"),
    ):
        forgive(guarded)
        answer = guarded.http().get("/v1/models", headers={"Authorization": wrong.encode("latin-1")})
        in_envelope(answer, 401)
    assert len(compared) == 8
    assert {len(given) for pair in compared for given in pair} == {32}  # hashes, whatever was given


def test_wrong_keys_are_counted(guarded):
    forgive(guarded)
    statuses = [guarded.http().get("/v1/models").status_code for _ in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    assert guarded.client(api_key=KEY).models.list().data  # the owner is not locked out
    forgive(guarded)


def test_keys_are_demanded_where_others_can_come():
    assert key_for("127.0.0.1", None) == (None, False)
    assert key_for("::1", None) == (None, False)
    made, new = key_for("0.0.0.0", None)
    assert new
    assert len(made) > 40
    assert made != key_for("0.0.0.0", None)[0]
    assert key_for("192.168.1.5", KEY) == (KEY, False)
    with pytest.raises(UserError, match="16 characters"):
        key_for("127.0.0.1", "short")
    assert not is_loopback("localhost.evil.com")
    assert not is_loopback("")


# --- hosts and origins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1234"}, 200), ({"Host": "127.0.0.1"}, 200), ({"Host": "[::1]:80"}, 200),
        ({"Host": "evil.com"}, 403), ({"Host": "127.0.0.1.evil.com"}, 403), ({"Host": "localhost@evil.com"}, 403),
        ({"Host": ""}, 403), ({"Host": "0.0.0.0"}, 403), ({"Host": "192.168.0.1"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200), ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://evil.com"}, 403),
        ({"Host": "localhost:80", "Origin": "http://localhost:81"}, 403),
        ({"Host": "localhost", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "localhost", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)  # fmt: skip
def test_pages_of_others_are_not_answered(served, headers, status):
    answer = served.http().get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    if status != 200:
        in_envelope(answer, status)


def test_a_body_that_a_page_could_send_unasked_is_refused(served):
    body = json.dumps({"model": "tiny", "prompt": "x"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = served.http().post("/v1/completions", content=body, headers={"Content-Type": kind} if kind else {})
        in_envelope(answer, 415)


# --- hostile bodies -----------------------------------------------------------------------------------------


def post(served, content, **headers):
    headers = {"Content-Type": "application/json"} | headers
    return served.http().post("/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', 400),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400),
        (b'{"model": "tiny", "prompt": "x", "n": 1000000000}', 400),
        (b'{"model": "tiny", "prompt": "x", "n": 1' + b"0" * 5000 + b"}", 400),
        (b'{"model": "tiny", "prompt": "x", "n": "2"}', 400),
        (b'{"model": "tiny", "prompt": "x", "n": true}', 400),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": 1e3}', 400),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        (b'{"model": "tiny", "prompt": {"a": 1}}', 400),
        (b'{"model": "tiny", "prompt": null}', 400),
        (b'{"model": "../../../etc/passwd", "prompt": "x"}', 404),
        (b'{"model": "' + b"x" * 300 + b'", "prompt": "x"}', 400),
        (b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"a": ' * 50_000, 400),
        (b'"' + b'\\"' * 500_000, 400),
        (b"[" + b"[1]," * 200_000 + b"[1]]", 400),
        (b'{"model": "tiny", "prompt": [' + b"1," * 900_000 + b"1]}", 400),
        (b"x" * 10_000_000, 413),
        (b"", 400), (b"null", 400), (b"[]", 400), (b"{", 400), (b"\x00", 400), (b'{"model": "tiny"}', 400),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_hostile_bodies_are_refused_quickly(served, client, content, status):
    begin = time.monotonic()
    in_envelope(post(served, content), status)
    assert time.monotonic() - begin < 10
    assert client.completions.create(model="tiny", prompt="Ada", max_tokens=1).choices


def test_a_body_without_a_length_is_counted_while_it_comes(served):
    def endless():
        for _ in range(10_000):
            yield b" " * 1000

    in_envelope(post(served, endless()), 413)
    for length in ("-1", "1e3", "9" * 30):
        with closing(connect(served)) as connection:
            connection.sendall(POST + f"Content-Length: {length}\r\n\r\n".encode())
            assert b" 4" in connection.recv(100)


def connect(served):
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(20)
    return connection


def test_slow_clients_are_left(served, monkeypatch, client):
    monkeypatch.setattr(security, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(security, "BODY_SECONDS", 0.2)
    with closing(connect(served)) as silent, closing(connect(served)) as halting:
        halting.sendall(POST + b"Content-Length: 50\r\n\r\n{")
        silent.sendall(b"GET /health HTT")
        assert client.completions.create(model="tiny", prompt="Ada", max_tokens=1).choices  # meanwhile
        assert halting.recv(100).startswith(b"HTTP/1.1 408")
        assert silent.recv(100) == b""


def test_long_headers_are_refused(served, client):
    with closing(connect(served)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000 + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 4")
    assert client.models.list().data


def test_nesting_is_measured_outside_of_texts():
    assert not deeper_than(2, b'{"a": ["[[[[", "\\"[[[", "}}}"]}')
    assert deeper_than(2, b'{"a": [[')
    assert not deeper_than(3, b'{"a": [[')
    assert not deeper_than(1, b"[][][]{}{}")
    begin = time.monotonic()
    assert not deeper_than(32, b'"' + b'\\"' * 1_000_000)
    assert time.monotonic() - begin < 5
    assert deeper_than(32, b"[" * 33)
    assert not deeper_than(32, b"[" * 32)


def test_the_answer_to_bad_input_does_not_repeat_it(served):
    answer = post(served, json.dumps({"model": "tiny", "prompt": "x", "n": "secret" * 1000}))
    assert "secret" not in answer.text


def test_paths_that_do_not_exist_and_methods_that_are_not_served(served):
    http = served.http()
    assert in_envelope(http.get("/v1/files"), 404)["code"] == "not_found"
    in_envelope(http.get("/docs"), 404)
    in_envelope(http.get("/v1/completions"), 405)
    in_envelope(http.get("/../../etc/passwd"), 404)
    assert served.http().get("/openapi.json").status_code == 200
