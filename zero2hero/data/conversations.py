"""Records of any common shape, recognized by their columns: conversations, completions, texts, preferences.

    messages                            [{"role": "user", "content": "..."}, ...]; tools, images, system beside it
    conversations                       ShareGPT's: [{"from": "human", "value": "..."}, ...]
    instruction, input, output          Alpaca's; also system, history; chosen and rejected in place of output
    question, answer
    prompt, completion (or response)    strings, which no template is put around, or messages
    text
    chosen, rejected                    preferences; the prompt in its own column, or what both begin with
    prompt, completion, label           KTO's: one completion, liked or not; also messages, label
    prompt                              alone: something to answer, for reinforcement learning

These are the shapes of TRL's data sets (https://huggingface.co/docs/trl/dataset_formats), OpenAI's and LLaMA-Factory's.
Whatever else a record holds stays in `Record.other`. Lists may be written as JSON, as tables of text must.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zero2hero.data.files import BadRecords
from zero2hero.data.messages import Messages, check_order, normal_messages, parsed, text_of
from zero2hero.data.sources import Source, open_source
from zero2hero.errors import UserError, did_you_mean
from zero2hero.tokenizer.turns import common_prefix

Turns = str | Messages  # a text, or messages


@dataclass(frozen=True)
class Record:
    """What was recognized in one record.

    Attributes:
        kind: "conversation" (messages), "completion" (prompt, completion), "text" (text), "preference" (prompt, chosen,
            rejected), "unpaired" (prompt, completion, label) or "prompt" (prompt).
        shape: what people call it: "messages", "ShareGPT", "Alpaca", ...
        number: which record it is, from 1.
        where: the same for messages to people: "chats.jsonl, line 3".
        tools: as JSON schemas, for the chat template.
        margin: by how much chosen is better than rejected, where the record says it.
        other: all columns that are not part of the shape.
    """

    kind: str
    shape: str
    number: int
    where: str
    messages: Messages = field(default_factory=list)
    text: str = ""
    prompt: Turns = ""
    completion: Turns = ""
    chosen: Turns = ""
    rejected: Turns = ""
    label: bool | None = None
    margin: float | None = None
    tools: list[Any] | None = None
    other: dict[str, Any] = field(default_factory=dict)


def read_records(
    data: Source | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str = "train",
    on_bad_record: Literal["raise", "skip"] = "raise",
) -> Iterator[Record]:
    """Every record of files, folders or hub data sets (see sources.py), or of an open source, recognized one by one.

    Raises:
        UserError: with the record's place: its shape is unknown, or it breaks the rules of its shape. With
            on_bad_record="skip" such records are left out, and a warning says how many.
    """
    source = data if isinstance(data, Source) else open_source(data, split=split, on_bad_record=on_bad_record)
    bad = BadRecords(on_bad_record == "skip")
    for number, (row, where) in enumerate(source.rows(), start=1):
        try:
            yield recognize(row, number, where)
        except UserError as error:
            if not bad.skip:
                raise
            bad.found(where, str(error).removeprefix(f"{where}: "))
    bad.tell(source.name)


def recognize(row: Any, number: int = 1, where: str = "") -> Record:
    """The record that `row` is; `UserError` if it is none.

    Args:
        row: a mapping of columns, or a bare string, which is a text.
        number, where: which record it is (see `Record`).
    """
    where = where or f"record {number}"
    if isinstance(row, str):
        return Record("text", "text", number, where, text=row)
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with columns, or a text, found {row!r:.60}.")
    columns = {key: value for key, value in row.items() if value is not None}
    for shape in _SHAPES:
        names = [next((name for name in names if name in columns), "") for names in shape.needs]
        if all(names):
            return _Builder(columns, number, where).build(shape, names)
    understood = "; ".join(", ".join(names[0] for names in shape.needs) for shape in _SHAPES)
    known = {name for shape in _SHAPES for names in shape.needs for name in names}
    hint = next((hint for name in row if name not in known and (hint := did_you_mean(str(name), known))), "")
    there = ", ".join(f"'{name}'" for name in row) or "none"
    raise UserError(f"{where}: these columns are no known shape: {there}.{hint} Rename them to one of: {understood}.")


def question_of(record: Record) -> tuple[Turns, dict[str, Any]]:
    """What there is to answer, and what else the record knows, by name: for reinforcement learning and evaluation.

    The answer that a record gives (its last turn, its completion, GSM8K's worked solution) is the column `answer`.

    Raises:
        UserError: the record holds nothing to answer, such as a text.
    """
    if record.kind == "prompt":
        return record.prompt, record.other
    if record.kind == "completion":
        answer = record.completion if isinstance(record.completion, str) else text_of(record.completion[-1])
        return record.prompt, {"answer": answer, **record.other}
    if record.kind == "conversation":
        at = max(i for i, message in enumerate(record.messages) if message["role"] != "assistant") + 1
        given = {"answer": text_of(record.messages[-1])} if at < len(record.messages) else {}
        return record.messages[:at], given | record.other
    raise UserError(f"{record.where}: a {record.kind} is nothing to answer: give prompts, or questions with answers.")


# --- shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    name: str
    needs: tuple[tuple[str, ...], ...]  # each column by the names it may have
    build: Callable[..., dict[str, Any]]


class _Builder:
    """One record's columns, taken out one after the other; what is left is `other`."""

    def __init__(self, columns: dict[str, Any], number: int, where: str):
        self.columns, self.number, self.where = dict(columns), number, where

    def build(self, shape: _Shape, names: list[str]) -> Record:
        needed = [self.columns.pop(name) for name in names]
        self.tools = self._tools()
        images = self.columns.pop("images", None)
        self.images = [images] if isinstance(images, (str, bytes, Mapping)) else list(images or [])
        self.system = self.columns.pop("system", self.columns.pop("system_prompt", ""))
        content = shape.build(self, *needed)
        name = "ShareGPT" if shape.name == "messages" and _is_sharegpt(needed[0]) else shape.name
        return Record(shape=name, number=self.number, where=self.where, tools=self.tools, other=self.columns, **content)

    def _tools(self) -> list[Any] | None:
        tools = parsed(self.columns.pop("tools", None)) or None
        if tools is None:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise UserError(f"{self.where}: tools are a list of JSON schemas, not {tools!r:.60}.")
        return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]

    def text(self, value: Any, column: str) -> str:
        if not isinstance(value, str):
            raise UserError(f"{self.where}: column '{column}' holds {value!r:.60}, expected text.")
        return value

    def turns(self, value: Any, column: str, role: str) -> Turns:
        """A text, or messages (one alone may stand without its list)."""
        value = parsed(value)
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, (list, tuple)):
            return normal_messages(value, self.where, self.images if role == "user" else None)
        return self.text(value, column)

    def with_system(self, messages: Messages) -> Messages:
        system = self.text(self.system, "system")
        if system.strip() and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    def conversation(self, messages: Messages) -> dict[str, Any]:
        messages = self.with_system(messages)
        check_order(messages, self.where)
        return {"kind": "conversation", "messages": messages}

    def preference(self, prompt: Turns, chosen: Turns, rejected: Turns) -> dict[str, Any]:
        if not chosen or not rejected:
            raise UserError(f"{self.where}: chosen or rejected is empty.")
        if isinstance(prompt, list):
            prompt = self.with_system(prompt)
            for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
                check_order(prompt + _as_messages(answer, "assistant"), f"{self.where}, {name}")
            chosen, rejected = _as_messages(chosen, "assistant"), _as_messages(rejected, "assistant")
        margin = self.columns.pop("margin", None)
        if not isinstance(margin, (int, float, type(None))):
            raise UserError(f"{self.where}: margin is {margin!r}; expected a number.")
        margin = None if margin is None else float(margin)
        return {"kind": "preference", "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin}

    def label(self, value: Any) -> bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):
            return value.lower() in ("true", "1")
        if value in (True, False):
            return bool(value)
        raise UserError(f"{self.where}: label is {value!r}; expected true or false.")


def _as_messages(turns: Turns, role: str) -> Messages:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def _is_sharegpt(messages: Any) -> bool:
    messages = parsed(messages)
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], Mapping) and "from" in messages[0]


def _messages(builder: _Builder, value: Any) -> dict[str, Any]:
    return builder.conversation(normal_messages(value, builder.where, builder.images))


def _alpaca_prompt(builder: _Builder, instruction: Any) -> Messages:
    """Earlier exchanges, the instruction, and the input below it."""
    columns = builder.columns
    said = [builder.text(instruction, "instruction")]
    more = columns.pop("input", columns.pop("context", ""))
    said += [more] if builder.text(more, "input").strip() else []
    messages: Messages = []
    for question, answer in parsed(columns.pop("history", [])) or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": "\n\n".join(said)}]


def _alpaca(builder: _Builder, instruction: Any, output: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": builder.text(output, "output")}
    return builder.conversation([*_alpaca_prompt(builder, instruction), answer])


def _question(builder: _Builder, question: Any, answer: Any) -> dict[str, Any]:
    asked, answered = builder.text(question, "question"), builder.text(answer, "answer")
    return builder.conversation([{"role": "user", "content": asked}, {"role": "assistant", "content": answered}])


def _completion(builder: _Builder, prompt: Any, completion: Any) -> dict[str, Any]:
    asked, answered = builder.turns(prompt, "prompt", "user"), builder.turns(completion, "completion", "assistant")
    if isinstance(asked, list) or isinstance(answered, list):
        asked, answered = builder.with_system(_as_messages(asked, "user")), _as_messages(answered, "assistant")
        check_order(asked + answered, builder.where)
    elif not answered.strip():
        raise UserError(f"{builder.where}: the completion is empty: write it, or leave the record out.")
    return {"kind": "completion", "prompt": asked, "completion": answered}


def _unpaired(builder: _Builder, prompt: Any, completion: Any, label: Any) -> dict[str, Any]:
    return _completion(builder, prompt, completion) | {"kind": "unpaired", "label": builder.label(label)}


def _judged(builder: _Builder, value: Any, label: Any) -> dict[str, Any]:
    messages = builder.conversation(normal_messages(value, builder.where, builder.images))["messages"]
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{builder.where}: a labelled conversation ends with the assistant's turn.")
    return {"kind": "unpaired", "prompt": messages[:-1], "completion": messages[-1:], "label": builder.label(label)}


def _preference(builder: _Builder, prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    asked = builder.turns(prompt, "prompt", "user")
    good, bad = builder.turns(chosen, "chosen", "assistant"), builder.turns(rejected, "rejected", "assistant")
    if isinstance(good, list) and isinstance(bad, list):
        if good and bad and good[0]["role"] != "assistant" and bad[0]["role"] != "assistant":  # the prompt once more
            return _split(builder, good, bad)
        asked = _as_messages(asked, "user")
    elif isinstance(asked, str) != isinstance(good, str) or isinstance(good, str) != isinstance(bad, str):
        asked = _as_messages(asked, "user")
    return builder.preference(asked, good, bad)


def _implicit(builder: _Builder, chosen: Any, rejected: Any) -> dict[str, Any]:
    good, bad = builder.turns(chosen, "chosen", "assistant"), builder.turns(rejected, "rejected", "assistant")
    if isinstance(good, str) and isinstance(bad, str):
        if all(text.startswith("\n\nHuman:") for text in (good, bad)):
            return _split(builder, _human_assistant(good), _human_assistant(bad))
        at = common_prefix(good, bad)
        at -= good[at - 1 : at] == " "  # the space belongs to the answer's first word
        return builder.preference(good[:at], good[at:], bad[at:])
    return _split(builder, _as_messages(good, "assistant"), _as_messages(bad, "assistant"))


def _split(builder: _Builder, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """Two conversations as what they have in common and how they go on."""
    same = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return builder.preference(chosen[:same], chosen[same:], rejected[same:])


def _human_assistant(text: str) -> Messages:
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages (https://github.com/anthropics/hh-rlhf)."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


_CHOSEN, _REJECTED = ("chosen", "chosen_messages"), ("rejected", "rejected_messages")
_TALK = ("messages", "conversations", "conversation")
_ANSWER = ("completion", "response")
_SHAPES = (  # the first that fits
    _Shape("preference", (("prompt", "conversations"), _CHOSEN, _REJECTED), _preference),
    _Shape("Alpaca with preference", (("instruction",), _CHOSEN, _REJECTED),
           lambda builder, asked, *answers: _preference(builder, _alpaca_prompt(builder, asked), *answers)),
    _Shape("preference without prompt", (_CHOSEN, _REJECTED), _implicit),
    _Shape("messages with label", (_TALK, ("label",)), _judged),
    _Shape("messages", (_TALK,), _messages),
    _Shape("prompt, completion and label", (("prompt",), _ANSWER, ("label",)), _unpaired),
    _Shape("prompt and completion", (("prompt",), _ANSWER), _completion),
    _Shape("Alpaca", (("instruction",), ("output", "response")), _alpaca),
    _Shape("question and answer", (("question",), ("answer", "response")), _question),
    _Shape("prompt", (("prompt",),), lambda builder, prompt: {
        "kind": "prompt", "prompt": builder.turns(prompt, "prompt", "user")}),
    _Shape("text", (("text",),), lambda builder, text: {"kind": "text", "text": builder.text(text, "text")}),
)  # fmt: skip
