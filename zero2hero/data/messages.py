"""One normal form for the messages of a conversation, whatever tool wrote them down.

    {"role": "system" | "user" | "assistant" | "tool", "content": str or parts}

as OpenAI's API and all chat templates have it. An assistant's message may have `tool_calls` (their arguments a mapping,
as templates want them), `reasoning_content`, and a `weight` for its tokens in training. Parts are
{"type": "text", "text": ...} and {"type": "image", "image": path, URL or picture}; texts alone become one string.

Understood as well: ShareGPT's {"from": "human", "value": ...} with function_call and observation; `train` and
`loss_weight` for `weight`; parts of LLaMA-Factory's ({"type", "value"}, reasoning and tool calls among them); `<image>`
in texts beside a column of images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from zero2hero.errors import UserError

Messages = list[dict[str, Any]]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool", "function_response": "tool",
}  # fmt: skip
_IMAGE = "<image>"


def normal_messages(value: Any, where: str, images: Sequence[Any] | None = None) -> Messages:
    """The messages in normal form.

    Args:
        value: a list of messages of any form named above, or the same as JSON.
        where: the record, for errors.
        images: what `<image>` in the texts stands for, in order.

    Raises:
        UserError: no such list, an unknown role, content of another kind, more or fewer images than places for them.
    """
    value = parsed(value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        raise UserError(
            f'{where}: expected a list of messages like {{"role": ..., "content": ...}}, found {value!r:.60}.'
        )
    left = list(images or [])
    messages = [_message(message, f"{where}, turn {i}", left) for i, message in enumerate(value, start=1)]
    if left:
        raise UserError(f"{where}: {len(left)} images more than places for them ({_IMAGE} or a part of type image).")
    return messages


def check_order(messages: Messages, where: str) -> None:
    """Refuse what no model can learn from: `UserError` that names the turn and says what to change.

    A system message that is not the first, an assistant's turn without anything in it, no turn of a user.
    """
    for i, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and i > 1:
            second = "a second system message" if messages[0]["role"] == "system" else "the system message"
            raise UserError(f"{where}: turn {i} is {second}; there can be one, and it comes first.")
        if role == "assistant" and not (_has_text(message["content"]) or message.get("tool_calls")):
            raise UserError(f"{where}: turn {i}, the assistant's, is empty: write it, or leave the record out.")
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: no turn of a user: an answer needs something to answer.")


def parsed(value: Any) -> Any:
    """What a text is as JSON, if it is a list or mapping in JSON; tables hold messages and tools so."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def text_of(message: Mapping[str, Any]) -> str:
    """The texts of a message, without its images."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _message(given: Mapping[str, Any], where: str, images: list[Any]) -> dict[str, Any]:
    given = {key: value for key, value in given.items() if value is not None}  # tables fill up with nothing
    name = given.get("role", given.get("from"))
    role = ROLES.get(str(name).lower())
    if role is None:
        known = ", ".join(ROLES)
        raise UserError(f"{where}: unknown role {name!r}. Known roles: {known}.")
    content = given.get("content", given.get("value", ""))
    message: dict[str, Any] = {"role": role}
    if name == "function_call":
        message |= {"content": "", "tool_calls": _tool_calls(content, where)}
    else:
        message |= _content(content, where, images)
    if given.get("tool_calls"):
        message["tool_calls"] = _tool_calls(given["tool_calls"], where)
    for key in ("reasoning_content", "name", "tool_call_id"):
        if key in given:
            message[key] = given[key]
    weight = _weight(given, where)
    if role == "assistant" and weight is not None:
        message["weight"] = weight
    elif weight and "weight" in given:
        raise UserError(f"{where}: weight {weight} on the turn of a {role}: only the assistant's turns are trained.")
    return message


def _content(content: Any, where: str, images: list[Any]) -> dict[str, Any]:
    """`content`, and what else the parts may hold."""
    parts = [content] if isinstance(content, (str, Mapping)) else content
    if not isinstance(parts, (list, tuple)):
        raise UserError(f"{where}: the content is {content!r:.60}; expected text, or a list of parts.")
    found: dict[str, Any] = {}
    normal: Messages = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type", "text")
        value = part.get(kind, part.get("value", part.get("text")))
        if kind == "text" and isinstance(value, str):
            normal += _split_images(value, images, where)
        elif kind in ("image", "image_url"):
            normal.append({"type": "image", "image": _image(value, images, where)})
        elif kind in ("reasoning", "thinking"):
            found["reasoning_content"] = found.get("reasoning_content", "") + str(value)
        elif kind == "tool_call":
            found.setdefault("tool_calls", []).extend(_tool_calls(value, where))
        else:
            raise UserError(f"{where}: a part of type {kind!r} is not understood; known: text, image, image_url.")
    if any(part["type"] == "image" for part in normal):
        return {"content": normal, **found}
    return {"content": "".join(part["text"] for part in normal), **found}


def _split_images(text: str, images: list[Any], where: str) -> Messages:
    """A text with `<image>` in it as parts, where there are images to put there."""
    if not images or _IMAGE not in text:
        return [{"type": "text", "text": text}]
    first, *rest = text.split(_IMAGE)
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image", "image": _image(None, images, where)}, {"type": "text", "text": piece}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _image(value: Any, images: list[Any], where: str) -> Any:
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if value is not None:
        return value
    if not images:
        raise UserError(f"{where}: a place for an image, but no image is left in the record's images.")
    return images.pop(0)


def _tool_calls(value: Any, where: str) -> Messages:
    value = parsed(value)
    calls = value if isinstance(value, (list, tuple)) else [value]
    normal = []
    for call in calls:
        call = parsed(call)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f'{where}: a tool call is {{"name": ..., "arguments": {{...}}}}, not {call!r:.60}.')
        one = {
            "type": "function",
            "function": {"name": function["name"], "arguments": parsed(function.get("arguments", {}))},
        }
        normal.append(one | ({"id": call["id"]} if call.get("id") else {}))
    return normal


def _weight(given: Mapping[str, Any], where: str) -> float | None:
    for key in ("weight", "train", "loss_weight"):
        if key in given:
            try:
                weight = float(given[key])
            except (TypeError, ValueError):
                weight = -1.0
            if not 0 <= weight < float("inf"):
                raise UserError(f"{where}: {key} is {given[key]!r}; expected a number of at least 0, or true or false.")
            return weight
    return None


def _has_text(content: Any) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)
