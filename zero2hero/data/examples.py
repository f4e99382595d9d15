"""From a record to the tokens of a training example, and how much each of them counts.

- A conversation is rendered by the model's chat template; the tokens of the assistant's turns are trained, each with
  its turn's weight, the end-of-turn token included (see tokenizer/turns.py).
- A prompt with its completion is one text, and the completion is trained; so is the end-of-text token behind it.
- A text is trained whole, with its end-of-text token.

The ids are those of the whole text, as the model will see it. Which of them are trained follows from the characters
that each stands for; one that holds the last character before an answer and the first of it belongs to the answer.

T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zero2hero.data.conversations import Record, Turns
from zero2hero.data.messages import Messages
from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.turns import assistant_turns, common_prefix


@dataclass(frozen=True)
class Example:
    """What is trained on: `ids` int64 [T]; `weights` float32 [T], of each token as something to predict.

    `number` is the record's, `images` those of its messages, in order.
    """

    ids: np.ndarray
    weights: np.ndarray
    number: int = 0
    images: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Encoded:
    """The examples of many records, and what `max_length` took from them.

    `cut` counts records that were longer, `lost` the trained tokens that were cut off; `dropped` names the records of
    which no trained token was left.
    """

    examples: list[Example] = field(default_factory=list)
    cut: int = 0
    lost: int = 0
    dropped: list[str] = field(default_factory=list)

    def report(self, max_length: int) -> str:
        """What was cut, as a sentence; empty when nothing was."""
        if not self.cut:
            return ""
        count = len(self.examples) + len(self.dropped)
        text = (
            f"{self.cut} of {count} records are longer than max_length {max_length}: {self.lost} trained tokens cut off"
        )
        if self.dropped:
            text += (
                f", {len(self.dropped)} records left out for nothing trained was left (the first: {self.dropped[0]})"
            )
        return text


def encode_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    assistant_only_loss: bool = True,
    completion_only_loss: bool = True,
    mask_history: bool = False,
) -> Encoded:
    """The examples of all records, each cut to its first `max_length` tokens. For the rest see `encode_record`.

    Raises:
        UserError: as `encode_record`; or of no record anything trained is left.
    """
    if max_length is not None and max_length < 2:
        raise UserError(
            f"max_length is {max_length}; an example has at least 2 tokens, one to read and one to predict."
        )
    encoded = Encoded()
    for record in records:
        example = encode_record(
            record,
            tokenizer,
            assistant_only_loss=assistant_only_loss,
            completion_only_loss=completion_only_loss,
            mask_history=mask_history,
        )
        if max_length is not None and len(example) > max_length:
            encoded.cut += 1
            encoded.lost += int((example.weights[max_length:] > 0).sum())
            example = Example(example.ids[:max_length], example.weights[:max_length], example.number, example.images)
            if not example.weights.any():
                encoded.dropped.append(record.where)
                continue
        encoded.examples.append(example)
    if not encoded.examples:
        raise UserError(
            f"nothing to train on: {encoded.report(max_length)}. Raise max_length."
            if max_length and encoded.dropped
            else "nothing to train on: the data holds no record."
        )
    return encoded


def encode_record(
    record: Record,
    tokenizer: Tokenizer,
    *,
    assistant_only_loss: bool = True,
    completion_only_loss: bool = True,
    mask_history: bool = False,
) -> Example:
    """One record's example, of whatever length.

    Args:
        record: a conversation, a completion or a text.
        tokenizer: with a chat template, if there are messages.
        assistant_only_loss: of conversations, train the assistant's turns alone, and not all tokens.
        completion_only_loss: of completions, train the completion alone, and not the prompt.
        mask_history: of conversations, train the last turn of the assistant alone.

    Raises:
        UserError: with the record's place. It is of a kind that is trained otherwise; its template cannot render it or
            does not show the assistant's turns; it begins with two BOS; or no token of it would be trained.
    """
    try:
        if record.kind == "conversation":
            example = _conversation(record, record.messages, tokenizer, assistant_only_loss, mask_history)
        elif record.kind == "completion" and isinstance(record.completion, list):
            messages = [message | {"weight": 0.0} for message in record.prompt] + record.completion  # type: ignore[operator]
            example = _conversation(record, messages, tokenizer, completion_only_loss, mask_history)
        elif record.kind == "completion":
            prompt, completion = str(record.prompt), str(record.completion)
            example = _text(record, prompt + completion, len(prompt) if completion_only_loss else 0, tokenizer)
        elif record.kind == "text":
            example = _text(record, record.text, 0, tokenizer)
        else:
            raise UserError(f"this record ({record.shape}) is no demonstration to be imitated: it has no single answer")
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    if not example.weights[1:].any():
        raise UserError(
            f"{record.where}: no token of this record would be trained: no turn of the assistant has a weight."
        )
    return example


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it; int64 [P], [C] and [R]."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    number: int = 0


def encode_pair(record: Record, tokenizer: Tokenizer, max_length: int | None = None) -> Pair:
    """The tokens of a preference record, as TRL cuts them (DPOTrainer.tokenize_row).

    The prompt is what the template shows with a generation prompt, an answer what the whole conversation has more. A
    token of the prompt that changes when an answer follows belongs to the answers. Texts get the end-of-text token
    behind the answer. `max_length` is that of prompt and answer together.

    Raises:
        UserError: another kind of record; no token of the prompt stays; nothing of an answer left within `max_length`.
    """
    if record.kind != "preference":
        raise UserError(f"{record.where}: this record ({record.shape}) has no chosen and rejected answer.")
    try:
        prompt, chosen, rejected = _answered(record, {"chosen": record.chosen, "rejected": record.rejected},
                                             tokenizer, max_length)  # fmt: skip
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    return Pair(prompt, chosen, rejected, record.number)


def encode_answer(record: Record, tokenizer: Tokenizer, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, completion) of a record that has them, liked or not, in tokens; else as `encode_pair`."""
    if record.kind not in ("completion", "unpaired"):
        raise UserError(f"{record.where}: this record ({record.shape}) has no prompt and completion.")
    try:
        prompt, completion = _answered(record, {"completion": record.completion}, tokenizer, max_length)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from None
    return prompt, completion


def _answered(
    record: Record, answers: dict[str, Turns], tokenizer: Tokenizer, max_length: int | None
) -> list[np.ndarray]:
    """The prompt's tokens, and those of each answer."""
    prompt = _ids(record.prompt, [], record, tokenizer)
    wholes = {name: _ids(record.prompt, answer, record, tokenizer) for name, answer in answers.items()}
    for whole in wholes.values():
        prompt = prompt[: common_prefix(prompt, whole)]
    if not prompt:
        raise UserError("no token of the prompt stays as it is when an answer follows: a prompt has some text")
    for name, whole in wholes.items():
        if len(prompt) >= len(whole[:max_length]):
            raise UserError(f"nothing of the {name} answer is left within max_length {max_length}; raise it")
    cut = [whole[len(prompt) : max_length] for whole in wholes.values()]
    return [np.array(ids, dtype=np.int64) for ids in (prompt, *cut)]


def _ids(prompt: Turns, answer: Turns, record: Record, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, list):
        more: dict[str, Any] = {} if record.tools is None else {"tools": record.tools}
        messages = [{k: v for k, v in message.items() if k != "weight"} for message in [*prompt, *answer]]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=not answer, **more)
    text, end = f"{prompt}{answer or ''}", tokenizer.eos_token_id
    begins = tokenizer.special_token("bos_token")
    ids = tokenizer.encode(text, add_special_tokens=begins is None or not text.startswith(begins))
    return [*ids, end] if answer and end is not None and ids[-1] != end else ids


def _conversation(
    record: Record, messages: Messages, tokenizer: Tokenizer, assistant_only: bool, last_only: bool
) -> Example:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if last_only:
        messages = [m | {"weight": 0.0} if i in answers[:-1] else m for i, m in enumerate(messages)]
    more = {} if record.tools is None else {"tools": record.tools}
    text, turns = assistant_turns(tokenizer, messages, **more)
    ids, spans = tokenizer.encode_with_spans(text)
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise UserError("the chat template begins the text with two BOS")
    weighted = [(begin, end, messages[i].get("weight", 1.0)) for i, begin, end in turns]
    weights = _weights(ids, spans, weighted if assistant_only else [(0, len(text), 1.0)], tokenizer)
    parts = (part for m in messages if isinstance(m["content"], list) for part in m["content"])
    images = tuple(part["image"] for part in parts if part["type"] == "image")
    return Example(np.array(ids, dtype=np.int64), weights, record.number, images)


def _text(record: Record, text: str, trained_from: int, tokenizer: Tokenizer) -> Example:
    begins = tokenizer.special_token("bos_token")
    ids, spans = tokenizer.encode_with_spans(text, add_special_tokens=begins is None or not text.startswith(begins))
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids, spans = [*ids, end], [*spans, (len(text), len(text))]
    weights = _weights(ids, spans, [(trained_from, len(text) + 1, 1.0)], tokenizer)
    return Example(np.array(ids, dtype=np.int64), weights, record.number)


def _weights(
    ids: list[int], spans: list[tuple[int, int]], trained: list[tuple[int, int, float]], tokenizer: Tokenizer
) -> np.ndarray:
    """The weight of each token [T], from the characters it stands for and the weights of ranges of characters."""
    begins, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    special = np.isin(ids, list(tokenizer.all_special_ids))  # one may take white space behind it along
    weights = np.zeros(len(ids), dtype=np.float32)
    for begin, end, weight in trained:
        inside = (begins < end) & np.where((begins == ends) | special, begins >= begin, ends > begin)
        weights[inside] = weight
    return weights
