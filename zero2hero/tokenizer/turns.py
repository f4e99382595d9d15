"""Which characters of a rendered conversation the assistant has to write: the mask, read off the rendering itself.

A chat template is a program, so nobody can know from its source what it does with a message. But it can be tried. The
conversation is rendered once more with a mark in place of each text of users and assistant (and of each called tool's
name). What this *skeleton* shows between the marks is the template's own; it must come back, piece by piece, around
the real texts, and so each text's place is known and not guessed. Around an assistant's texts, its turn

- begins where the template, asked for a generation prompt after the messages before, would stop writing, and
- ends with the end-of-turn token, the special token that stands first behind the answer of the plainest conversation;
  it is looked for in what a conversation that ends with this turn shows behind its texts.

That is what a model is given and has to write when it answers (all of the header, if the template prompts with none).
Each step is checked: a template that trims texts or
hides thinking of earlier turns still gives a right mask; one that changes texts, leaves a turn out, or begins a turn
otherwise than it prompts for one is refused. Templates that mark what they generate (`{% generation %}`) are believed.

A skeleton depends on a conversation's form, seldom on its words, so it is kept: most conversations are rendered once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zero2hero.errors import UserError
from zero2hero.tokenizer.chat import GENERATION_MARKS, Message, as_plain_data

if TYPE_CHECKING:
    from zero2hero.tokenizer.tokenizer import Tokenizer

THINKING_ENDS = "</think>"  # templates look for it, so a text is marked behind it

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = re.compile("\ue001([0-9]+)\ue002")  # of characters that no template and hardly a text contains
_BEGIN, _END = "\ue003", "\ue004"

Turn = tuple[int, int, int]  # the message's number, and the characters [begin, end) that the assistant writes


def assistant_turns(tokenizer: Tokenizer, messages: Sequence[Message], **more: Any) -> tuple[str, list[Turn]]:
    """The conversation as text, and where in it the assistant's turns are.

    Args:
        tokenizer: with the chat template.
        messages: {"role": ..., "content": ...} in turn; turns with a `weight` of 0 are not looked for.
        **more: what else the template asks for (tools, enable_thinking, ...).

    Raises:
        UserError: the template cannot render the conversation, or what it renders does not show where a turn is.
    """
    weights = {i: m.get("weight", 1) for i, m in enumerate(messages) if m.get("role") == "assistant"}
    wanted = [i for i, weight in weights.items() if weight]
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    if _GENERATION.search(tokenizer.chat_template or ""):
        return text, _marked_by_the_template(tokenizer, messages, weights, text, more)
    marked, texts = _with_marks(messages)
    form = json.dumps([marked, wanted, as_plain_data(more)])
    skeleton = _skeleton(
        tokenizer, tokenizer.chat_template, form, int(time.time()) // 60
    )  # templates may show the time
    places = _match(text, skeleton, texts)
    return text, [
        (i, places[begin.piece] + begin.offset, places[end.piece] + end.offset) for i, begin, end in skeleton.turns
    ]


def _marked_by_the_template(
    tokenizer: Tokenizer, messages: list[Message], weights: dict[int, float], text: str, more: dict[str, Any]
) -> list[Turn]:
    more = more | dict(zip(GENERATION_MARKS, (_BEGIN, _END)))
    marked = tokenizer.apply_chat_template(messages, tokenize=False, **more)
    found = list(re.finditer(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}", marked))
    if marked.replace(_BEGIN, "").replace(_END, "") != text or len(marked) != len(text) + 2 * len(found):
        raise UserError("the chat template changes what it marks with {% generation %}")
    turns = list(weights)
    if len(found) != len(turns):
        if len(set(weights.values())) > 1:
            raise UserError(f"the chat template marks {len(found)} texts in {len(turns)} turns of different weights")
        turns = turns[:1] * len(found)
    spans = [(mark.start() - 2 * number, mark.end() - 2 * number - 2) for number, mark in enumerate(found)]
    return [(i, *span) for i, span in zip(turns, spans) if weights[i]]


# --- marks --------------------------------------------------------------------------------------------------


def _with_marks(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[str]]:
    """The conversation with marks for texts, and the texts by the marks' numbers, which rise with the messages."""
    texts: list[str] = []

    def mark(text: Any, keep: str = "") -> Any:
        if not isinstance(text, str) or not text:
            return text
        head, end, tail = text.rpartition(keep) if keep else ("", "", text)
        tail = tail.lstrip("\n") if end else tail
        texts.append(tail)
        return f"{text[: len(text) - len(tail)]}{_mark(len(texts) - 1)}"

    def part(value: Any) -> Any:
        return value | {"text": mark(value["text"])} if isinstance(value, dict) and "text" in value else value

    marked = []
    for message in as_plain_data(messages):
        role, content = message.get("role"), message.get("content")
        if role in ("user", "assistant") and isinstance(content, list):
            message["content"] = [part(value) for value in content]
        elif role in ("user", "assistant"):
            message["content"] = mark(content, THINKING_ENDS if role == "assistant" else "")
        for call in message.get("tool_calls") or []:
            call = call.get("function", call)
            call["name"] = mark(call.get("name"))
        message["marks"] = len(texts)  # how many there are up to here
        marked.append(message)
    return marked, texts


def _mark(number: int) -> str:
    return f"\ue001{number}\ue002"


# --- the skeleton -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    piece: int
    offset: int


@dataclass(frozen=True)
class _Skeleton:
    """pieces[0] mark pieces[1] mark ... pieces[-1]; and the turns by places in the pieces."""

    pieces: tuple[str, ...]
    marks: tuple[int, ...]
    turns: tuple[tuple[int, _Place, _Place], ...]


@lru_cache(maxsize=256)
def _skeleton(tokenizer: Tokenizer, template: str, form: str, minute: int) -> _Skeleton:
    messages, wanted, more = json.loads(form)
    counts = [0, *(message.pop("marks") for message in messages)]  # marks before message i, and at last all

    def render(until: int, **prompt: Any) -> tuple[list[str], list[int]]:
        parts = _MARK.split(tokenizer.apply_chat_template(messages[:until], tokenize=False, **more, **prompt))
        return parts[::2], [int(number) for number in parts[1::2]]

    pieces, marks = render(len(messages))
    for i, message in enumerate(messages):
        missing = set(range(counts[i], counts[i + 1])).difference(marks)
        if missing:
            what = "a tool call or the text" if message.get("tool_calls") else "the text"
            raise UserError(f"the chat template leaves out {what} of {_name(messages, i)}")
    end_of_turn = _end_of_turn(tokenizer, json.dumps(more), template) if wanted else ""
    turns = []
    for i in wanted:
        own = list(range(counts[i], counts[i + 1]))
        if i == 0 or not own:
            what = "is empty" if i else "answers nothing: begin with the user, or give it weight 0"
            raise UserError(f"{_name(messages, i)} {what}")
        first = marks.index(own[0])
        before, prompt = render(i, add_generation_prompt=True)
        begin = _begin(pieces, first, marks[first - 1] if first else None, before[-1], prompt[-1] if prompt else None)
        if begin is None:
            raise UserError(
                f"the chat template begins {_name(messages, i)} otherwise than it prompts for one "
                f"({pieces[first][-60:]!r} and {before[-1][-60:]!r}), so what the model has to write is not known"
            )
        last = first + len(own)  # the piece behind its last mark
        alone, shown = render(i + 1)
        if marks[first:last] != own or marks.count(own[0]) > 1 or shown[-1] != own[-1]:
            raise UserError(f"the chat template repeats or reorders {_name(messages, i)}")
        turns.append((i, _Place(first, begin), _Place(last, _end(tokenizer, alone[-1], pieces[last], end_of_turn))))
    return _Skeleton(tuple(pieces), tuple(marks), tuple(turns))


def _begin(pieces: list[str], piece: int, mark: int | None, prompt: str, prompt_mark: int | None) -> int | None:
    """Where in the piece before an answer the generation prompt ends, given what it shows behind the same last mark."""
    if mark != prompt_mark:
        return None
    if pieces[piece].startswith(prompt):
        return len(prompt)
    return len(pieces[piece]) if prompt.startswith(pieces[piece]) else None  # a prompt that also begins the answer


def _end(tokenizer: Tokenizer, alone: str, piece: str, end_of_turn: str) -> int:
    """Where in the piece behind an answer its turn ends, given what stands there when the conversation ends with it."""
    same = common_prefix(alone, piece)
    special = list(tokenizer.special_tokens_pattern.finditer(alone))
    whole = [token for token in special if token.end() <= same]
    ends = [token for token in whole if token[0] == end_of_turn] or whole[-1:]
    if ends:
        return ends[0].end()
    cut = min([same, *(token.start() for token in special)])  # such a template closes the last turn alone
    return len(alone[:cut].rstrip())


@lru_cache(maxsize=256)
def _end_of_turn(tokenizer: Tokenizer, more: str, template: str) -> str:
    """The special token that ends the assistant's turn in the plainest of conversations."""
    plain = [{"role": "user", "content": _mark(0)}, {"role": "assistant", "content": _mark(1)}]
    text = tokenizer.apply_chat_template(plain, tokenize=False, **json.loads(more))
    behind = text.partition(_mark(1))[2]
    token = tokenizer.special_tokens_pattern.search(behind)
    if token is None:
        raise UserError(
            f"the chat template ends the assistant's turn with {behind!r}, which is no special token here, "
            "so a model would not learn to stop. Add the token, or end the turn with {{ eos_token }}"
        )
    return token[0]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements both begin with."""
    both = zip(one, other)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def _name(messages: Sequence[Message], i: int) -> str:
    return f"turn {i + 1} ({messages[i]['role']})"


# --- the real texts in the skeleton -------------------------------------------------------------------------


def _match(text: str, skeleton: _Skeleton, texts: list[str]) -> list[int]:
    """Where each piece of the skeleton begins in `text`."""
    first, *pieces = skeleton.pieces
    at, places = len(first), [0]
    fits = text.startswith(first) and (bool(pieces) or text == first)
    for number, (mark, piece) in enumerate(zip(skeleton.marks, pieces), start=1):
        length = _shown(text, at, texts[mark], piece, number == len(pieces)) if fits else None
        if length is None:
            near = texts[mark][:40]
            raise UserError(
                f"the chat template changes texts, near {near!r}: it does not show what the assistant wrote"
            )
        places.append(at + length)
        at += length + len(piece)
    return places


def _shown(text: str, at: int, original: str, piece: str, last: bool) -> int | None:
    """How many characters of `text` from `at` on, up to `piece`, show the original or a part of it."""

    def fits(length: int) -> bool:
        return text.startswith(piece, at + length) and (not last or at + length + len(piece) == len(text))

    for way in _ways(original):
        if text.startswith(way, at) and fits(len(way)):
            return len(way)
    length = (len(text) - len(piece) if last else text.find(piece, at)) - at
    part = text[at : at + max(length, 0)].strip()
    return length if part and part in original and fits(length) else None


def _ways(text: str) -> list[str]:
    """How templates show a text: as it is, trimmed, or as JSON."""
    trimmed = [text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.rstrip("\n"), text.lstrip("\n")]
    return [text, *trimmed, json.dumps(text, ensure_ascii=False)[1:-1]]
