"""Chat templates: a conversation as the one text that a model was trained to read.

A template is a Jinja program that comes with a model. It is somebody else's code, so it runs in jinja2's immutable
sandbox, where it can read the messages and build a string, and nothing else: no attributes that begin with an
underscore, no changes to what it is given, no files. It sees plain data alone, texts and numbers in lists and mappings,
for the methods of other objects might do more. What templates may call beside Jinja's own, and how white space is
trimmed, is as in transformers, so that the text is the same to the last character.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from zero2hero.errors import UserError

Message = Mapping[str, Any]

GENERATION_MARKS = ("_generation_begins", "_generation_ends")  # variables of a template, see `_compiled`

_MARK = "\ue000 "  # where a text to be continued ends; the space shows whether the template trims


def is_conversation(value: Any) -> bool:
    """Whether this is a list of messages, {"role": ..., ...} in turn, at least one."""
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def extended(content: Any, text: str) -> Any:
    """A message's content with more text at its end, where it is a text or parts of which the last one is.

    Raises `UserError` where it is not.
    """
    if isinstance(content, str):
        return content + text
    last = content[-1] if isinstance(content, (list, tuple)) and content else None
    if isinstance(last, Mapping) and isinstance(last.get("text"), str):
        return [*content[:-1], {**last, "text": last["text"] + text}]
    raise UserError("the last message has no text to continue")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    **more: Any,
) -> str:
    """The conversation as text.

    Args:
        template: Jinja source.
        messages: {"role": ..., "content": ...} in turn.
        add_generation_prompt: end with what begins the assistant's turn.
        continue_final_message: end where the last message ends, its turn still open.
        special_tokens: bos_token, eos_token, ... as the template may name them.
        **more: what else the template asks for (tools, documents, enable_thinking, ...).

    Raises:
        UserError: messages of another form, a template that is broken, or one that refuses the conversation.
    """
    if not is_conversation(messages):
        raise UserError('a conversation is a list of messages like {"role": "user", "content": "..."}, at least one')
    if continue_final_message:
        if add_generation_prompt:
            raise UserError(
                "add_generation_prompt begins a new message, continue_final_message none: ask for one of them"
            )
        messages = [*messages[:-1], {**messages[-1], "content": extended(messages[-1].get("content"), _MARK)}]
    given = {"tools": None, "documents": None} | more
    given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        text = _compiled(template).render(as_plain_data({**(special_tokens or {}), **given}))
    except Exception as error:  # a program of somebody else's can fail in every way
        where = f" (line {error.lineno} of the template)" if hasattr(error, "lineno") else ""
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template cannot render this conversation: {what}{where}") from None
    return _open_end(text) if continue_final_message else text


def _open_end(text: str) -> str:
    end = text.rfind(_MARK.strip())
    if end < 0:
        raise UserError("the chat template leaves out the last message, so it cannot be continued")
    return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()


def as_plain_data(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain_data(item) for item in value]
    return str.__str__(value) if isinstance(value, str) else f"<{type(value).__name__}>"


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks what an assistant wrote; the text inside stays as it is.

        Around it stand two variables, which are nothing unless somebody asks for the marks (see turns.py).
        """

        tags = {"generation"}  # noqa: RUF012 (jinja2's own way to declare it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            begin, end = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in GENERATION_MARKS)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope([begin, *body, end], lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise jinja2.TemplateError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which is not safe")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return sandbox.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    """Jinja's own would escape <, > and & for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
