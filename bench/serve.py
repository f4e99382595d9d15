"""The server under load: listening, 64 streams at once, waiting times, and 8 clients against one at a time.

    python bench/serve.py [--seconds 60] [--threads 2]

The model is a Llama shape of 12M parameters with random weights, in fp32. Server and clients are two processes on the
same cores. "listens" is the time from starting the process to the first byte of /health (aim: below 1.0 s); the streams
ask for 64 tokens each and begin anew when they have ended, for so many seconds, and none may fail; throughput is tokens
per second of 8 clients who stream at once, against the same requests one after the other (aim: 3x), in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx2
from common import ROOT, ratio, record, table

TOKENS = 64
PROMPT = "One day, a little fox found a red ball near the river and"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        results: dict[str, Any] = {}
        listens = []
        for _ in range(5):
            with running(folder, options.threads) as (_, seconds):
                listens.append(seconds)
        results["listens s"] = statistics.median(listens)
        with running(folder, options.threads) as (url, _):
            while httpx2.get(f"{url}/health").status_code != 200:
                time.sleep(0.1)
            results |= asyncio.run(load(url, options.seconds))
            results |= asyncio.run(throughput(url))
    print(table([{"what": name, "value": value} for name, value in results.items()]))
    print("written to", record("serve", results, seconds=options.seconds, tokens=TOKENS))


def make_model(folder: str) -> None:
    from zero2hero.data.worlds import stories
    from zero2hero.language_model import LanguageModel, save
    from zero2hero.models import Decoder, DecoderConfig, init_weights
    from zero2hero.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([stories.__doc__ or "", PROMPT] * 50, vocab_size=400)
    config = DecoderConfig(
        vocab_size=4096, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024,
        max_position_embeddings=512, tie_word_embeddings=False, model_type="llama",
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, seed=0)
    save(LanguageModel(model, tokenizer), folder)


@contextlib.contextmanager
def running(folder: str, threads: int) -> Iterator[tuple[str, float]]:
    """A server's address, and the seconds until the first byte of its /health."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    words = ["serve", folder, "--served_model_name", "model", "--port", "0", "--max_batch_size", "64"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "zero2hero", *words, "--dtype", "fp32"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        httpx2.get(f"{url}/health")
        yield url, time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


async def stream(client: httpx2.AsyncClient, seed: int) -> list[float]:
    """The moments at which the pieces of one answer came, the first entry being that of the request."""
    body = {"model": "model", "prompt": PROMPT, "max_tokens": TOKENS, "stream": True, "seed": seed, "ignore_eos": True}
    moments, last = [time.perf_counter()], ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                if "error" in json.loads(line[6:]):
                    raise SystemExit(f"a stream failed: {line}")
                moments.append(time.perf_counter())
            last = line or last
    if last != "data: [DONE]" or len(moments) != TOKENS + 1:
        raise SystemExit(f"a stream ended after {len(moments) - 1} pieces with {last!r}")
    return moments


def client(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=64))


async def load(url: str, seconds: float) -> dict[str, Any]:
    """64 streams at once, each begun anew until the time is over."""
    finished: list[list[float]] = []

    async def keep_asking(http: httpx2.AsyncClient, number: int) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            finished.append(await stream(http, number))

    async with client(url) as http:
        start = time.perf_counter()
        await asyncio.gather(*(keep_asking(http, number) for number in range(64)))
        took = time.perf_counter() - start
    first = [moments[1] - moments[0] for moments in finished]
    between = [b - a for moments in finished for a, b in itertools.pairwise(moments[1:])]
    return {
        "64 streams: answers": len(finished),
        "64 streams: tokens/s": len(finished) * TOKENS / took,
        "64 streams: p95 to first token s": statistics.quantiles(first, n=20)[-1],
        "64 streams: p95 between tokens s": statistics.quantiles(between, n=20)[-1],
    }


async def throughput(url: str, rounds: int = 5) -> dict[str, Any]:
    together, alone = [], []
    async with client(url) as http:
        for number in range(rounds + 1):
            start = time.perf_counter()
            await asyncio.gather(*(stream(http, seed) for seed in range(8)))
            middle = time.perf_counter()
            for seed in range(8):
                await stream(http, seed)
            if number:  # the first round is not counted
                together.append(middle - start)
                alone.append(time.perf_counter() - middle)
    return {
        "8 clients: tokens/s": 8 * TOKENS / statistics.median(together),
        "one at a time: tokens/s": 8 * TOKENS / statistics.median(alone),
        "8 clients against one at a time": ratio(alone, together),
    }


if __name__ == "__main__":
    main()
