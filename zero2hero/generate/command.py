"""`zero2hero generate`: continue a text on the terminal, streaming when there is one answer to show."""

from __future__ import annotations

from zero2hero.language_model import load
from zero2hero.options import GenerateConfig


def run(config: GenerateConfig) -> None:
    """Print the continuation(s) of the prompt."""
    from zero2hero import machine

    machine.prepare()
    lm = load(
        config.model, config.device, config.dtype, load_in_4bit=config.load_in_4bit, load_in_8bit=config.load_in_8bit
    )
    settings = {
        name: getattr(config, name)
        for name in (
            "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed",
            "num_return_sequences",
        )
    }  # fmt: skip
    if config.num_return_sequences == 1:
        lm.generate(config.prompt, stream=True, **settings)
        return
    for number, text in enumerate(lm.generate([config.prompt], **settings), start=1):
        print(f"--- {number} ---\n{text}\n")
