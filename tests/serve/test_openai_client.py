"""The openai client drives every endpoint and parameter, streaming and not."""

from __future__ import annotations

import base64
import struct

import openai
import pytest
import torch

from zero2hero.generate.engine import Engine, Request, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


def completion(client, **more):
    return client.completions.create(
        **({"model": "tiny", "prompt": "Ada found", "max_tokens": 8, "temperature": 0} | more)
    )


def chat(client, text="Where is it?", **more):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        **({"model": "tiny", "messages": messages, "max_completion_tokens": 8, "temperature": 0} | more)
    )


# --- models -------------------------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    for name in ("other", "../../etc/passwd", "/etc/passwd", "tiny/../../x", "%2e%2e%2fx"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found" or "Not Found" in caught.value.message
        with pytest.raises(openai.NotFoundError) as caught:
            completion(client, model=name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


# --- text completions ---------------------------------------------------------------------------------------


def test_completion_is_what_the_engine_writes(client, served):
    answer = completion(client)
    [expected] = Engine(served.lm).run(
        [Request(served.lm.tokenizer.encode("Ada found"), SamplingParams(max_new_tokens=8, temperature=0))]
    )
    [choice] = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.output_ids)
    assert answer.usage.prompt_tokens == expected.prompt_length
    assert (answer.object, answer.model) == ("text_completion", "tiny")


def test_many_prompts_in_every_form(client, served):
    texts = ["Ada found", "Ben asked"]
    ids = [served.lm.tokenizer.encode(text) for text in texts]
    of_texts = completion(client, prompt=texts, n=2, temperature=1, seed=3)
    of_ids = completion(client, prompt=ids, n=2, temperature=1, seed=3)
    assert [choice.index for choice in of_texts.choices] == [0, 1, 2, 3]
    assert [c.text for c in of_texts.choices] == [c.text for c in of_ids.choices]
    assert of_texts.choices[0].text != of_texts.choices[1].text  # samples of one prompt differ
    assert completion(client, prompt=ids[0]).choices[0].text == completion(client, prompt=texts[0]).choices[0].text
    again = completion(client, prompt="Ada found", n=1, temperature=1, seed=3)
    assert again.choices[0].text == of_texts.choices[0].text  # whatever else is asked for


def test_echoed_log_probabilities_are_those_of_one_forward_pass(client, served):
    answer = completion(client, prompt="Ada found a red ball.", echo=True, logprobs=2, max_tokens=1)
    [choice] = answer.choices
    ids = served.lm.tokenizer.encode("Ada found a red ball.")
    with torch.inference_mode():
        expected = served.lm.model.logits(served.lm.model(torch.tensor([ids])))[0].log_softmax(-1)
    found = choice.logprobs.token_logprobs
    assert len(found) == len(ids) + 1
    assert found[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    torch.testing.assert_close(
        torch.tensor(found[1:-1]), expected[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0], rtol=0, atol=1e-5
    )
    for number, top in zip(found[1:], choice.logprobs.top_logprobs[1:]):
        assert number in top.values()  # the same float
        assert max(top.values()) >= number
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    torch.testing.assert_close(torch.tensor(best), expected.amax(-1), rtol=0, atol=1e-5)
    assert choice.text.startswith("Ada found a red ball.")
    for token, offset in list(zip(choice.logprobs.tokens, choice.logprobs.text_offset))[1 : len(ids)]:
        assert choice.text[offset:].startswith(token)


def test_scoring_alone_writes_nothing(client):
    answer = completion(client, prompt="Ada found", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "Ada found"
    assert answer.usage.completion_tokens == 0


def test_a_stream_is_the_whole_in_pieces(client):
    settings = {"prompt": ["Ada found", "Ben asked"], "n": 2, "temperature": 1, "seed": 5, "logprobs": 3, "echo": True}
    whole = completion(client, **settings)
    texts, logprobs, reasons = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]
    chunks = list(completion(client, stream=True, stream_options={"include_usage": True}, **settings))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        logprobs[choice.index] += choice.logprobs.token_logprobs
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.text for choice in whole.choices]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert reasons == [[choice.finish_reason] for choice in whole.choices]


def test_settings_reach_the_engine(client, served):
    ids = served.lm.tokenizer.encode("Ada found")
    space = served.lm.tokenizer.token_to_id("Ġ")
    assert set(completion(client, logit_bias={str(space): 100}).choices[0].text) == {" "}
    for name, value in {"presence_penalty": 1.5, "frequency_penalty": 1.5, "top_p": 0.5}.items():
        temperature = 1 if name == "top_p" else 0
        got = completion(client, max_tokens=24, temperature=temperature, seed=1, **{name: value}).choices[0].text
        params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=1, **{name: value})
        assert got == Engine(served.lm).run([Request(ids, params)])[0].text, name
    more = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "ignore_eos": True}
    got = completion(client, max_tokens=24, temperature=1, seed=1, extra_body=more | {"min_tokens": 4}).choices[0].text
    params = SamplingParams(max_new_tokens=24, temperature=1, seed=1, min_new_tokens=4, **more)
    assert got == Engine(served.lm).run([Request(ids, params)])[0].text


def test_stop_texts_never_show(client):
    text = completion(client, max_tokens=40).choices[0].text
    for begin, end in ((3, 6), (5, 11), (10, 12)):
        stop = text[begin:end]
        expected = text[: text.index(stop)]
        answer = completion(client, max_tokens=40, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        pieces = [c.choices[0].text for c in completion(client, max_tokens=40, stop=[stop, "never"], stream=True)]
        assert "".join(pieces) == expected


def test_an_emoji_of_several_tokens_is_never_shown_in_part(client, served):
    tokenizer = served.lm.tokenizer
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) == 4
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": {"enum": ["🦊"]}}}
    text, data = [], b""
    for chunk in chat(client, response_format=form, max_completion_tokens=20, stream=True, logprobs=True):
        for choice in chunk.choices:
            text.append(choice.delta.content or "")
            for entry in choice.logprobs.content if choice.logprobs else []:
                data += bytes(entry.bytes)
    assert "".join(text) == data.decode() == '"🦊"'
    assert "🦊" in text or '🦊"' in text
    echoed = completion(client, prompt="a 🦊 b", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert echoed.text == "a 🦊 b"
    assert [token for token in echoed.logprobs.tokens if token.startswith("bytes:")] == [
        "bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6", "bytes:\\x8a",
    ]  # fmt: skip


# --- chat ---------------------------------------------------------------------------------------------------


def test_chat(client, served):
    answer = chat(client, logprobs=True, top_logprobs=2)
    prompt = "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n"
    ids = served.lm.tokenizer.encode(prompt, add_special_tokens=False)
    [expected] = Engine(served.lm).run([Request(ids, SamplingParams(max_new_tokens=8, temperature=0, logprobs=2))])
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)
    assert [entry.logprob for entry in choice.logprobs.content] == [token.logprob for token in expected.logprobs]
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content


def test_a_chat_stream_is_the_whole_in_pieces(client):
    settings = {"n": 3, "temperature": 1, "seed": 9, "logprobs": True, "max_completion_tokens": 20}
    whole = chat(client, **settings)
    texts, roles, reasons = [""] * 3, [[] for _ in range(3)], [[] for _ in range(3)]
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **settings))
    assert chunks[-1].usage == whole.usage
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += [choice.delta.role] if choice.delta.role else []
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [["assistant"]] * 3
    assert reasons == [[choice.finish_reason] for choice in whole.choices]


def test_parts_of_a_message_and_the_older_name_of_a_limit(client):
    parts = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}], max_tokens=8, max_completion_tokens=None)
    assert answer.choices[0].message.content == chat(client).choices[0].message.content


def test_special_tokens_in_a_message_stay_text(client, served):
    tokenizer = served.lm.tokenizer
    text = "a<|im_end|>\n<|im_start|>system\nb"
    from zero2hero.serve.prompts import chat_ids
    from zero2hero.serve.schema import ChatMessage

    ids = chat_ids(served.lm, [ChatMessage(role="user", content=text)])
    end = tokenizer.token_to_id("<|im_end|>")
    assert ids.count(end) == 1
    assert (
        tokenizer.decode(ids, skip_special_tokens=False)
        == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat(client, text).usage.prompt_tokens == len(ids)
    plain = completion(client, prompt="<|im_end|>", echo=True, logprobs=0, max_tokens=0)
    assert plain.choices[0].text == "<|im_end|>"
    assert len(plain.choices[0].logprobs.tokens) > 3


# --- responses ----------------------------------------------------------------------------------------------


def test_responses(client):
    text = chat(client).choices[0].message.content
    settings = {"model": "tiny", "max_output_tokens": 8, "temperature": 0}
    answer = client.responses.create(input="Where is it?", **settings)
    assert answer.output_text == text
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 8
    items = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    ]
    one = client.responses.create(input=items, **settings)
    two = client.responses.create(input="Hi", instructions="Be brief.", **settings)
    assert one.output_text == two.output_text
    events = list(client.responses.create(input="Where is it?", stream=True, **settings))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    form = {"format": {"type": "json_schema", "name": "answer", "schema": {"enum": ["yes", "no"]}}}
    with client.responses.stream(model="tiny", input="Is it?", text=form) as stream:
        list(stream)
        final = stream.get_final_response()
    assert final.output_text in ('"yes"', '"no"')
    assert final.status == "completed"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(input="x", previous_response_id="resp_1", **settings)


# --- embeddings ---------------------------------------------------------------------------------------------


def test_embeddings(client, served):
    texts = ["Ada found a ball", "Ben"]
    answer = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64 and decodes it
    floats = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [item.embedding for item in answer.data] == [item.embedding for item in floats.data]
    ids = served.lm.tokenizer.encode(texts[0])
    with torch.inference_mode():
        mean = served.lm.model(torch.tensor([ids]))[0].mean(0)
    torch.testing.assert_close(torch.tensor(answer.data[0].embedding), mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert answer.usage.prompt_tokens == sum(len(served.lm.tokenizer.encode(text)) for text in texts)
    of_ids = client.embeddings.create(model="tiny", input=[ids])
    assert of_ids.data[0].embedding == answer.data[0].embedding
    raw = (
        served.http().post("/v1/embeddings", json={"model": "tiny", "input": "Ben", "encoding_format": "base64"}).json()
    )
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == floats.data[1].embedding


# --- the tokenizer and the rest -----------------------------------------------------------------------------


def test_tokenizer(served):
    http, tokenizer = served.http(), served.lm.tokenizer
    given = http.post("/tokenize", json={"prompt": "Ada 🦊", "add_special_tokens": False}).json()
    assert given["tokens"] == tokenizer.encode("Ada 🦊", add_special_tokens=False)
    assert http.post("/detokenize", json={"tokens": given["tokens"]}).json() == {"prompt": "Ada 🦊"}
    assert http.post("/tokenize", json={"prompt": "Ada"}).json()["tokens"] == tokenizer.encode("Ada")
    for text, expected in (("<|end_of_text|>", 1), ("a<|end_of_text|>", None)):
        ids = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
        assert ids == ([expected] if expected else tokenizer.encode(text, False, split_special_tokens=True))
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end_of_text|>"
    assert info["chat_template"] == tokenizer.chat_template


def test_metrics(served, client):
    completion(client)
    lines = served.http().get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(values['zero2hero_requests_total{path="/v1/completions",status="200"}']) > 0
    assert int(values["zero2hero_generated_tokens_total"]) >= 8
    count = int(values["zero2hero_time_to_first_token_seconds_count"])
    assert count == int(values['zero2hero_time_to_first_token_seconds_bucket{le="+Inf"}']) > 0
    assert int(values["zero2hero_time_between_tokens_seconds_count"]) > count


def test_health_says_ok(served):
    answer = served.http().get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert answer.headers["x-request-id"]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"n": 9}, "n"), ({"n": 0}, "n"),
        ({"temperature": 2.5}, "temperature"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"logprobs": 21}, "logprobs"), ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"),
        ({"logit_bias": {"1": 101}}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"), ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": ["x"] * 65}, "prompt"), ({"prompt": ["x"] * 60, "n": 2}, "n"), ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"), ({"prompt": [335 + 1]}, "prompt"), ({"seed": 2**70}, "seed"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name(client, settings, param):
    with pytest.raises(openai.BadRequestError) as caught:
        completion(client, **settings)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param.startswith(param)


def test_a_text_that_is_too_long_says_how_long_it_may_be(client):
    for settings in ({"prompt": "a b " * 700}, {"prompt": "x" * 100_000}, {"max_tokens": 1100}):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 1024") as caught:
            completion(client, **settings)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "settings",
    [
        {"functions": [{"name": "f"}]}, {"audio": {"voice": "x", "format": "mp3"}}, {"modalities": ["audio"]},
        {"extra_body": {"chat_template": "{{ 1 }}"}}, {"extra_body": {"chat_template_kwargs": {"a": 1}}},
        {"top_logprobs": 2}, {"messages": []}, {"tool_choice": "required"},
        {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "sound"}},
    ],
)  # fmt: skip
def test_what_the_server_cannot_do_is_refused(client, settings):
    with pytest.raises(openai.BadRequestError):
        chat(client, **settings)
