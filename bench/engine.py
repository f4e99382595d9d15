"""Many requests of unequal length, and text that copies: the engine against transformers.

    python bench/engine.py [--rounds 3] [--threads 2] [--dtype float32]

The model and its weights are those of bench/generation.py (12.2M parameters, random). *Ragged*: 64 requests whose
lengths are geometric with mean 64, cut at 256, greedy, all sent at once; useful tokens per second. transformers runs as
a padded static batch, which writes as many tokens for each as for the longest, and with its continuous batching.
*Copying*: a model that always writes the next id; one prompt holds all it will write, the other does not; and the
random model, which repeats itself now and then. With and without prompt lookup; "faster by" is then against without.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Callable
from typing import Any

from common import interleaved, ratio, record, table
from generation import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    from zero2hero.machine import prepare

    prepare()
    import torch

    torch.set_num_threads(options.threads)
    ours, theirs = models(getattr(torch, options.dtype))
    results = [*ragged(ours, theirs, options.rounds), *copying(ours, options.rounds)]
    print(table(results))
    print("written to", record(f"engine_{options.dtype}", results, dtype=options.dtype))


def writer(model: Any) -> Any:
    from zero2hero.generate.decode import Writer

    return Writer(model, frozenset())


def ragged(ours: Any, theirs: Any, rounds: int) -> list[dict[str, Any]]:
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from zero2hero.generate.engine import Engine, Request, SamplingParams

    numbers = random.Random(0)
    prompts = [[numbers.randrange(4096) for _ in range(numbers.randrange(8, 33))] for _ in range(64)]
    lengths = []
    while len(lengths) < 64:
        length = 1
        while numbers.random() > 1 / 64 and length < 256:
            length += 1
        lengths.append(length)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def zero2hero() -> list[list[int]]:
        engine = Engine(writer(ours))
        requests = [
            Request(p, SamplingParams(temperature=0, max_new_tokens=n)) for p, n in zip(prompts, lengths, strict=True)
        ]
        return [sequence.output_ids for sequence in engine.run(requests)]

    def static() -> list[list[int]]:
        with torch.inference_mode():
            output = theirs.generate(
                padded, attention_mask=mask, max_new_tokens=max(lengths), min_new_tokens=max(lengths),
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return [row[longest : longest + n].tolist() for row, n in zip(output, lengths, strict=True)]

    def continuous() -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=256, do_sample=False, eos_token_id=-1, pad_token_id=0)
        blocks = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512)
        with theirs.continuous_batching_context_manager(config, continuous_batching_config=blocks) as manager:
            names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
            done: dict[str, list[int]] = {}
            while len(done) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    done[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching ended before its requests")
        return [done[name] for name in names]

    contestants: dict[str, Callable[[], Any]] = {"transformers, padded static batch": static, "zero2hero": zero2hero}
    try:
        same = continuous()
        contestants["transformers, continuous batching"] = continuous
        print("continuous batching: equal greedy texts", sum(a == b for a, b in zip(same, zero2hero())), "of 64")
    except Exception as error:  # it is made for GPUs first
        print(f"transformers' continuous batching does not run here: {type(error).__name__}: {error}")
    print("static: equal greedy texts", sum(a == b for a, b in zip(static(), zero2hero(), strict=True)), "of 64")
    times = interleaved(contestants, rounds)
    return [
        {
            "what": "64 ragged requests",
            "who": name,
            "tokens_per_s": round(sum(lengths) / statistics.median(t), 1),
            "zero2hero is faster by": round(ratio(t, times["zero2hero"]), 2),
        }
        for name, t in times.items()
    ]


def copying(model: Any, rounds: int) -> list[dict[str, Any]]:
    """Prompt lookup against no lookup. Without its blocks' outputs the model writes the next id, always."""
    from zero2hero.generate.engine import Engine, Request, SamplingParams
    from zero2hero.generate.speculative import PromptLookup

    counting = copy.deepcopy(model)
    for block in counting.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    copied = [500 + i for i in range(160)]  # the prompt holds what will be written
    cases = {
        "text that copies its prompt": (counting, [*copied, *copied[:8]]),
        "text that does not": (counting, [500]),
        "random text": (model, [500]),
    }
    results = []
    for what, (writing, prompt) in cases.items():

        def write(drafter: Any, writing: Any = writing, prompt: list[int] = prompt) -> list[int]:
            engine = Engine(writer(writing), max_batch_size=1, drafter=drafter)
            return engine.run([Request(prompt, SamplingParams(temperature=0, max_new_tokens=128))])[0].output_ids

        assert write(None) == write(PromptLookup())
        times = interleaved({"plain": lambda: write(None), "prompt lookup": lambda: write(PromptLookup())}, rounds)
        for name, t in times.items():
            gain = round(ratio(times["plain"], t), 2)
            speed = round(128 / statistics.median(t), 1)
            results.append({"what": what, "who": name, "tokens_per_s": speed, "zero2hero is faster by": gain})
    return results


if __name__ == "__main__":
    main()
