"""The conversation on the terminal: what is said, taken back, stopped and saved."""

from __future__ import annotations

import json

import pytest

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.generate.chat import Chat, talk
from zero2hero.generate.engine import SamplingParams
from zero2hero.language_model import LanguageModel
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture
def chat() -> Chat:
    tokenizer = Tokenizer.train(["user: hello\nassistant: the cat sat\nsystem: be kind\n" * 20], vocab_size=290)
    tokenizer.chat_template = TEMPLATE
    model = Decoder(DecoderConfig(vocab_size=290, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    init_weights(model, seed=1)
    shown: list[str] = []
    chat = Chat(LanguageModel(model.eval(), tokenizer), SamplingParams(max_new_tokens=6, seed=1), shown.append)
    chat.shown = shown  # type: ignore[attr-defined]
    return chat


def read(chat: Chat, *lines: str) -> str:
    """What appears when these lines are typed, and then Ctrl-D."""
    given = iter(lines)

    def ask(prompt: str) -> str:
        line = next(given, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    chat.shown.clear()  # type: ignore[attr-defined]
    talk(chat, ask)
    return "".join(chat.shown)  # type: ignore[attr-defined]


def test_a_conversation(chat, tmp_path):
    read(chat, "/system be kind", "hello", "^C", "", "the cat")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    first, second = chat.messages[2]["content"], chat.messages[4]["content"]
    file = tmp_path / "talk.jsonl"
    assert "talk.jsonl" in read(chat, f"/save {file}")
    assert json.loads(file.read_text()) == {"messages": chat.messages}
    assert read(chat, "/retry").strip() == chat.messages[4]["content"].strip() != second.strip()
    read(chat, "/undo")
    assert [m["content"] for m in chat.messages] == ["be kind", "hello", first]
    assert "/retry" in read(chat, "/help")
    read(chat, "/quit", "hello")
    assert len(chat.messages) == 3
    read(chat, "/system")
    assert chat.messages == []
    assert "nothing was said" in read(chat, "/undo")
    assert "unknown command /sing" in read(chat, "/sing a song")
    assert "name of a file" in read(chat, "/save")


def test_ctrl_c_stops_the_answer_alone(chat, monkeypatch):
    step, steps = chat.engine.step, []

    def interrupted():
        steps.append(step())
        if len(steps) == 2:
            raise KeyboardInterrupt
        return steps[-1]

    monkeypatch.setattr(chat.engine, "step", interrupted)
    assert "[stopped]" in read(chat, "hello")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert len(steps) == 3
    assert chat.engine.counters["running"] == 0
    assert "[stopped]" not in read(chat, "hello")


def test_a_conversation_that_is_too_long_loses_its_last_message(chat):
    assert "context is 256" in read(chat, "hello " * 300)
    assert chat.messages == []
    assert read(chat, "hello")
    chat.lm.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Chat(chat.lm, chat.params, print)
