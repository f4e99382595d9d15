"""From what a request says to token ids, with every text of the user's as text.

A chat template turns a conversation into one text in which special tokens mark the turns. Somebody who writes
`<|im_end|>` in a message must not end a turn with it. So special tokens in messages are hidden before the template runs
and put back behind it, in pieces of the text that are encoded with no special tokens at all.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from zero2hero.serve.errors import ApiError
from zero2hero.tokenizer.patterns import SpecialSplitter

if TYPE_CHECKING:
    from PIL.Image import Image

    from zero2hero.generate.engine import Engine
    from zero2hero.language_model import LanguageModel
    from zero2hero.serve.schema import ChatMessage, Sampling, Tool
    from zero2hero.tokenizer import Tokenizer

BYTES_PER_TOKEN = 8  # more than texts have; a text with more of them than the context is refused before it is encoded

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"


def served(engine: Engine, adapter: str | None = None) -> LanguageModel:
    """The model behind an engine, wearing that adapter: here always one with a tokenizer."""
    return cast("LanguageModel", engine.wearing(adapter))


def text_ids(lm: LanguageModel, text: str) -> list[int]:
    """A plain text's ids, begin-of-text token included."""
    check_size(lm, len(text.encode()))
    ids = lm.tokenizer.encode(text, split_special_tokens=True)
    return ids or [i for i in (lm.tokenizer.bos_token_id,) if i is not None]


def all_prompts(lm: LanguageModel, given: str | Sequence[Any]) -> list[list[int]]:
    """A text, token ids, or a list of either, as lists of ids."""
    if isinstance(given, str):
        return [text_ids(lm, given)]
    if isinstance(given[0], int):
        return [list(given)]
    return [text_ids(lm, prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]


def chat_ids(
    lm: LanguageModel, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), images: Sequence[Image] = ()
) -> list[int]:
    """A conversation's ids, up to where the assistant's answer begins; `images` are those of its parts, in order.

    Raises:
        UserError: the model has no chat template, or its template refuses the conversation.
    """
    plain = [_with_blind_images(message.model_dump(exclude_none=True)) for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    check_size(lm, len(json.dumps([plain, described], ensure_ascii=False).encode()))
    conversation = [_plain_message(message) for message in plain]
    if "tools" not in (lm.tokenizer.chat_template or ""):  # a template that knows no tools: they are told in words
        conversation, described = _in_words(conversation, described), []
    hidden = _Hidden(lm.tokenizer, lm.eyes.mark if lm.eyes else None)
    conversation = hidden.hide(conversation)
    if lm.eyes:
        conversation = _with_parts(conversation, lm.tokenizer.chat_template or "", lm.eyes.mark)
    text = lm.tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, tools=hidden.hide(described) or None
    )
    if lm.eyes is None:
        return hidden.encode(text)
    ids, begin = hidden.encode(lm.eyes.placed(text, images)), lm.tokenizer.bos_token_id
    begins = begin is not None and lm.tokenizer.encode("")[:1] == [begin] != ids[:1]  # such templates leave it out
    return lm.eyes.expand([begin, *ids] if begins else ids)  # type: ignore[list-item]


def check_size(lm: LanguageModel, size: int) -> None:
    context = lm.model.config.max_position_embeddings
    if size > BYTES_PER_TOKEN * context + 4096:
        raise too_long(f"the input has {size:,} bytes", context)


def check_context(lm: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int | None) -> None:
    """Raises `ApiError` where a prompt and what is to be written do not fit into the model's context."""
    context, longest = lm.model.config.max_position_embeddings, max(map(len, prompts))
    vocabulary = lm.model.config.vocab_size
    if any(max(prompt, default=0) >= vocabulary for prompt in prompts):
        raise ApiError(400, f"the model knows token ids 0 to {vocabulary - 1}", param="prompt", code="invalid_value")
    # the last token that is written is never read
    if longest + max(max_tokens or 0, 1) - 1 > context:
        written = f" and {max_tokens} to be written" if max_tokens else ""
        raise too_long(f"there are {longest} tokens{written}", context)


def too_long(what: str, context: int) -> ApiError:
    message = f"This model's maximum context length is {context} tokens; {what}."
    return ApiError(400, message, param="messages", code="context_length_exceeded")


def sampling_settings(lm: LanguageModel, body: Sampling) -> dict[str, Any]:
    """The settings of `SamplingParams` that a request gives, or else the model's generation_config.json."""
    known = lm.generation_config
    greedy = body.temperature is None and known.get("do_sample") is False
    default = {"temperature": 0.0 if greedy else known.get("temperature") or 1.0, "top_p": known.get("top_p") or 1.0,
               "top_k": known.get("top_k") or 0, "min_p": known.get("min_p") or 0.0,
               "repetition_penalty": known.get("repetition_penalty") or 1.0}  # fmt: skip
    given = {name: value for name in default if (value := getattr(body, name)) is not None}
    settings = default | given | {
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or (),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "min_new_tokens": body.min_tokens or 0,
        "ignore_eos": bool(body.ignore_eos),
        "seed": None if body.seed is None else body.seed % 2**64,
    }  # fmt: skip
    settings["top_k"] = max(settings["top_k"], 0)  # other servers write "off" as -1
    return settings


class _Hidden:
    """Special tokens that stand in a user's texts, under names that no text contains."""

    def __init__(self, tokenizer: Tokenizer, mark: str | None = None) -> None:
        self.tokenizer, self.name = tokenizer, secrets.token_hex(8)
        special = {tokenizer.id_to_token(i) for i in tokenizer.all_special_ids} | {mark}
        self.split = SpecialSplitter(token for token in special if token)
        self.found: list[str] = []

    def hide(self, value: Any) -> Any:
        if isinstance(value, str):
            return "".join(self._named(part) if i % 2 else part for i, part in enumerate(self.split(value)))
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        return [self.hide(inner) for inner in value] if isinstance(value, list) else value

    def _named(self, token: str) -> str:
        self.found.append(token)
        return f"[{self.name}:{len(self.found) - 1}]"

    def encode(self, rendered: str) -> list[int]:
        """The ids of a rendered text: the template's special tokens as such, hidden ones as the text that they are."""
        if not self.found:
            return self.tokenizer.encode(rendered, add_special_tokens=False)
        ids: list[int] = []
        for i, part in enumerate(self.split(rendered)):
            part = re.sub(rf"\[{self.name}:(\d+)\]", lambda name: self.found[int(name[1])], part)
            if part:
                ids += self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=not i % 2)
        return ids


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: text as one string, arguments of called tools as an object."""
    if message["role"] == "developer":
        message["role"] = "system"
    content = message.get("content", "")
    if isinstance(content, list) and not any(part["type"] == "image" for part in content):
        content = "".join(part["text"] for part in content)
    message["content"] = content
    for call in message.get("tool_calls", []):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError:
            raise ApiError(400, "the arguments of a called tool are not JSON", param="messages") from None
    return message


def _with_blind_images(message: dict[str, Any]) -> dict[str, Any]:
    """The message with {"type": "image"} for each image, as templates know it, and texts side by side as one."""
    if isinstance(message.get("content"), list):
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if "text" not in part:
                parts.append({"type": "image"})
            elif parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part["text"]
            else:
                parts.append({"type": "text", "text": part["text"]})
        message["content"] = parts
    return message


def _with_parts(conversation: list[dict[str, Any]], template: str, mark: str) -> list[dict[str, Any]]:
    """Every content as the parts that the template goes through; or as one text, where it knows of no parts."""
    out = []
    for message in conversation:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if "type" not in template:
            out.append(message | {"content": "".join(part.get("text", mark) for part in parts)})
        else:
            out.append(message | {"content": parts})
    return out


def _in_words(conversation: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools, calls and their results as texts of ordinary messages."""
    out = []
    for message in conversation:
        role, content = message["role"], message["content"]
        for call in message.pop("tool_calls", []):
            content += f"{TOOL_CALL}\n{json.dumps(call['function'], ensure_ascii=False)}\n{TOOL_CALL_END}"
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        out.append({"role": role, "content": content})
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        told = (
            f"You can call these tools:\n{listed}\nTo call one, answer with\n"
            f'{TOOL_CALL}\n{{"name": NAME, "arguments": ARGUMENTS}}\n{TOOL_CALL_END}'
        )
        if out[0]["role"] == "system":
            out[0]["content"] += f"\n\n{told}"
        else:
            out.insert(0, {"role": "system", "content": told})
    return out


def require(condition: bool, message: str, param: str) -> None:
    if not condition:
        raise ApiError(400, message, param=param, code="invalid_value")
