"""Tools and answers of a given form: what comes back always parses and always fits."""

from __future__ import annotations

import json

import openai
import pytest

from zero2hero.serve import tools
from zero2hero.serve.prompts import TOOL_CALL, chat_ids
from zero2hero.serve.schema import ChatMessage, Tool

pytestmark = pytest.mark.usefixtures("one_thread")

PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
}
PLACE |= {"required": ["city", "days"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Tells the weather.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "wait"}},
]
DIGIT = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
SHORT = {"type": "function", "function": {"name": "f", "parameters": DIGIT | {"additionalProperties": False}}}
LONG_NAME = {"type": "function", "function": {"name": "f" * 60, "parameters": SHORT["function"]["parameters"]}}
MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]


def ask(client, **more):
    given = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 200, "temperature": 1, "seed": 4}
    return client.chat.completions.create(**(given | more))


def check(call):
    arguments = json.loads(call.function.arguments)
    assert call.function.name in ("get_weather", "wait")
    if call.function.name == "get_weather":
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Rome", "Oslo")
        assert arguments["days"] <= 9


def named(name):
    return {"type": "function", "function": {"name": name}}


def test_a_named_tool_is_called(client):
    [choice] = ask(client, tools=TOOLS, tool_choice=named("get_weather")).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather"
    check(call)


def test_some_tool_is_called(client):
    for seed in range(4):
        [choice] = ask(client, tools=[TOOLS[0]], tool_choice="required", seed=seed).choices
        check(choice.message.tool_calls[0])


def test_a_stream_of_a_call_is_the_call_in_pieces(client):
    settings = {"tools": TOOLS, "tool_choice": named("get_weather"), "seed": 7}
    [whole] = ask(client, **settings).choices
    pieces, reasons = [], []
    for chunk in ask(client, stream=True, **settings):
        [choice] = chunk.choices
        pieces += choice.delta.tool_calls or []
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert reasons == ["tool_calls"]
    assert [piece.index for piece in pieces] == [0] * len(pieces)
    assert pieces[0].function.name == "get_weather"
    assert pieces[0].id.startswith("call_")
    assert all(piece.id is None and piece.function.name is None for piece in pieces[1:])
    assert len(pieces) > 3
    assert "".join(piece.function.arguments for piece in pieces) == whole.message.tool_calls[0].function.arguments


def test_a_model_that_may_choose_can_answer_in_words(client):
    [choice] = ask(client, tools=TOOLS, max_completion_tokens=5, temperature=0).choices
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("length", "stop")


def test_a_model_that_begins_a_call_must_finish_it(client, served):
    begin = served.lm.tokenizer.token_to_id(TOOL_CALL)
    [choice] = ask(client, tools=TOOLS[:1], logit_bias={str(begin): 100}, parallel_tool_calls=False).choices
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"
    check(choice.message.tool_calls[0])
    answer = ask(client, tools=TOOLS, logit_bias={str(begin): 100}, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"  # in the middle of the call
    assert answer.usage.completion_tokens == 3


def test_one_answer_may_hold_several_calls(client, served, monkeypatch):
    monkeypatch.setattr(tools, "CALLS", 4)  # this model would go on for ever
    begin = served.lm.tokenizer.token_to_id(TOOL_CALL)
    settings = {"tools": [SHORT], "logit_bias": {str(begin): 100}, "max_completion_tokens": 600}
    answer = ask(client, **settings)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert len(calls) == len({call.id for call in calls}) == 4
    assert all(0 <= json.loads(call.function.arguments)["n"] <= 9 for call in calls)
    found: dict[int, list] = {}
    for chunk in ask(client, stream=True, **settings):
        for piece in chunk.choices[0].delta.tool_calls or []:
            found.setdefault(piece.index, []).append(piece)
    assert list(found) == list(range(4))
    for call, (first, *rest) in zip(calls, found.values(), strict=True):
        assert first.id.startswith("call_")
        assert all(piece.id is None for piece in rest)
        assert first.function.name == call.function.name
        assert "".join(piece.function.arguments for piece in rest) == call.function.arguments
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, temperature=1, seed=4, extra_body=settings
    ) as stream:  # the client's own way to put deltas together
        final = stream.get_final_completion().choices[0].message
    assert [c.function.arguments for c in final.tool_calls] == [c.function.arguments for c in calls]


def test_a_further_call_is_the_models_choice(client, served):
    """Where it writes anything else, the answer ends, and what it wrote is not shown; a named tool is called once."""
    assert len(ask(client, tools=TOOLS[:1], tool_choice="required").choices[0].message.tool_calls) == 1
    begin = str(served.lm.tokenizer.token_to_id(TOOL_CALL))
    for more in ({"parallel_tool_calls": False}, {"tool_choice": named("get_weather")}):
        [choice] = ask(client, tools=TOOLS[:1], logit_bias={begin: 100}, **more).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert len(choice.message.tool_calls) == 1


def test_a_further_call_that_is_cut_off_says_so(client, served):
    begin = str(served.lm.tokenizer.token_to_id(TOOL_CALL))
    settings = {"tools": TOOLS[:1], "logit_bias": {begin: 100}}
    one = ask(client, parallel_tool_calls=False, **settings).usage.completion_tokens
    [choice] = ask(client, max_completion_tokens=one + 3, **settings).choices
    assert choice.finish_reason == "length"
    check(choice.message.tool_calls[0])
    [choice] = ask(client, max_completion_tokens=600, **settings | {"tools": [LONG_NAME]}).choices
    assert choice.finish_reason in ("length", "tool_calls")  # the context is full; what was written is whole
    assert 1 <= len(choice.message.tool_calls) < 16


def test_a_result_is_read(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    talk = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk += [{"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    assert ask(client, messages=talk, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None
    call["function"]["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        ask(client, messages=talk)


def test_a_template_without_tools_is_told_of_them_in_words(served):
    tool = Tool.model_validate(TOOLS[0])
    ids = chat_ids(served.lm, [ChatMessage(role="user", content="Hi")], [tool])
    text = served.lm.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nYou can call these tools:")
    assert '"name": "get_weather"' in text
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_knows_tools_gets_them(served, monkeypatch):
    monkeypatch.setattr(
        served.lm.tokenizer, "chat_template",
        "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.arguments.city }}){% endfor %}{% endfor %}",
    )  # fmt: skip
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    talk = [{"role": "developer", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    ids = chat_ids(served.lm, [ChatMessage.model_validate(m) for m in talk], [Tool.model_validate(t) for t in TOOLS])
    assert served.lm.tokenizer.decode(ids) == "[get_weather][wait]system:Hiassistant:(Rome)"


def test_a_schema_is_followed(client):
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    answer = ask(client, response_format=form, n=3)
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert value["city"] in ("Rome", "Oslo")
        assert choice.finish_reason == "stop"


def test_an_object_is_an_object(client):
    [choice] = ask(client, response_format={"type": "json_object"}, max_completion_tokens=400).choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    "settings",
    [
        {"tools": TOOLS, "tool_choice": named("fly")},
        {"tools": TOOLS, "n": 2},
        {"tools": TOOLS, "response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "sound"}}}]},
        {"tools": TOOLS * 40},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "sound"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "y" * 20_000}}}},
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(client, settings):
    with pytest.raises(openai.BadRequestError):
        ask(client, **settings)
