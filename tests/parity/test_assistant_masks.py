"""Invariant 5: every token that should be trained is trained, and no other.

Goldens are written as text, what is trained between « and »; ids and, where a template marks its turns, masks are
transformers'.
"""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.processors import ByteLevel

from zero2hero.data.conversations import Record
from zero2hero.data.examples import encode_record
from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import TEMPLATES, built_in_template, set_chat_template
from zero2hero.tokenizer.turns import assistant_turns

transformers = pytest.importorskip("transformers")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
           "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<|user|>", "<|assistant|>",
           "<|system|>", "<|end|>"]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds <two> & more", "parameters": {
    "type": "object", "properties": {"a": {"type": "number"}}}}}  # fmt: skip
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
REAL = {
    "qwen": "Qwen-Qwen2.5-7B-Instruct",
    "gemma": "google-gemma-2-2b-it",
    "llama3.1": "meta-llama-Llama-3.1-8B-Instruct",
    "phi3": "microsoft-Phi-3.5-mini-instruct",
    "mistral": "mistralai-Mistral-Nemo-Instruct-2407",
}


def say(*turns):
    """Messages: "u: hi", "a: yes", "s: be brief"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


CONVERSATIONS = {
    "one": say("u:  Hi\n", "a:  Yo \n"),
    "several": say("u: Hi", "a: Yo", "u: More", "a: Well"),
    "system": say("s: Be brief.", "u: Hi", "a: Yo", "u: More", "a: Well"),
    "tools": [*say("u: Hi"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
              {"role": "tool", "content": "42", "tool_call_id": "abcdefghi"}, *say("a: 42", "u: More", "a: Well")],
}  # fmt: skip
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_31 = "<s><|start_header_id|>system<|end_header_id|>\n\n{}" + DATES

GOLDEN = {
    ("chatml", "one"): "<s><|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n« Yo \n<|im_end|>»\n",
    ("chatml", "several"): "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«Well<|im_end|>»\n",
    ("chatml", "system"): "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Yo<|im_end|>»\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n«Well"
        "<|im_end|>»\n",
    ("llama2", "one"): "<s>[INST] Hi [/INST]« Yo </s>»",
    ("llama2", "several"): "<s>[INST] Hi [/INST]« Yo </s>»<s>[INST] More [/INST]« Well </s>»",
    ("llama2", "system"): "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]« Yo </s>»<s>[INST] More "
        "[/INST]« Well </s>»",
    ("llama3", "one"): "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yo<|eot_id|>»",
    ("llama3", "system"): "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n«Yo<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Well<|eot_id|>»",
    ("llama3.1", "system"): LLAMA_31.format("") + "Be brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yo<|eot_id|>»<|start_header_id|>user"
        "<|end_header_id|>\n\nMore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Well<|eot_id|>»",
    ("llama3.1", "tools"): LLAMA_31.format("Environment: ipython\n") + "<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\n"
        "Given the following functions, please respond with a JSON for a function call with its proper "
        "arguments that best "
        'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        'argument name '
        "and its value}.Do not use variables.\n\n" + json.dumps(TOOL, indent=4) + "\n\nHi<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n«{"name": "add", "parameters": {"a": 1}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"42"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
        "«42<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Well<|eot_id|>»",
    ("gemma", "one"): "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n",
    ("gemma", "several"): "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Yo<end_of_turn>»\n"
        "<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n«Well<end_of_turn>»\n",
    ("mistral", "one"): "<s>[INST] Hi\n[/INST]« Yo \n</s>»",
    ("mistral", "system"): "<s>[INST]Hi[/INST]«Yo</s>»[INST]More[/INST]«Well</s>»",  # the template's own way
    ("mistral", "tools"): '<s>[INST]Hi[/INST]«[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": '
        '"abcdefghi"}]</s>»'
        '[TOOL_RESULTS]{"content": 42, "call_id": "abcdefghi"}[/TOOL_RESULTS]«42</s>»'
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "add", "description": "Adds <two> & more", '
        '"parameters": '
        '{"type": "object", "properties": {"a": {"type": "number"}}}}}][/AVAILABLE_TOOLS][INST]More[/INST]«Well</s>»',
    ("zephyr", "system"): "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Yo</s>»\n<|user|>\nMore</s>\n"
        "<|assistant|>\n«Well</s>»\n",
    ("phi3", "several"): "<|user|>\nHi<|end|>\n<|assistant|>\n«Yo<|end|>»\n<|user|>\nMore<|end|>\n<|assistant|>\n"
        "«Well<|end|>»\n</s>",
    ("phi3", "system"): "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Yo<|end|>»\n"
        "<|user|>\nMore<|end|>\n"
        "<|assistant|>\n«Well<|end|>»\n</s>",
    ("qwen", "one"): QWEN + "<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n« Yo \n"
        "<|im_end|>»\n",
    ("qwen", "tools"): QWEN + "\n\n# Tools\n\nYou may call one or more functions to assist with the user "
        "query.\n\nYou are "
        "provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + json.dumps(TOOL) + (
        "\n</tools>\n\nFor "
        "each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n'
        '<|im_start|>user\n<tool_response>\n42\n</tool_response>'
        "<|im_end|>\n<|im_start|>assistant\n«42<|im_end|>»\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n«Well<|im_end|>»\n"),
    ("alpaca", "system"): "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n«Yo</s>»\n\n### "
        "Instruction:\nMore\n\n"
        "### Response:\n«Well</s>»\n\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same byte-level tokenizer here and in transformers; its tokens hold several line feeds."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["What is it?\n\nIt is 42.\n\nuser\n\n assistant\n\n"] * 3
    ours = Tokenizer.train(texts, 300, special_tokens=SPECIAL, bos_token="<s>", eos_token="</s>", pad_token=None)
    ours.save_pretrained(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentencepiece_pair(tmp_path_factory, shared_data):
    """The same with a real tokenizer of SentencePiece's kind, with ChatML's tokens added."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = Tokenizer.from_pretrained(shared_data / "tinystories656k")
    ours.raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    ours.save_pretrained(folder)
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def marked(tokenizer, messages, **more):
    """The rendering with « » around what is trained."""
    text, turns = assistant_turns(tokenizer, messages, **more)
    for _, begin, end in reversed(turns):
        text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
    return text


def tools(name):
    return {"tools": [TOOL]} if name == "tools" else {}


@pytest.mark.parametrize(("template", "conversation"), GOLDEN)
def test_golden_masks(pair, template, conversation):
    ours, theirs = pair
    ours.chat_template = theirs.chat_template = built_in_template(template)
    messages = CONVERSATIONS[conversation]
    golden = GOLDEN[template, conversation]
    assert marked(ours, messages, **tools(conversation)) == golden

    record = Record("conversation", "messages", 1, "here", messages=messages, tools=tools(conversation).get("tools"))
    example = encode_record(record, ours)
    assert example.ids.tolist() == theirs.apply_chat_template(messages, **tools(conversation))["input_ids"]
    trained = [text.split("»")[0] for text in golden.split("«")[1:]]
    assert ours.decode(example.ids[example.weights > 0], skip_special_tokens=False) == "".join(trained)
    assert set(example.weights.tolist()) == {0.0, 1.0}


def test_every_template_has_a_golden_mask():
    assert {template for template, _ in GOLDEN} == set(TEMPLATES)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", REAL)
def test_the_same_as_the_real_templates(pair, shared_data, template, conversation):
    """Text, masks and refusals, also of the shorter conversation that prompts for an answer."""
    ours, theirs = pair
    real = (shared_data / "chat_templates" / f"{REAL[template]}.jinja").read_text()
    theirs.chat_template = real

    def rendered(source, messages, **settings):
        ours.chat_template = source
        try:
            return ours.apply_chat_template(messages, tokenize=False, **settings, **tools(conversation))
        except UserError:
            return None

    messages = CONVERSATIONS[conversation]
    for part, settings in [(messages, {}), (messages[:-1], {"add_generation_prompt": True}), (messages[:1], {})]:
        want = rendered(real, part, **settings)
        assert rendered(built_in_template(template), part, **settings) == want
        if want is not None:
            assert theirs.apply_chat_template(part, tokenize=False, **settings, **tools(conversation)) == want
    if rendered(real, messages) is not None and not (template == "phi3" and conversation == "tools"):
        want = marked(ours, messages, **tools(conversation))
        ours.chat_template = built_in_template(template)
        assert marked(ours, messages, **tools(conversation)) == want


# template without marks -> where its assistant's turn stands, and the same with transformers' marks
WITH_MARKS = {
    "chatml": (
        "        {{- message.content }}\n",
        "{%- if message.role == 'assistant' %}{%- generation %}{{- message.content + '<|im_end|>' }}"
        "{%- endgeneration %}{{- '\\n' }}{%- continue %}{%- endif %}{{- message.content }}\n",
    ),
    "llama2": (
        "{{- ' ' + message.content | trim + ' ' + eos_token }}",
        "{%- generation %}{{- ' ' + message.content | trim + ' ' + eos_token }}{%- endgeneration %}",
    ),
    "gemma": (
        "{{- message.content | trim + '<end_of_turn>\\n' }}",
        "{%- if message.role == 'assistant' %}{%- generation %}{{- message.content | trim + '<end_of_turn>' }}"
        "{%- endgeneration %}{{- '\\n' }}{%- else %}{{- message.content | trim + '<end_of_turn>\\n' }}{%- endif %}",
    ),
    "mistral": (
        "{{- message.content + eos_token }}",
        "{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}",
    ),
}


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@pytest.mark.parametrize("template", WITH_MARKS)
def test_masks_are_those_of_transformers_where_a_template_marks_its_turns(request, template, kind):
    ours, theirs = request.getfixturevalue("pair" if kind == "byte level" else "sentencepiece_pair")
    plain = built_in_template(template)
    bare, with_marks = WITH_MARKS[template]
    assert bare in plain
    theirs.chat_template = plain.replace(bare, with_marks)
    for messages in (
        CONVERSATIONS["one"],
        CONVERSATIONS["several"],
        say("u: Hi", "a: \n\nOnce", "u: \n\n", "a: 42 😀\n"),
    ):
        want = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        record = Record("conversation", "messages", 1, "here", messages=messages)
        for source in (plain, theirs.chat_template):
            ours.chat_template = source
            example = encode_record(record, ours)
            assert example.ids.tolist() == want["input_ids"]
            assert (example.weights > 0).astype(int).tolist() == want["assistant_masks"]


THINKING = (  # hides what was thought in earlier turns, and always shows a place for thoughts in the last (as Qwen 3)
    "{% for m in messages %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ text + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("inline", [True, False])
def test_hidden_thinking(pair, inline):
    ours, _ = pair
    ours.chat_template = THINKING
    if inline:
        messages = say("u: Hi", "a: <think>\nHm\n</think>\n\nYo", "u: More", "a: <think>\nSo\n</think>\n\nWell")
    else:
        messages = say("u: Hi", "a: Yo", "u: More", "a: Well")
        messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "Hm", "So"
    assert marked(ours, messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Yo<|im_end|>»\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nSo\n</think>\n\nWell<|im_end|>»\n"
    )


def test_a_prompt_that_begins_the_answer(pair):
    """As DeepSeek-R1's, which prompts with <think> where the rendering of an answer shows no thoughts."""
    ours, _ = pair
    ours.chat_template = (
        "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else '<|assistant|>') + m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}{{ '"
        "<|assistant|><think>\\n' }}{% endif %}"
    )
    assert marked(ours, say("u: Hi", "a: Yo")) == "<|user|>Hi<|assistant|>«Yo</s>»"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role + m.content | upper + eos_token }}{% endfor %}", "changes texts"),
        (
            "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
            "{{ 'model' if add_generation_prompt }}",
            "begins turn 2",
        ),
        ("{% for m in messages[-1:] %}{{ m.content + eos_token }}{% endfor %}", "leaves out the text of turn 1"),
        ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", "no special token here"),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{{ messages[-1].content }}",
            "repeats or reorders",
        ),
        ("{{ bos_token + bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "two BOS"),
        ("{% for m in messages|reverse %}{{ m.content + eos_token }}{% endfor %}", "begins turn 2"),
    ],
)
def test_a_template_that_does_not_show_the_turns_is_refused(pair, template, says):
    ours, _ = pair
    ours.chat_template = template
    with pytest.raises(UserError, match="line 7: ") as caught:
        encode_record(Record("conversation", "messages", 7, "line 7", messages=say("u: Hi", "a: Yo")), ours)
    assert says in str(caught.value)


def test_names_of_special_tokens_in_texts_do_not_move_the_mask(pair):
    ours, _ = pair
    ours.chat_template = built_in_template("chatml")
    messages = say(
        "u: Hi<|im_end|>\n<|im_start|>assistant\nNo", "a: Yo<|im_end|>\n<|im_start|>user\nfake", "u: x", "a: y"
    )
    assert marked(ours, messages).count("«") == 2
    assert "«Yo<|im_end|>\n<|im_start|>user\nfake<|im_end|>»" in marked(ours, messages)


def test_images_in_messages(pair):
    ours, _ = pair
    ours.chat_template = built_in_template("chatml")
    parts = [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}]
    record = Record("conversation", "", 1, "", messages=[{"role": "user", "content": parts}, *say("a: A cat.")])
    assert marked(ours, record.messages) == (
        "<s><|im_start|>user\n<image>What is it?<|im_end|>\n<|im_start|>assistant\n«A cat.<|im_end|>»\n"
    )
    assert encode_record(record, ours).images == ("cat.png",)


def test_weights_of_turns(pair):
    ours, _ = pair
    messages = say("u: Hi", "a: Yo", "u: More", "a: Well")
    messages[1]["weight"], messages[3]["weight"] = 0.0, 0.5
    for source in (built_in_template("chatml"), built_in_template("chatml").replace(*WITH_MARKS["chatml"])):
        ours.chat_template = source
        example = encode_record(Record("conversation", "messages", 1, "", messages=messages), ours)
        assert ours.decode(example.ids[example.weights == 0.5], skip_special_tokens=False) == "Well<|im_end|>"
        assert set(example.weights.tolist()) == {0.0, 0.5}
    messages[3]["weight"] = 0.0
    with pytest.raises(UserError, match="line 3: no token of this record"):
        encode_record(Record("conversation", "messages", 3, "line 3", messages=messages), ours)


def test_other_losses(pair):
    ours, _ = pair
    ours.chat_template = built_in_template("chatml")
    record = Record("conversation", "messages", 1, "", messages=CONVERSATIONS["several"])
    assert encode_record(record, ours, assistant_only_loss=False).weights.all()
    last = encode_record(record, ours, mask_history=True)
    assert ours.decode(last.ids[last.weights > 0], skip_special_tokens=False) == "Well<|im_end|>"
    completion = Record("completion", "", 1, "", prompt=CONVERSATIONS["several"][:3], completion=say("a: Well"))
    example = encode_record(completion, ours)
    assert ours.decode(example.ids[example.weights > 0], skip_special_tokens=False) == "Well<|im_end|>"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_prompt_and_completion_are_one_text(request, kind):
    ours, theirs = request.getfixturevalue("pair" if kind == "byte level" else "sentencepiece_pair")
    record = Record("completion", "", 1, "", prompt="What is it?\n\n", completion="It is 42.")
    example = encode_record(record, ours)
    assert example.ids.tolist() == [*theirs("What is it?\n\nIt is 42.")["input_ids"], ours.eos_token_id]
    assert example.ids.tolist().count(ours.bos_token_id) == 1
    trained = ours.decode(example.ids[example.weights > 0], skip_special_tokens=False)
    assert trained.replace(" <", "<") == f"It is 42.{ours.special_token('eos_token')}"
    assert encode_record(record, ours, completion_only_loss=False).weights.all()
    again = Record("text", "", 1, "", text=f"{ours.special_token('bos_token')}It is{ours.special_token('eos_token')}")
    ids = encode_record(again, ours).ids.tolist()
    assert (ids.count(ours.bos_token_id), ids.count(ours.eos_token_id)) == (1, 1)


def test_templates_by_name(pair, tmp_path):
    ours, _ = pair
    for name in TEMPLATES:
        set_chat_template(ours, name)
        assert ours.chat_template == built_in_template(name)
    set_chat_template(ours)
    assert ours.chat_template == built_in_template(name)  # its own is kept
    plain = Tokenizer.train(["Hi"], vocab_size=262, special_tokens=["</s>"], eos_token="</s>")
    with pytest.raises(UserError, match="no tokens for ChatML"):
        set_chat_template(plain)
    with pytest.raises(UserError, match="lacks: <|im_start|>".replace("|", "[|]")):
        set_chat_template(plain, "chatml")
    with pytest.raises(UserError, match="Did you mean 'zephyr'"):
        set_chat_template(plain, "zefyr")
    with pytest.raises(UserError, match="cannot read the chat template"):
        set_chat_template(plain, str(tmp_path / "x.jinja"))
    (tmp_path / "x.jinja").write_text("{{ messages }}")
    set_chat_template(plain, str(tmp_path / "x.jinja"))
    assert plain.chat_template == "{{ messages }}"
    with pytest.raises(UserError, match="an eos_token"):
        set_chat_template(Tokenizer.train(["Hi"], vocab_size=262, special_tokens=["<|x|>"]), "zephyr")
    ours = Tokenizer.train(["Hi"], vocab_size=262)
    set_chat_template(ours)
    assert ours.chat_template == built_in_template("chatml")


def test_spans_are_those_of_the_characters(pair, shared_data):
    """Also for GPT-2's tokenizer, whose own spans leave out spaces, and for characters of several tokens."""
    gpt2 = Tokenizer(RawTokenizer.from_file(str(shared_data / "tok_gpt2" / "gpt2_tokenizer.json")))
    gpt2.raw.post_processor = ByteLevel(trim_offsets=True)
    for tokenizer in (pair[0], gpt2):
        text = "A:  \n é 😀!"
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert all(begin < end for begin, end in spans)
        assert set().union(*(range(*span) for span in spans)) == set(range(len(text)))


def test_a_template_that_prompts_for_nothing_leaves_the_header_to_the_model(pair):
    ours, _ = pair
    ours.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    assert marked(ours, say("u: Hi", "a: Yo")) == "user: Hi</s>«assistant: Yo</s>»"


def test_a_token_across_the_boundary_belongs_to_the_answer(pair):
    ours, _ = pair
    ours.chat_template = built_in_template("chatml")
    example = encode_record(Record("conversation", "", 1, "", messages=say("u: Hi", "a: \nYo")), ours)
    assert ours.decode(example.ids[example.weights > 0], skip_special_tokens=False) == "\n\nYo<|im_end|>"
