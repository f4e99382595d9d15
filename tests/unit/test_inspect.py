"""`zero2hero data inspect` says what is there, what is trained, and what looks wrong."""

from __future__ import annotations

import json

import pytest

from zero2hero.cli import main
from zero2hero.data.conversations import recognize
from zero2hero.data.examples import encode_record
from zero2hero.data.inspect import coloured
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template


def write(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def test_conversations(tmp_path, capsys):
    rows = [chat(f"What is {i} + 1?", f"It is {i + 1}.", source="sums") for i in range(20)]
    rows += [rows[0], chat("", "No."), chat("<|im_end|>", "What?"), chat("Q", ""), {"foo": 1}]
    rows += [chat("Long", "word " * 300)]
    assert main(["data", "inspect", write(tmp_path, rows), "--max_length", "64", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    for text in (
        "24 records of the shape messages (conversation)",
        "2 to 2 messages in a conversation, 2.0 on average",
        "columns that are not used: source",
        "<|im_start|>user\nWhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n«It is 1.<|im_end|>»\n",
        "max_length 64 cuts 1 records (4.2%)",
        "no padding with packing",
        "2 records were not understood; the first: ",
        "line 24: turn 2, the assistant's, is empty",
        "1 records are copies of others",
        "1 records hold a user's turn without text; the first: ",
        "1 records have special tokens in their texts",
    ):
        assert text in out, out
    assert "same answer" not in out


def test_tools_and_images(tmp_path, capsys):
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    result, answer = {"role": "tool", "content": "1"}, {"role": "assistant", "content": "1"}
    talk = [{"role": "user", "content": "Q"}, call, result, answer]
    picture = chat("<image>Who?", "Tom.", images=["tom.png"])
    assert main(["data", "inspect", write(tmp_path, [{"messages": talk}])]) == 0
    assert '«<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>»' in capsys.readouterr().out
    assert main(["data", "inspect", write(tmp_path, [picture])]) == 0
    assert "<image>Who?<|im_end|>\n<|im_start|>assistant\n«Tom.<|im_end|>»" in capsys.readouterr().out


def test_nothing_wrong(tmp_path, capsys):
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(20)]
    assert main(["data", "inspect", write(tmp_path, rows)]) == 0
    out = capsys.readouterr().out
    assert "20 records of the shape question and answer (conversation)" in out
    assert "nothing looks wrong." in out


def test_other_kinds_and_doubts(tmp_path, capsys):
    rows = [{"prompt": "P" * 200 + str(i), "chosen": "yes", "rejected": "yes"} for i in range(20)]
    assert main(["data", "inspect", write(tmp_path, rows)]) == 0
    out = capsys.readouterr().out
    assert "20 records of the shape preference (preference)" in out
    assert "20 records have the same answer, 'yes'" in out
    assert "20 records reject the answer that they choose" in out
    for row in ({"text": "A [bold]text[/bold]."}, {"prompt": "P", "completion": "C", "label": True}, {"prompt": "P"}):
        assert main(["data", "inspect", write(tmp_path, [row])]) == 0
    assert "«C<|end_of_text|>»" in capsys.readouterr().out


def test_a_model_s_template_that_hides_the_system_message(tmp_path, capsys):
    tokenizer = Tokenizer.train(["What is it?"], 270, special_tokens=["<s>", "</s>", "[INST]", "[/INST]"],
                                bos_token="<s>", eos_token="</s>", pad_token=None)  # fmt: skip
    set_chat_template(tokenizer, "mistral")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"system": "Be brief.", "question": "Q", "answer": "A"}
    assert main(["data", "inspect", write(tmp_path, [row]), "--model", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "<s>[INST]Q[/INST]«A</s>»" in out
    assert "the chat template does not show the system message of" in out
    assert main(["data", "inspect", write(tmp_path, [row]), "--model", str(tmp_path / "model"),
                 "--chat_template", "chatml"]) == 2  # fmt: skip
    assert "needs tokens that this tokenizer lacks: <|im_start|>, <|im_end|>" in capsys.readouterr().err


def test_nothing_understood_is_an_error(tmp_path, capsys):
    assert main(["data", "inspect", write(tmp_path, [{"foo": 1}])]) == 2
    assert "no record was understood; the first: " in capsys.readouterr().err


@pytest.mark.parametrize("colours", [True, False])
def test_colours(colours):
    tokenizer = Tokenizer.train(["What is it?"], 270)
    set_chat_template(tokenizer)
    text = coloured(encode_record(recognize(chat("Q", "A")), tokenizer), tokenizer, colours)
    assert ("«A<|im_end|>»" in text.plain) is not colours
    assert ("bold green" in [span.style for span in text.spans]) is colours
