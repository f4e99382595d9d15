"""`zero2hero data inspect FILE`: what a set of training data is, what of it would be trained, and what looks wrong.

Masks and lengths decide what a fine-tuned model learns, and neither can be seen in the file. So a few records are shown
as the model will read them, what is trained in green (between « and » where there are no colours).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from zero2hero.data.conversations import Record, Turns, recognize
from zero2hero.data.examples import Example, encode_pair, encode_record
from zero2hero.data.messages import Messages, text_of
from zero2hero.data.packed import pack
from zero2hero.data.sources import open_source
from zero2hero.errors import UserError
from zero2hero.options import DataInspectConfig
from zero2hero.progress import visible
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template

OFTEN = 0.1  # one answer to so many records is worth a word
LITTLE = 0.05  # so small a share of trained tokens, too
_BATCH = 8  # rows, when padding is counted
_VOCAB_SIZE, _SAMPLE = 4096, 2_000  # of a tokenizer trained on the data's first records


@dataclass
class Findings:
    """What was found in the records, one by one."""

    records: list[Record] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # what no record could be made of, and why
    examples: list[Example] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspect(config: DataInspectConfig) -> None:
    """Print all that there is to say."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    found = _read(config)
    if not found.records:
        raise UserError(
            f"no record was understood; the first: {found.refused[0] if found.refused else 'there is none'}"
        )
    tokenizer, whose = _tokenizer(config, found.records)
    _encode(found, tokenizer)
    _say_what_it_is(console, found)
    for example in found.examples[: config.samples]:
        console.print(f"\nrecord {example.number}, what is trained in green:")
        console.print(coloured(example, tokenizer, console.is_terminal))
    if found.examples:
        _say_lengths(console, found.examples, config.max_length, whose)
    warnings = [*found.warnings, *_doubtful(found, tokenizer)]
    console.print("\nwhat looks wrong:" if warnings else "\nnothing looks wrong.")
    for warning in warnings:
        console.print(f"  - {visible(warning)}")


def _read(config: DataInspectConfig) -> Findings:
    found = Findings()
    for number, (row, where) in enumerate(open_source(config.data, split=config.split).rows(), start=1):
        try:
            found.records.append(recognize(row, number, where))
        except UserError as error:
            found.refused.append(str(error))
    return found


def _tokenizer(config: DataInspectConfig, records: list[Record]) -> tuple[Tokenizer, str]:
    if config.model is not None:
        tokenizer, whose = Tokenizer.from_pretrained(config.model), config.model
    else:
        texts = ["\n".join(_texts(record)) for record in records[:_SAMPLE]]
        tokenizer, whose = (
            Tokenizer.train(texts, _VOCAB_SIZE),
            "a tokenizer trained on this data; --model takes another",
        )
    if any(_turns(record) for record in records):
        calls = config.model is None and any(message.get("tool_calls") for r in records for message in _turns(r))
        set_chat_template(tokenizer, config.chat_template or ("qwen" if calls else None))  # ChatML knows no tools
    return tokenizer, whose


def _encode(found: Findings, tokenizer: Tokenizer) -> None:
    """Examples of all records that can be trained on; of a preference, the prompt with the better answer."""
    failed = []
    for record in found.records:
        try:
            if record.kind == "preference":
                pair = encode_pair(record, tokenizer)
                weights = np.repeat(np.array([0, 1], dtype=np.float32), [len(pair.prompt), len(pair.chosen)])
                found.examples.append(Example(np.concatenate([pair.prompt, pair.chosen]), weights, record.number))
            elif record.kind != "prompt":
                judged = record.kind == "unpaired"
                answered = replace(record, kind="completion") if judged else record
                found.examples.append(encode_record(answered, tokenizer))
        except UserError as error:
            failed.append(str(error))
    if failed:
        found.warnings.append(f"{len(failed)} records cannot be trained on; the first: {failed[0]}")


# --- what is said -------------------------------------------------------------------------------------------


def _say_what_it_is(console: Console, found: Findings) -> None:
    for (kind, shape), count in Counter((record.kind, record.shape) for record in found.records).most_common():
        console.print(f"{count} records of the shape {shape} ({kind})")
    turns = [len(record.messages) for record in found.records if record.messages]
    if turns:
        console.print(
            f"{min(turns)} to {max(turns)} messages in a conversation, {sum(turns) / len(turns):.1f} on average"
        )
    counts = {
        "a system message": sum(any(m["role"] == "system" for m in _turns(record)) for record in found.records),
        "tools": sum(record.tools is not None for record in found.records),
        "images": sum(any(isinstance(m["content"], list) for m in _turns(record)) for record in found.records),
        "weights of turns": sum(any("weight" in m for m in _turns(record)) for record in found.records),
    }
    for what, count in counts.items():
        if count:
            console.print(f"{count} with {what}")
    other = Counter(str(name) for record in found.records for name in record.other)
    if other:
        console.print(f"columns that are not used: {visible(', '.join(other))}")


def coloured(example: Example, tokenizer: Tokenizer, colours: bool) -> Text:
    """The example's text with what is trained in green, or between « and »."""
    text = Text()
    trained = (example.weights > 0).astype(int)
    for run in np.split(np.arange(len(example)), np.flatnonzero(np.diff(trained)) + 1):
        piece = visible(tokenizer.decode(example.ids[run], skip_special_tokens=False))
        if not trained[run[0]]:
            text.append(piece, "dim" if colours else "")
        else:
            text.append(piece if colours else f"«{piece}»", "bold green" if colours else "")
    return text


def _say_lengths(console: Console, examples: list[Example], max_length: int, whose: str) -> None:
    lengths = np.array([len(example) for example in examples])
    trained = sum(int((example.weights[1:] > 0).sum()) for example in examples)
    console.print(f"\ntokens ({whose}): {lengths.sum()}, of which {trained / lengths.sum():.0%} are trained")
    edges = 2 ** np.arange(int(np.log2(lengths.min())), int(np.log2(lengths.max())) + 2)
    counts = np.histogram(lengths, edges)[0]
    for low, high, count in zip(edges, edges[1:], counts):
        console.print(f"  {low:>6} to {high - 1:<6} {count:>6} {'█' * round(40 * count / counts.max())}")
    cut = lengths > max_length
    lost = sum(int((example.weights[max_length:] > 0).sum()) for example in examples)
    gone = sum(not example.weights[1:max_length].any() for example in examples)
    console.print(
        f"max_length {max_length} cuts {cut.sum()} records ({cut.mean():.1%}) and {lost} trained tokens"
        + (f"; of {gone} records nothing trained is left, and they are left out" if gone else "")
    )
    inputs = np.minimum(lengths, max_length) - 1
    rows = pack(inputs, max_length - 1, np.arange(len(inputs)))
    alone = np.sort(inputs)
    widths = np.maximum.reduceat(alone, np.arange(0, len(alone), _BATCH)) * _BATCH
    share = inputs.sum() / (widths.sum() - alone[-1] * (-len(alone) % _BATCH))
    packed = inputs.sum() / (len(rows) * (max_length - 1))
    console.print(
        f"of the tokens in a batch {packed:.0%} are no padding with packing ({len(rows)} rows), {share:.0%} without "
        f"({len(inputs)} rows, {_BATCH} of like length in a batch)"
    )


def _doubtful(found: Findings, tokenizer: Tokenizer) -> Iterator[str]:
    """What looks wrong, in words."""
    records, refused = found.records, found.refused
    if refused:
        yield f"{len(refused)} records were not understood; the first: {refused[0]}"
    contents = Counter(json.dumps(_everything(record), sort_keys=True, default=repr) for record in records)
    if len(contents) < len(records):
        yield f"{len(records) - len(contents)} records are copies of others"
    empty = [r for r in records if any(m["role"] == "user" and not m["content"] for m in _turns(r))]
    if empty:
        yield f"{len(empty)} records hold a user's turn without text; the first: {empty[0].where}"
    answer, count = Counter(_answer(record) for record in records).most_common(1)[0]
    if answer and count > max(1, OFTEN * len(records)):
        yield f"{count} records have the same answer, {answer[:60]!r}"
    same = [record for record in records if record.kind == "preference" and record.chosen == record.rejected]
    if same:
        yield f"{len(same)} records reject the answer that they choose; the first: {same[0].where}"
    named = [r for r in records if any(tokenizer.special_tokens_pattern.search(text) for text in _texts(r))]
    if named:
        first = named[0].where
        yield f"{len(named)} records have special tokens in their texts, which the model will obey; the first: {first}"
    encoded = {example.number for example in found.examples}
    yield from _hidden([record for record in records if record.number in encoded], tokenizer)
    weights = [example.weights for example in found.examples]
    share = sum((w > 0).sum() for w in weights) / max(1, sum(map(len, weights)))
    if weights and share < LITTLE:
        yield f"only {share:.1%} of the tokens are trained: the rest is computed for nothing; are prompts repeated?"


def _hidden(records: list[Record], tokenizer: Tokenizer) -> Iterator[str]:
    """Messages that the template does not show, and a beginning that it leaves out."""
    for record in [r for r in records if r.messages and r.messages[0]["role"] == "system"][:1]:
        text = tokenizer.apply_chat_template(record.messages, tokenize=False, tools=record.tools)
        if text_of(record.messages[0]).strip() not in text:
            yield f"the chat template does not show the system message of {record.where}"
    for record in [r for r in records if r.messages][:1]:
        ids = tokenizer.apply_chat_template(record.messages, tools=record.tools)
        begins = tokenizer.encode("")[:1]
        if begins and begins == [tokenizer.bos_token_id] and ids[:1] != begins:
            yield "the chat template does not begin with BOS, with which this tokenizer begins other texts"


# --- parts of records ---------------------------------------------------------------------------------------


def _turns(record: Record) -> Messages:
    """All messages of a record; none if it holds texts."""
    turns: list[Turns] = [record.messages, record.prompt, record.completion, record.chosen, record.rejected]
    return [message for part in turns if isinstance(part, list) for message in part]


def _texts(record: Record) -> list[str]:
    parts = (record.text, record.prompt, record.completion, record.chosen, record.rejected)
    return [text_of(message) for message in _turns(record)] + [part for part in parts if isinstance(part, str)]


def _everything(record: Record) -> list[Any]:
    return [_turns(record), _texts(record), record.label, record.tools]


def _answer(record: Record) -> str:
    turns = record.messages or record.completion or record.chosen
    return text_of(turns[-1]) if isinstance(turns, list) and turns else str(turns or "")
