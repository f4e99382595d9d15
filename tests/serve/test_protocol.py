"""Errors, retries, cut streams, disconnects, and the life of the process: what clients meet when not all is well."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing

import httpx2
import openai
import pytest
from conftest import serving

from zero2hero.generate.engine import Engine
from zero2hero.language_model import load
from zero2hero.serve import worker as workers

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {"model": "tiny", "prompt": "Ada", "max_tokens": 900, "temperature": 1, "extra_body": {"ignore_eos": True}}


# --- while the model is loaded ------------------------------------------------------------------------------


def test_a_server_that_loads_says_so_and_clients_come_back(model_directory):
    loaded = threading.Event()

    def slow() -> Engine:
        loaded.wait(60)
        return Engine(load(model_directory))

    with serving(slow, ready=False) as served:
        for path in ("/health", "/v1/models", "/tokenizer_info"):
            answer = served.http().get(path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "loading_model"
        with pytest.raises(openai.InternalServerError, match="being loaded"):
            served.client().completions.create(model="tiny", prompt="Ada")
        threading.Timer(0.5, loaded.set).start()
        assert served.client(max_retries=5).completions.create(model="tiny", prompt="Ada", max_tokens=1).choices
        assert served.http().get("/health").status_code == 200


# --- the queue ----------------------------------------------------------------------------------------------


def test_a_full_queue_is_told_and_retried(model_directory):
    with serving(lambda: Engine(load(model_directory), max_batch_size=1, max_waiting=1)) as served:
        client = served.client()
        first, second = (client.completions.create(stream=True, **LONG) for _ in range(2))
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**LONG | {"n": 3})  # none of its three texts stays in the queue
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        threading.Timer(0.5, first.close).start()
        threading.Timer(0.6, second.close).start()
        answer = served.client(max_retries=5).completions.create(model="tiny", prompt="Ada", max_tokens=1)
        assert answer.choices[0].finish_reason == "length"
        assert served.idle()


def test_who_waits_too_long_is_sent_away(model_directory, monkeypatch):
    monkeypatch.setattr(workers, "QUEUE_SECONDS", 0.2)
    with serving(lambda: Engine(load(model_directory), max_batch_size=1)) as served:
        first = served.client().completions.create(stream=True, **LONG)
        next(iter(first))
        with pytest.raises(openai.InternalServerError, match="no place was free") as caught:
            served.client().completions.create(model="tiny", prompt="Ada")
        assert caught.value.response.headers["retry-after"]
        first.close()
        assert served.idle()


def test_an_answer_that_takes_too_long_ends_with_an_error(model_directory, monkeypatch):
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.2)
    with serving(lambda: Engine(load(model_directory))) as served:
        step = served.engine.step
        monkeypatch.setattr(served.engine, "step", lambda: (time.sleep(0.02), step())[1])
        with pytest.raises(openai.APIError, match="not complete after"):
            list(served.client().completions.create(stream=True, **LONG))
        assert served.idle()


# --- what fails in the middle -------------------------------------------------------------------------------


def test_an_error_in_mid_stream_is_raised_by_the_client(served, client, monkeypatch):
    step, left = served.engine.step, [4]

    def failing():
        left[0] -= 1
        if left[0] == 0:
            # as the engine does: what runs has ended
            for sequence in served.engine.running:
                served.engine._finish(sequence, "cancelled")
            served.engine.running = []
            raise RuntimeError("the secret of the machine")
        return step()

    monkeypatch.setattr(served.engine, "step", failing)
    stream = client.completions.create(stream=True, **LONG)
    with pytest.raises(openai.APIError, match="failed to write") as caught:
        list(stream)
    assert "secret" not in str(caught.value)
    left[0] = 4
    with served.http().stream(
        "POST", "/v1/completions", json={"model": "tiny", "prompt": "Ada", "stream": True}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert lines[-1] == "data: [DONE]"
    left[0] = 2
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="Ada")
    assert client.completions.create(model="tiny", prompt="Ada", max_tokens=1).choices


def test_a_time_out_is_the_clients(served):
    with pytest.raises(openai.APITimeoutError):
        served.client(timeout=0.05).completions.create(**LONG)
    assert served.idle()


# --- clients that leave -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_within_a_step(served, monkeypatch, stream):
    step, seen = served.engine.step, []

    def watched():
        before = [sequence for sequence in served.engine.running if sequence.cancelled]
        events = step()
        seen.append((len(before), sum(sequence in served.engine.running for sequence in before)))
        return events

    monkeypatch.setattr(served.engine, "step", watched)
    body = {"model": "tiny", "prompt": "Ada", "max_tokens": 900, "n": 3, "stream": stream, "ignore_eos": True}
    data = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    generated = served.engine.counters["generated_tokens"]
    with closing(socket.create_connection((host, int(port)))) as connection:
        connection.sendall(head.encode() + data)
        while served.engine.counters["running"] < 3:
            time.sleep(0.001)
        if stream:
            assert connection.recv(100)
    assert served.idle()
    assert max(before for before, _ in seen) == 3  # all were cancelled, and the next step dropped them
    assert all(still == 0 for _, still in seen)
    assert served.engine.counters["generated_tokens"] - generated < 3 * 900
    assert not served.worker._answers


def test_a_stream_that_is_closed_ends(served, client):
    for _ in range(5):
        with client.completions.create(stream=True, **LONG) as stream:
            next(iter(stream))
    assert served.idle()
    assert not served.worker._answers


def test_hundreds_of_connections_come_and_go(served, client):
    host, port = served.url.removeprefix("http://").split(":")
    begun = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begun += b"Content-Length: 100\r\n\r\n{"
    for group in range(10):
        connections = [socket.create_connection((host, int(port))) for _ in range(50)]
        for number, connection in enumerate(connections):
            connection.sendall([b"", b"GET / HT", begun, b"\x00\xff\r\n\r\n"][number % 4])
        for connection in connections:
            connection.close()
        assert client.completions.create(model="tiny", prompt=f"Ada {group}", max_tokens=1).choices
    until = time.monotonic() + 10
    while len(served.server.server_state.connections) > 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(served.server.server_state.connections) <= 3  # the client keeps one open
    assert served.idle()


# --- the process --------------------------------------------------------------------------------------------

# tells of every connection that the process begins
WATCHED = """
import socket, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo") and "subprocess" not in event:
        print("OUTGOING", event, arguments[1:], flush=True)
sys.addaudithook(hook)
from zero2hero.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(*words: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, "serve", *words, "--port", "0"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, process.stdout.readline().split()[-1].removesuffix("/v1")


def wait_until_ready(url: str, **more) -> None:
    until = time.monotonic() + 60
    while httpx2.get(f"{url}/health", **more).status_code == 503 and time.monotonic() < until:
        time.sleep(0.05)


def test_a_process_listens_answers_and_ends_in_peace(model_directory):
    process, url = start(str(model_directory))
    try:
        assert httpx2.get(f"{url}/health").status_code in (200, 503)  # at once
        wait_until_ready(url)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        stream = client.completions.create(stream=True, **LONG | {"max_tokens": 60})
        pieces = iter(stream)
        next(pieces)
        process.send_signal(signal.SIGTERM)
        assert list(pieces)[-1].choices[0].finish_reason == "length"  # it is written to its end
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGTERM, 143)
    assert "OUTGOING" not in output
    assert "Traceback" not in errors


def test_another_address_demands_a_key(model_directory):
    process, url = start(str(model_directory), "--host", "0.0.0.0")
    try:
        key = process.stdout.readline().split()[-1]
        assert key.startswith("sk-")
        url = url.replace("0.0.0.0", "127.0.0.1")
        wait_until_ready(url)
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        assert openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere/at/all",), "there is no folder"),
        (("MODEL", "--api_key", "short"), "at least 16 characters"),
        (("MODEL", "--host", "256.0.0.1"), "cannot listen"),
    ],
)
def test_what_cannot_be_served_is_one_line(model_directory, words, message):
    words = [str(model_directory) if word == "MODEL" else word for word in words]
    command = [sys.executable, "-m", "zero2hero", "serve", *words, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(served, model_directory):
    port = served.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "zero2hero", "serve", str(model_directory), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--port takes another" in done.stderr
