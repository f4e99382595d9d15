"""A server that has been asked many times needs no more memory than one that has been asked a few times."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

MOST = 3 * 2**20  # bytes; 105 requests that each left 30 kB behind would be more
TOOLS = [{"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {
    "days": {"type": "integer", "maximum": 9}}, "required": ["days"]}}}]  # fmt: skip


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """A server of its own, whose memory is its own: its address and process."""
    words = ["serve", str(folder), "--port", "0", "--max_batch_size", "4", "--metrics", "true", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "zero2hero", *words], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        until = time.monotonic() + 200
        while httpx2.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(30)


def resident(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]


def gauges(url: str) -> dict[str, int]:
    found = re.findall(r"^zero2hero_(running|waiting|cached_tokens) (\d+)$", httpx2.get(f"{url}/metrics").text, re.M)
    return {name: int(value) for name, value in found}


def ask(client: openai.OpenAI, number: int) -> None:
    """Everything that holds memory for a while: texts, streams, calls, forms, streams that are left, refusals."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": f"Ada found ball {number}."}], "seed": number}
    text = {"model": "tiny", "prompt": f"Ball {number * 7919} was lost again.", "max_tokens": 12, "seed": number}
    client.completions.create(**text, n=2, logprobs=3)
    client.chat.completions.create(**chat, max_completion_tokens=12, logprobs=True, top_logprobs=5)
    client.chat.completions.create(**chat, max_completion_tokens=30, tools=TOOLS, tool_choice="required")
    client.chat.completions.create(**chat, max_completion_tokens=12, response_format={"type": "json_object"})
    for _ in client.completions.create(**text, stream=True):
        pass
    with client.completions.create(**text | {"max_tokens": 500}, stream=True) as stream:  # and leaves
        next(iter(stream))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**text | {"max_tokens": 5000})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_requests(model_directory):
    with server(model_directory) as (url, pid), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for number in range(10):
            ask(client, number)
        before = resident(pid)
        for number in range(10, 25):
            ask(client, number)
        grown = resident(pid) - before
        until = time.monotonic() + 10
        while gauges(url) != {"running": 0, "waiting": 0, "cached_tokens": 0}:
            assert time.monotonic() < until, gauges(url)
            time.sleep(0.05)
    assert grown < MOST, f"{grown / 2**20:.1f} MB after 105 further requests"
