"""POST /v1/completions: texts, or token ids, and what follows them.

The older of the two APIs, and the one by which models are scored: with `echo` the prompt comes back, with the
log-probability that the model gives each of its tokens. Choices are numbered prompt by prompt, and within a prompt
sample by sample.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from zero2hero.serve.errors import unsupported
from zero2hero.serve.logprobs import TokenSpeller, completion_logprobs
from zero2hero.serve.prompts import all_prompts, check_context, require, sampling_settings, served
from zero2hero.serve.schema import PROMPTS, CompletionRequest
from zero2hero.serve.worker import Worker

if TYPE_CHECKING:
    from zero2hero.generate.engine import Engine, Request

MAX_TOKENS = 16  # the API's default


class Completion:
    """One request: its prompts as the engine's requests, and the chunks of its answer."""

    def __init__(self, engine: Engine, body: CompletionRequest, adapter: str | None = None) -> None:
        from zero2hero.generate.engine import Request, SamplingParams

        self.body, self.lm, self.n = body, served(engine, adapter), body.n or 1
        if body.best_of not in (None, self.n):
            raise unsupported("best_of", "other than n is not supported")
        prompts = all_prompts(self.lm, body.prompt)
        require(len(prompts) * self.n <= PROMPTS, f"prompts times n may be {PROMPTS}", "n")
        max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
        check_context(self.lm, prompts, max_tokens)
        params = SamplingParams(
            max_new_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None,
            **sampling_settings(self.lm, body),
        )  # fmt: skip
        self.requests: list[Request] = [
            Request(prompt, params, adapter, sample) for prompt in prompts for sample in range(self.n)
        ]
        self.frame = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        self.frame["model"] = body.model

    async def chunks(self, worker: Worker) -> AsyncGenerator[dict[str, Any], None]:
        """What a stream of this answer consists of."""
        speller, body = TokenSpeller(self.lm.tokenizer), self.body
        usage = bool(body.stream_options and body.stream_options.include_usage)
        lengths, written = [0] * len(self.requests), 0  # characters of each choice; tokens of all
        begun = [not body.echo] * len(self.requests)
        async with aclosing(worker.write(self.requests)) as events:
            async for number, event in events:
                text = event.text
                found: list[Any] = event.logprobs
                if not begun[number]:
                    prompt = list(self.requests[number].prompt_ids)
                    begun[number] = True
                    text = self.lm.tokenizer.decode(prompt) + text
                    found = [*event.sequence.prompt_logprobs, *found]
                logprobs = None
                if body.logprobs is not None:
                    logprobs = completion_logprobs(speller, found, lengths[number], event.sequence.ids[0])
                lengths[number] += len(text)
                written += len(event.token_ids)
                choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": event.finish_reason}
                yield self.frame | {"choices": [choice]} | ({"usage": None} if usage else {})
        if usage or not body.stream:
            yield self.frame | {"choices": [], "usage": self.usage(written)}

    def usage(self, written: int) -> dict[str, int]:
        read = sum(len(request.prompt_ids) for request in self.requests[:: self.n])
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def whole(self, worker: Worker) -> dict[str, Any]:
        """The answer in one piece."""
        choices: list[dict[str, Any]] = [{} for _ in self.requests]
        last: dict[str, Any] = {}
        async with aclosing(self.chunks(worker)) as chunks:
            async for last in chunks:
                for piece in last["choices"]:
                    _join(choices[piece["index"]], piece)
        return self.frame | {"choices": choices, "usage": last["usage"]}


def _join(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    if not choice:
        choice |= piece
        return
    choice["text"] += piece["text"]
    choice["finish_reason"] = piece["finish_reason"]
    for name, more in (piece["logprobs"] or {}).items():
        choice["logprobs"][name] += more
