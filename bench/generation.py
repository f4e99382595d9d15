"""Tokens per second of greedy generation, against transformers' `generate`.

    python bench/generation.py [--rounds 5] [--new_tokens 128] [--threads 2] [--size 12M]

A Llama shape of 12.2M parameters (width 384, 6 layers, 6 heads, vocabulary 4096) or of 110M (width 768, 12 layers, 12
heads, vocabulary 32000, bf16 alone), batch 1 and 8, fp32, bf16 and int8 (with bf16 for all but the layers' matrices),
the contestants in turns in one process. transformers runs in two settings: as it comes, and with a static cache
under inference_mode (its best without compiling). In fp32 the greedy tokens must be equal; in bf16 each of ours must
be within rounding of the best according to transformers' own logits. The share of the memory bandwidth is
the bytes of the weights, read once per step, over the time of a step, relative to reading as many bytes with `sum`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from common import interleaved, ratio, record, table

PROMPT_TOKENS = 16
SHAPES = {
    "12M": {"vocab_size": 4096, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
            "intermediate_size": 1024},
    "110M": {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 2048},
}  # fmt: skip
NAMES = {"12M": "generation", "110M": "generation_110M"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=list(SHAPES), default="12M")
    options = parser.parse_args()

    from zero2hero.machine import prepare

    prepare()
    import torch

    torch.set_num_threads(options.threads)
    results = []
    for dtype in (torch.float32, torch.bfloat16) if options.size == "12M" else (torch.bfloat16,):
        ours, theirs = models(dtype, options.size)
        for batch in (1, 8):
            results += compare(ours, theirs, batch, options.new_tokens, options.rounds)
    print(table(results))
    print(
        "written to", record(NAMES[options.size], results, prompt_tokens=PROMPT_TOKENS, new_tokens=options.new_tokens)
    )


def models(dtype, size: str = "12M") -> tuple[Any, Any]:
    """The same random weights in both libraries.

    The head is the embedding shifted by one row, so that the likeliest token stands out as a trained model's does.
    """
    import torch
    from transformers import LlamaForCausalLM

    from zero2hero.models import Decoder, DecoderConfig, init_weights, save_pretrained

    config = DecoderConfig(
        **SHAPES[size], max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.05,
        model_type="llama",
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.normal_(0.0, 0.01, generator=generator)
        model.lm_head.weight.copy_(model.embed_tokens.weight.roll(1, 0))
    model.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model.eval(), theirs


def compare(ours, theirs, batch: int, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row per contestant."""
    import torch

    from zero2hero.generate.decode import generate_tokens
    from zero2hero.generate.sampling import SamplingConfig
    from zero2hero.tune import quantize_int8

    prompts = torch.randint(0, 4096, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(2))
    greedy = SamplingConfig(temperature=0, max_new_tokens=new_tokens)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    attention_mask = torch.ones_like(prompts)

    def zero2hero(model: Any = ours) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in range(batch)]
        for token in generate_tokens(model, prompts.tolist(), greedy):
            texts[token.row].append(token.id)
        return texts

    def transformers(**more: Any) -> list[list[int]]:
        output = theirs.generate(prompts, attention_mask=attention_mask, **settings, **more)
        return output[:, PROMPT_TOKENS:].tolist()

    def transformers_best() -> list[list[int]]:
        with torch.inference_mode():
            return transformers(cache_implementation="static", disable_compile=True)

    contestants: dict[str, Callable[[], Any]] = {
        "transformers": transformers,
        "transformers, static cache": transformers_best,
        "zero2hero": zero2hero,
    }
    if ours.embed_tokens.weight.dtype == torch.bfloat16:
        int8 = quantize_int8(copy.deepcopy(ours))
        contestants["zero2hero, int8"] = lambda: zero2hero(int8)
    check(theirs, prompts, zero2hero(), transformers())
    times = interleaved(contestants, rounds)
    dtype = str(ours.embed_tokens.weight.dtype).removeprefix("torch.")
    size = ours.embed_tokens.weight.element_size()
    weights = dict.fromkeys(times, ours.config.num_matrix_parameters * size)
    if "zero2hero, int8" in times:
        weights["zero2hero, int8"] = ours.config.num_matrix_parameters + ours.lm_head.weight.numel() * (size - 1)
    step = {name: statistics.median(t) / new_tokens for name, t in times.items()}
    return [
        {
            "dtype": dtype,
            "batch": batch,
            "who": name,
            "tokens_per_s": round(batch / step[name], 1),
            "zero2hero is faster by": round(ratio(t, times["zero2hero"]), 2),
            "share of bandwidth": round(weights[name] / step[name] / bandwidth(weights[name]), 3),
        }
        for name, t in times.items()
    ]


def bandwidth(size: int) -> float:
    """Bytes per second of reading `size` bytes again and again, the best of several."""
    import torch

    data = torch.ones(size // 4)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def check(theirs, prompts, ours: list[list[int]], reference: list[list[int]]) -> None:
    """Stop unless the greedy tokens are equal; in bf16, unless each is within rounding of the best."""
    import torch

    if ours == reference:
        return
    if theirs.dtype == torch.float32:
        raise SystemExit("the greedy tokens differ from transformers' in fp32: the comparison would mean nothing")
    ids = torch.cat([prompts, torch.tensor(ours)], 1)
    with torch.no_grad():
        logits = theirs(ids).logits[:, PROMPT_TOKENS - 1 : -1].float()
    chosen = logits.gather(-1, torch.tensor(ours)[..., None])[..., 0]
    behind = float((logits.amax(-1) - chosen).max())
    rounding = 2**-6 * float(logits.abs().max())
    if behind > rounding:
        raise SystemExit(f"a greedy token in bf16 is {behind:.3f} below transformers' best (rounding: {rounding:.3f})")


if __name__ == "__main__":
    main()
