"""Records of every common shape, recognized by their columns; and what is refused, with the record's place."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from zero2hero.data.conversations import question_of, read_records, recognize
from zero2hero.data.examples import encode_record, encode_records
from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template

ASK, YES, NO = (
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
    {"role": "assistant", "content": "B"},
)
SYSTEM = {"role": "system", "content": "S"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "shape", "messages"),
    [
        ({"messages": [ASK, YES]}, "messages", [ASK, YES]),
        ({"messages": json.dumps([ASK, YES]), "system": "S"}, "messages", [SYSTEM, ASK, YES]),
        ({"messages": [SYSTEM, ASK, YES], "system": "S"}, "messages", [SYSTEM, ASK, YES]),
        ({"messages": [ASK, YES | {"weight": 0, "tool_calls": None}]}, "messages", [ASK, YES | {"weight": 0.0}]),
        ({"messages": [ASK | {"train": False}, YES | {"train": True}]}, "messages", [ASK, YES | {"weight": 1.0}]),
        ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                            {"from": "gpt", "value": "A"}]}, "ShareGPT", [SYSTEM, ASK, YES]),
        ({"conversations": [{"from": "human", "value": "Q"},
                            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                            {"from": "observation", "value": "7"}, {"from": "gpt", "value": "A"}]},
         "ShareGPT",
         [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "7"}, YES]),
        ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]}]},
         "messages", [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "x"}]}]),
        ({"instruction": "Q", "input": "", "output": "A"}, "Alpaca", [ASK, YES]),
        ({"instruction": "Q", "input": "more", "output": "A", "system": "S", "history": [["1", "2"]]}, "Alpaca",
         [SYSTEM, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
          {"role": "user", "content": "Q\n\nmore"}, YES]),
        ({"question": "Q", "answer": "A"}, "question and answer", [ASK, YES]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, YES]}, "messages", [ASK, YES]),
        ({"messages": [ASK, {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"},
                                                              {"type": "text", "value": "A"}]}]},
         "messages", [ASK, YES | {"reasoning_content": "hm"}]),
        ({"messages": [ASK | {"content": "<image>Q"}, YES], "images": ["1.jpg"]}, "messages",
         [ASK | {"content": [{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "Q"}]}, YES]),
        ({"messages": [ASK | {"content": [{"type": "image"}, {"type": "text", "text": "Q"}]}, YES], "images": [b"x"]},
         "messages", [ASK | {"content": [{"type": "image", "image": b"x"}, {"type": "text", "text": "Q"}]}, YES]),
        ({"messages": [ASK | {"content": [{"type": "image_url", "image_url": {"url": "u"}}]}, YES]}, "messages",
         [ASK | {"content": [{"type": "image", "image": "u"}]}, YES]),
    ],
)  # fmt: skip
def test_conversations(row, shape, messages):
    record = recognize(row, 3)
    assert (record.kind, record.shape, record.messages) == ("conversation", shape, messages)
    assert (record.number, record.where) == (3, "record 3")


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        ("a text", "text", {"text": "a text"}),
        ({"text": "a text", "id": 7}, "text", {"text": "a text", "other": {"id": 7}}),
        ({"prompt": "Q", "completion": "A"}, "completion", {"prompt": "Q", "completion": "A"}),
        ({"prompt": "Q", "response": "A"}, "completion", {"prompt": "Q", "completion": "A"}),
        ({"prompt": [ASK], "completion": [YES]}, "completion", {"prompt": [ASK], "completion": [YES]}),
        ({"prompt": [ASK], "completion": "A"}, "completion", {"prompt": [ASK], "completion": [YES]}),
        ({"prompt": [ASK], "solution": "42"}, "prompt", {"prompt": [ASK], "other": {"solution": "42"}}),
        ({"prompt": "Q", "completion": "A", "label": True},
         "unpaired", {"prompt": "Q", "completion": "A", "label": True}),
        ({"messages": [ASK, YES], "label": "false"},
         "unpaired", {"prompt": [ASK], "completion": [YES], "label": False}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2},
         "preference", {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 2.0}),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
         "preference", {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}),
        ({"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
          "rejected": {"from": "gpt", "value": "B"}},
         "preference", {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}),
        ({"prompt": "Q", "chosen": [ASK, YES], "rejected": [ASK, NO]},
         "preference", {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}),
        ({"chosen": [SYSTEM, ASK, YES, ASK, YES], "rejected": [SYSTEM, ASK, YES, ASK, NO]},
         "preference", {"prompt": [SYSTEM, ASK, YES, ASK], "chosen": [YES], "rejected": [NO]}),
        ({"chosen": "One two three", "rejected": "One two four"},
         "preference", {"prompt": "One two", "chosen": " three", "rejected": " four"}),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
         "preference", {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}),
        ({"instruction": "Q", "input": "", "output": "A", "chosen": "A", "rejected": "B"},
         "preference", {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}),
    ],
)  # fmt: skip
def test_other_kinds(row, kind, fields):
    record = recognize(row)
    assert record.kind == kind
    assert {name: getattr(record, name) for name in fields} == fields


def test_tools():
    assert recognize({"messages": [ASK, YES], "tools": [TOOL]}).tools == [TOOL]
    assert recognize({"messages": [ASK, YES], "tools": json.dumps([TOOL["function"]])}).tools == [TOOL]
    assert recognize({"messages": [ASK, YES], "tools": "[]"}).tools is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "sytem", "content": "S"}, YES]}, "turn 1: unknown role 'sytem'. Known roles: system"),
        ({"messages": [SYSTEM, ASK, SYSTEM, YES]}, "turn 3 is a second system message"),
        ({"messages": [ASK, SYSTEM, YES]}, "turn 2 is the system message; there can be one, and it comes first"),
        ({"messages": [ASK, YES | {"content": " \n"}]}, "turn 2, the assistant's, is empty"),
        ({"question": "Q", "answer": ""}, "turn 2, the assistant's, is empty"),
        ({"messages": [SYSTEM, YES]}, "no turn of a user"),
        ({"messages": []}, "no turn of a user"),
        ({"messages": "Hi"}, "expected a list of messages"),
        ({"messages": [ASK, "Hi"]}, "expected a list of messages"),
        ({"messages": [ASK, YES | {"content": 7}]}, "turn 2: the content is 7"),
        ({"messages": [ASK | {"content": [{"type": "video", "video": "x"}]}, YES]}, "a part of type 'video'"),
        ({"messages": [ASK | {"content": "<image>"}, YES], "images": ["1", "2"]}, "1 images more than places"),
        ({"messages": [ASK | {"content": "<image><image>"}, YES], "images": ["1"]}, "no image is left"),
        ({"messages": [ASK, YES | {"weight": -1}]}, "turn 2: weight is -1"),
        ({"messages": [ASK | {"weight": 1}, YES]}, "turn 1: weight 1.0 on the turn of a user"),
        ({"messages": [ASK, YES | {"tool_calls": ["x"]}]}, "turn 2: a tool call is"),
        ({"messages": [ASK, YES], "tools": "x"}, "tools are a list"),
        (
            {"mesages": [ASK, YES], "id": 1},
            "no known shape: 'mesages', 'id'. Did you mean 'messages'? Rename them to one of:",
        ),
        ({}, "no known shape: none"),
        (7, "expected an object"),
        ({"text": 7}, "column 'text' holds 7"),
        ({"prompt": "Q", "completion": " "}, "the completion is empty"),
        ({"prompt": "Q", "completion": "A", "label": "good"}, "label is 'good'"),
        ({"messages": [ASK], "label": True}, "ends with the assistant's turn"),
        (
            {"prompt": [ASK], "chosen": [YES | {"content": ""}], "rejected": [NO]},
            "chosen: turn 2, the assistant's, is empty",
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "rejected is empty"),
        ({"prompt": [ASK], "chosen": [], "rejected": []}, "rejected is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "much"}, "margin is 'much'"),
    ],
)
def test_what_is_refused(row, says):
    with pytest.raises(UserError, match="record 5") as caught:
        recognize(row, 5)
    assert says in str(caught.value)


def test_files(tmp_path):
    lines = [{"messages": [ASK, YES]}, {"messages": [ASK]}, {"messages": [YES]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"a.jsonl, line 3: no turn of a user"):
        list(read_records(tmp_path / "a.jsonl"))
    with pytest.warns(UserWarning, match=r"left out 1 bad records; the first: .*a.jsonl, line 3: no turn of a user"):
        assert [r.number for r in read_records(tmp_path / "a.jsonl", on_bad_record="skip")] == [1, 2]

    (tmp_path / "b.json").write_text(json.dumps(lines[:2]))
    assert [r.where for r in read_records(tmp_path / "b.json")][1].endswith("b.json, record 2")
    (tmp_path / "c.csv").write_text('question,answer\nQ,"A"\n')
    assert next(read_records(tmp_path / "c.csv")).messages == [ASK, YES]

    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [ASK, YES | {"tool_calls": [CALL]}]}, {"messages": [ASK, YES | {"weight": 0.5}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    first, second = read_records(tmp_path / "d.parquet")
    assert first.messages == [ASK, YES | {"tool_calls": [CALL]}]
    assert second.messages == [ASK, YES | {"weight": 0.5}]


@pytest.mark.parametrize(
    ("file", "kind", "shape", "count", "bad"),
    [
        ("llamafactory/c4_demo.jsonl", "text", "text", 300, 0),
        ("llamafactory/dpo_en_demo.json", "preference", "preference", 300, 0),
        ("llamafactory/glaive_toolcall_en_demo.json", "conversation", "ShareGPT", 300, 0),
        ("llamafactory/identity.json", "conversation", "Alpaca", 91, 0),
        ("llamafactory/kto_en_demo.json", "unpaired", "messages with label", 300, 0),
        ("llamafactory/reason_tool_use_demo_50.jsonl", "conversation", "messages", 50, 0),
        ("llamafactory/v1_dpo_demo.jsonl", "preference", "preference without prompt", 10, 0),
        ("llamafactory/v1_sft_demo.jsonl", "conversation", "messages", 500, 0),
        ("llamafactory_mm/mllm_demo.json", "conversation", "messages", 6, 0),
        ("llamafactory_mm/v1_multimodal_demo.jsonl", "conversation", "messages", 24, 0),
        ("rasbt_instruct/instruction-data.json", "conversation", "Alpaca", 1100, 0),
        ("rasbt_instruct/instruction-data-with-preference.json", "preference", "Alpaca with preference", 1100, 0),
        ("dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl", "completion", "prompt and completion", 600, 0),
        ("hh_rlhf/harmless_base_first1500.jsonl.gz", "preference", "preference without prompt", 1496, 4),
        ("gsm8k/train.jsonl", "conversation", "question and answer", 3000, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left out 4 bad records")
def test_real_files(shared_data, file, kind, shape, count, bad):
    records = list(read_records(shared_data / file, on_bad_record="skip" if bad else "raise"))
    assert Counter((record.kind, record.shape) for record in records) == {(kind, shape): count}
    if bad:
        with pytest.raises(UserError, match=r"the assistant's, is empty"):
            list(read_records(shared_data / file))
    for record in records:
        if kind == "preference":
            assert all(isinstance(turns, list) for turns in (record.prompt, record.chosen, record.rejected))


@pytest.mark.parametrize(
    ("file", "template"),
    [
        ("glaive_toolcall_en_demo.json", "qwen"),
        ("reason_tool_use_demo_50.jsonl", "qwen"),
        ("v1_sft_demo.jsonl", "llama3"),
    ],
)
def test_real_conversations_are_trained_turn_by_turn(shared_data, file, template):
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = Tokenizer.train(["Hi"], 270, special_tokens=special, bos_token="<s>", eos_token="</s>", pad_token=None)
    set_chat_template(tokenizer, template)
    end = tokenizer.token_to_id("<|im_end|>" if template == "qwen" else "<|eot_id|>")
    for record in list(read_records(shared_data / "llamafactory" / file))[:50]:
        example = encode_record(record, tokenizer)
        turns = [message for message in record.messages if message["role"] == "assistant"]
        assert (example.ids[example.weights > 0] == end).sum() == len(turns)
        trained = tokenizer.decode(example.ids[example.weights > 0], skip_special_tokens=False)
        assert all(turn["content"].strip() in trained for turn in turns)
        assert "user" not in trained.split("<|im_end|>")[0][:4]


def test_what_max_length_takes_is_counted():
    roles = {"bos_token": None, "eos_token": None, "pad_token": None}
    tokenizer = Tokenizer.train(["Hi"], 261, special_tokens=["<|im_start|>", "<|im_end|>"], **roles)
    set_chat_template(tokenizer)
    records = [recognize({"question": "Q" * n, "answer": "A" * 10}, n, f"line {n}") for n in (1, 5, 60)]
    whole = encode_records(records, tokenizer)
    assert (whole.cut, whole.lost, whole.dropped, whole.report(9)) == (0, 0, [], "")
    length = len(whole.examples[1]) - 3
    cut = encode_records(records, tokenizer, max_length=length)
    assert (cut.cut, cut.lost, cut.dropped) == (2, 2 + 11, ["line 60"])
    assert [len(example) for example in cut.examples] == [len(whole.examples[0]), length]
    assert cut.report(length) == (
        f"2 of 3 records are longer than max_length {length}: 13 trained tokens cut off, 1 records left out for "
        "nothing trained was left (the first: line 60)"
    )
    with pytest.raises(UserError, match="nothing to train on: 1 of 1 records are longer than max_length 20"):
        encode_records(records[2:], tokenizer, max_length=20)
    with pytest.raises(UserError, match="at least 2"):
        encode_records(records, tokenizer, max_length=1)
    with pytest.raises(UserError, match="holds no record"):
        encode_records([], tokenizer)
    with pytest.raises(UserError, match=r"record 1: this record .preference. is no demonstration"):
        encode_record(recognize({"prompt": "Q", "chosen": "A", "rejected": "B"}), tokenizer)
    with pytest.raises(UserError, match="line 4: no token of this record would be trained"):
        encode_record(recognize({"messages": [ASK]}, 4, "line 4"), tokenizer)


def test_what_there_is_to_answer():
    """A question and what else is known, of every kind of record that asks something."""
    gsm8k = recognize({"question": "Q", "answer": "1 + 1 = 2\n#### 2", "level": 1})
    assert question_of(gsm8k) == ([ASK], {"answer": "1 + 1 = 2\n#### 2", "level": 1})
    talk = recognize({"messages": [ASK, YES, ASK, NO], "source": "s"})
    assert question_of(talk) == ([ASK, YES, ASK], {"answer": "B", "source": "s"})
    assert question_of(recognize({"messages": [ASK]})) == ([ASK], {})
    assert question_of(recognize({"prompt": "P", "answer": "4"})) == ("P", {"answer": "4"})
    assert question_of(recognize({"prompt": "P", "completion": "C"})) == ("P", {"answer": "C"})
    assert question_of(recognize({"prompt": [ASK], "completion": [YES]})) == ([ASK], {"answer": "A"})
    with pytest.raises(UserError, match="line 3: a text is nothing to answer"):
        question_of(recognize({"text": "T"}, 3, "line 3"))


def test_sums_are_questions_with_worked_answers():
    made = list(read_records("sums:30"))
    assert {record.shape for record in made} == {"question and answer"}
    for record in made:
        prompt, columns = question_of(record)
        assert prompt[0]["content"].strip()
        assert columns["answer"].rpartition("\n#### ")[2].lstrip("-").isdecimal()
