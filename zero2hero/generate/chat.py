"""`zero2hero chat`: a conversation with a model on the terminal.

The answer appears while it is written. Ctrl-C stops the answer and not the program; what was written so far stays part
of the conversation. What was read once is not read again: each turn adds its own tokens to the engine's pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from zero2hero.errors import UserError
from zero2hero.generate.engine import Engine, Request, SamplingParams
from zero2hero.io import atomic_write
from zero2hero.language_model import LanguageModel, load
from zero2hero.options import ChatConfig

HELP = """/system TEXT   begin anew, with this as the system's message (no text: without one)
/retry         answer the last message again
/undo          take back the last message and its answer
/save FILE     write the conversation as JSON lines of messages, which `sft` reads
/quit          leave (or Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation; `say` and `command` are what the user can do. `show` is called with each piece of text."""

    def __init__(self, lm: LanguageModel, params: SamplingParams, show: Callable[[str], object]) -> None:
        if lm.tokenizer.chat_template is None:
            raise UserError("this model has no chat template: continue texts with `zero2hero generate` instead")
        self.lm, self.params, self.show = lm, params, show
        self.engine = Engine(lm, max_batch_size=1)
        self.messages: list[dict[str, str]] = []
        self.answers = 0  # given so far: with a seed, each one has a random stream of its own

    def say(self, text: str) -> None:
        """The user's next message; shows the answer. A conversation that has become too long loses this message."""
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except UserError:
            self.messages.pop()
            raise

    def _answer(self) -> None:
        request = Request(self.lm.prompt_ids(self.messages), self.params, sample=self.answers)
        sequence = self.engine.submit(request)
        self.answers += 1
        while sequence.finish_reason is None:
            try:
                for event in self.engine.step():
                    self.show(event.text)
            except KeyboardInterrupt:
                self.engine.cancel(sequence)
        self.show(" [stopped]\n" if sequence.finish_reason == "cancelled" else "\n")
        self.messages.append({"role": "assistant", "content": sequence.text})

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False means to leave.

        Raises:
            UserError: an unknown command, or nothing to take back.
        """
        name, _, rest = line.partition(" ")
        if name == "/system":
            self.messages = [{"role": "system", "content": rest}] if rest else []
        elif name in ("/retry", "/undo"):
            asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
            if not asked:
                raise UserError("nothing was said yet")
            text = self.messages[asked[-1]]["content"]
            del self.messages[asked[-1] :]
            if name == "/retry":
                self.say(text)
        elif name == "/save":
            if not rest:
                raise UserError("/save needs the name of a file")
            atomic_write(Path(rest), json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            self.show(f"written to {rest}\n")
        elif name == "/help":
            self.show(HELP + "\n")
        elif name != "/quit":
            raise UserError(f"unknown command {name}; /help lists them")
        return name != "/quit"


def run(config: ChatConfig) -> None:
    """Talk until the user leaves."""
    from zero2hero import machine

    machine.prepare()
    lm = load(
        config.model, config.device, config.dtype, load_in_4bit=config.load_in_4bit, load_in_8bit=config.load_in_8bit
    )
    if config.adapter is not None:
        from zero2hero.tune import load_adapter

        load_adapter(lm.model, config.adapter)  # which makes it the active one
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        min_p=config.min_p, repetition_penalty=config.repetition_penalty, seed=config.seed,
    )  # fmt: skip
    chat = Chat(lm, params, lambda text: print(text, end="", flush=True))
    if config.system:
        chat.command(f"/system {config.system}")
    print("/help lists the commands, Ctrl-D leaves")
    talk(chat, input)


def talk(chat: Chat, ask: Callable[[str], str]) -> None:
    """Read lines and answer them, until /quit or the end of the input."""
    while True:
        try:
            line = ask("> ").strip()
            if line.startswith("/"):
                if not chat.command(line):
                    return
            elif line:
                chat.say(line)
        except KeyboardInterrupt:
            chat.show("\n")
        except EOFError:
            chat.show("\n")
            return
        except UserError as error:
            chat.show(f"{error}\n")
