"""Invariant 7: conversations rendered as transformers renders them, and templates that can do nothing else."""

from __future__ import annotations

import jinja2
import pytest

from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.chat import render

transformers = pytest.importorskip("transformers")

USER = {"role": "user", "content": "  What is <b>12 + 30</b>?\n"}
ANSWER = {"role": "assistant", "content": "It is 42. "}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one": [USER],
    "three": [USER, ANSWER, {"role": "user", "content": "Sure?\n\n"}],
    "answered": [USER, ANSWER],
    "system": [SYSTEM, USER],
    "empty": [{"role": "user", "content": ""}],
}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds <two> numbers & more", "parameters": {
    "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}}  # fmt: skip
FILES = ["Qwen-Qwen2.5-7B-Instruct", "google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct",
         "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The same tokenizer here and there."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = Tokenizer.train(["What is it? It is 42."], vocab_size=270)
    ours.save_pretrained(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=FILES)
def both(request, tokenizers, shared_data):
    for tokenizer in tokenizers:
        tokenizer.chat_template = (shared_data / "chat_templates" / f"{request.param}.jinja").read_text()
    return tokenizers


def rendered(tokenizer, messages, **settings):
    """The text, or None where the template refuses the conversation."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", **settings)
    except (UserError, jinja2.TemplateError):
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_same_text_and_ids(both, conversation):
    ours, theirs = both
    messages = CONVERSATIONS[conversation]
    for settings in ({}, {"add_generation_prompt": True}, {"tools": [TOOL]}):
        want = rendered(theirs, messages, **settings)
        assert rendered(ours, messages, **settings) == want
        assert want or (conversation == "system" and "System role" in ours.chat_template)
        if want:
            ids = theirs.apply_chat_template(messages, date_string="26 Jul 2024", **settings)["input_ids"]
            assert ours.apply_chat_template(messages, date_string="26 Jul 2024", **settings) == ids


def test_a_message_that_is_continued(both):
    ours, theirs = both
    want = rendered(theirs, CONVERSATIONS["answered"], continue_final_message=True)
    assert rendered(ours, CONVERSATIONS["answered"], continue_final_message=True) == want
    assert want.rstrip().endswith("It is 42.")


def test_what_templates_may_use(tokenizers):
    ours, theirs = tokenizers
    source = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ bos_token }}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}\n{{ tools is none }}{{ strftime_now('%Y') }}"
        "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ unknown }}"
    )
    for tokenizer in tokenizers:
        tokenizer.chat_template = source
    assert rendered(ours, [USER, ANSWER]) == rendered(theirs, [USER, ANSWER])
    assert "<b>" in rendered(ours, [USER, ANSWER])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ ''.__class__.__mro__ }}", "not safe"),
        ("{{ messages.__class__ }}", "not safe"),
        ("{{ ''|attr('__class__')|string|upper }}{{ cycler.__init__.__globals__.os.popen('id') }}", "not safe"),
        ("{{ raise_exception.__globals__ }}", "not safe"),
        ("{{ '{0.__class__}'.format(1) }}", "not safe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ messages.append(1) }}", "not safe"),
        ("{{ messages[0].update(role='system') }}", "not safe"),
        ("{% set messages[0].role = 'system' %}", "line 1"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{{ raise_exception('first\n second') }}", "first second"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% if %}", "line 1"),
    ],
)  # fmt: skip
def test_a_template_that_goes_too_far_is_one_clear_error(template, says):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match="chat template cannot render") as caught:
        render(template, messages)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert messages == [{"role": "user", "content": "Hi"}]


def test_a_template_sees_plain_data_alone():
    class Image:
        def save(self, path):
            raise AssertionError("called")

        def __str__(self):
            raise AssertionError("read")

    messages = [{"role": "user", "content": [{"type": "image", "image": Image()}, {"type": "text", "text": "Hi"}]}]
    assert render("{{ messages[0].content[0].image }}", messages) == "<Image>"
    with pytest.raises(UserError):
        render("{{ messages[0].content[0].image.save('x') }}", messages)


@pytest.mark.parametrize("messages", ["Hi", [], [{"content": "Hi"}], {"role": "user"}, ["Hi"], None])
def test_what_is_no_conversation(messages):
    with pytest.raises(UserError, match="a conversation is a list of messages"):
        render("{{ messages }}", messages)


def test_what_cannot_be_continued():
    with pytest.raises(UserError, match="no text to continue"):
        render("{{ messages }}", [{"role": "assistant", "content": None}], continue_final_message=True)
    with pytest.raises(UserError, match="leaves out the last message"):
        render("Hi", [ANSWER], continue_final_message=True)
    with pytest.raises(UserError, match="ask for one"):
        render("Hi", [ANSWER], continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer.train(["Hi"], vocab_size=262).apply_chat_template([USER])
