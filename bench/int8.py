"""What int8 costs in quality: perplexity of held-out text, as the engine reads it, in fp32, bf16 and int8.

    python bench/int8.py --model FOLDER --text FILE [--characters 200000] [--window 256]

The engine's int8 rounds the layers' matrices and also what they multiply (native/int8.c); so it is the engine that is
asked, for the log-probability of each token of windows of the text, first tokens excepted. The aim: within 0.5 % of
bf16. How fast it is, bench/generation.py says.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from common import record, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--characters", type=int, default=200_000)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()

    from zero2hero.machine import prepare

    prepare()
    from zero2hero.language_model import load

    text = Path(options.text).read_text(encoding="utf-8")[-options.characters :]
    results = []
    for dtype, int8 in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
        lm = load(options.model, "cpu", dtype, load_in_8bit=int8)
        perplexity, tokens = perplexity_of(lm, lm.tokenizer.encode(text), options.window)
        results.append({"layers": "int8" if int8 else dtype, "the rest": dtype, "perplexity": round(perplexity, 5)})
    for row in results:
        row["against bf16"] = round(row["perplexity"] / results[1]["perplexity"] - 1, 6)
    print(table(results))
    names = {"model": Path(options.model).name, "text": Path(options.text).name}
    print("written to", record(f"int8_{names['model']}", results, tokens=tokens, window=options.window, **names))


def perplexity_of(lm, ids: list[int], window: int) -> tuple[float, int]:
    """Over whole windows of `ids`; also how many tokens were judged."""
    from zero2hero.generate.engine import Engine, Request, SamplingParams
    from zero2hero.generate.native_reader import NativeReader

    engine = Engine(lm, max_batch_size=1, max_cached_tokens=2 * window)
    if not isinstance(engine.reader, NativeReader):
        raise SystemExit("the native step does not read this model here: int8 would round less than it does there")
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    total, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        [sequence] = engine.run([Request(ids[start : start + window], params)])
        total -= sum(token.logprob for token in sequence.prompt_logprobs[1:])
        count += window - 1
    return math.exp(total / count), count


if __name__ == "__main__":
    main()
