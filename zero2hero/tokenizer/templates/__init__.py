"""Chat templates by name, for tokenizers that come without one: the formats of well-known models.

Each is a file of this folder, written to give the same text as the model's own. A format is of use only where a
tokenizer has its special tokens (`alpaca` needs none but EOS): `set_chat_template` refuses it elsewhere, for a model
would have to spell an `<|im_end|>` that is no token, and would never be stopped by it.
"""

from __future__ import annotations

from pathlib import Path

from zero2hero.errors import UserError, did_you_mean
from zero2hero.tokenizer.tokenizer import Tokenizer

# name -> the tokens without which the format does not work
TEMPLATES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama3.1": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "zephyr": (),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "alpaca": (),
}
_CLOSED_BY_EOS = ("llama2", "mistral", "zephyr", "alpaca")


def built_in_template(name: str) -> str:
    """The Jinja source of a built-in template; `UserError` for a name that is not in `TEMPLATES`."""
    if name not in TEMPLATES:
        raise UserError(
            f"unknown chat template '{name}'.{did_you_mean(name, TEMPLATES)} Built in: {', '.join(TEMPLATES)}."
        )
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")


def set_chat_template(tokenizer: Tokenizer, template: str | None = None) -> None:
    """Give the tokenizer a chat template.

    Args:
        tokenizer: it is changed.
        template: a built-in name, or the path of a .jinja file. None keeps the tokenizer's own, and without one takes
            ChatML if the tokenizer has its tokens.

    Raises:
        UserError: an unknown name, no such file, a built-in format whose special tokens the tokenizer lacks, or
            nothing to choose by itself.
    """
    if template is None:
        if tokenizer.chat_template is None:
            if _missing(tokenizer, "chatml"):
                raise UserError(
                    "this model has no chat template and no tokens for ChatML: name a format "
                    f"({', '.join(TEMPLATES)}) or a .jinja file; 'alpaca' needs no special tokens but EOS."
                )
            tokenizer.chat_template = built_in_template("chatml")
        return
    if template.endswith(".jinja"):
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template {template}: {error}.") from None
        return
    source = built_in_template(template)
    if missing := _missing(tokenizer, template):
        raise UserError(f"the chat template '{template}' needs tokens that this tokenizer lacks: {', '.join(missing)}.")
    tokenizer.chat_template = source


def _missing(tokenizer: Tokenizer, name: str) -> list[str]:
    special = tokenizer.special_tokens
    missing = [token for token in TEMPLATES[name] if token not in special]
    if name in _CLOSED_BY_EOS and tokenizer.special_token("eos_token") not in special:
        missing.append("an eos_token")
    return missing
