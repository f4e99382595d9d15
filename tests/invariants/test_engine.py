"""The engine: what a text is does not depend on what else runs, when it came, or what was read before."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
import torch
from test_generation import SHAPES, greedy_without_cache, ragged_prompts, random_model, scripted

from zero2hero.errors import UserError
from zero2hero.generate.engine import Engine, QueueFull, Request, SamplingParams
from zero2hero.generate.native_reader import NativeReader
from zero2hero.generate.pages import Pages
from zero2hero.generate.reader import Piece
from zero2hero.generate.speculative import DraftModel, PromptLookup
from zero2hero.language_model import LanguageModel
from zero2hero.nn.quantized import Linear8bit
from zero2hero.tokenizer import Tokenizer
from zero2hero.tune import LoraConfig, add_lora, quantize_int8, set_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


TEXT = "the cat sat on the mat. Then the cat slept. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 20], vocab_size=300)


def engine_of(model, tokenizer, **options) -> Engine:
    return Engine(LanguageModel(model, tokenizer), **options)


@pytest.fixture(scope="module")
def model():
    return random_model(vocab_size=300)


def settings(seed: int = 5, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.2, "seed": seed, "max_new_tokens": 15, "ignore_eos": True, **more})


GREEDY = settings(temperature=0, max_new_tokens=12)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_family_equals_the_full_forward(shape, tokenizer):
    model, prompts = random_model(**SHAPES[shape]), ragged_prompts(6)
    engine = engine_of(model, tokenizer, prefill_chunk=7, max_batch_size=4)
    texts = [s.output_ids for s in engine.run(Request(prompt, GREEDY) for prompt in prompts)]
    assert texts == [greedy_without_cache(model, prompt, 12) for prompt in prompts]


def test_a_text_is_the_same_alone_and_among_16(model, tokenizer):
    requests = [
        Request(prompt, settings(i, top_p=0.9 if i % 2 else 1.0, top_k=20 * (i % 3), repetition_penalty=1 + i / 20,
                                 presence_penalty=i / 10, min_p=0.01 * (i % 4), max_new_tokens=5 + i))
        for i, prompt in enumerate(ragged_prompts(16, seed=1))
    ]  # fmt: skip
    together = [s.output_ids for s in engine_of(model, tokenizer).run(requests)]
    assert len({tuple(text) for text in together}) == 16
    assert together == [engine_of(model, tokenizer, prefill_chunk=3).run([r])[0].output_ids for r in requests]


def test_joining_and_leaving_at_random(model, tokenizer):
    numbers = random.Random(0)
    requests = [Request(p, settings(i, max_new_tokens=1 + i % 9)) for i, p in enumerate(ragged_prompts(30, seed=2))]
    expected = [engine_of(model, tokenizer).run([r])[0].output_ids for r in requests]
    engine = engine_of(model, tokenizer, max_batch_size=5, prefill_chunk=4, max_cached_tokens=160)
    sequences, cancelled = [], set()
    while len(sequences) < len(requests) or engine.counters["running"]:
        for _ in range(min(numbers.randrange(4), len(requests) - len(sequences))):
            sequences.append(engine.submit(requests[len(sequences)]))
        if numbers.random() < 0.2 and engine.running:
            victim = numbers.choice(engine.running)
            engine.cancel(victim)
            cancelled.add(sequences.index(victim))
        events = engine.step()
        assert all(s.finish_reason is None for s in engine.running)
        assert len({id(event.sequence) for event in events}) == len(events)
    assert len(cancelled) > 2
    for i, (sequence, text) in enumerate(zip(sequences, expected)):
        assert sequence.finish_reason == ("cancelled" if i in cancelled else "length")
        assert sequence.output_ids == text[: len(sequence.output_ids)]
        assert i in cancelled or len(sequence.output_ids) == len(text)
    assert engine.counters["cached_tokens"] == 0


def test_cancelling_frees_the_place_within_a_step(model, tokenizer):
    engine = engine_of(model, tokenizer, max_batch_size=1)
    first, second = (engine.submit(Request([5, 6, 7], settings(max_new_tokens=30))) for _ in range(2))
    engine.step()
    assert (engine.counters["running"], engine.counters["waiting"]) == (1, 1)
    engine.cancel(first)
    events = engine.step()
    assert [(e.sequence, e.finish_reason) for e in events] == [(first, "cancelled"), (second, None)]
    assert (engine.counters["running"], engine.counters["waiting"]) == (1, 0)
    engine.cancel(second)
    engine.step()
    assert (engine.counters["running"], engine.counters["cached_tokens"]) == (0, 0)
    waiting = engine.submit(Request([5], settings()))
    engine.cancel(waiting)
    assert engine.step()[0].finish_reason == waiting.finish_reason == "cancelled"


def test_samples_of_one_prompt_share_its_pages(tokenizer):
    model = random_model(max_position_embeddings=100)
    prompt = [i % 50 + 3 for i in range(39)]
    requests = [Request(prompt, settings(max_new_tokens=12), sample=i) for i in range(4)]
    engine = engine_of(model, tokenizer)
    together = [s.output_ids for s in engine.run(requests)]
    assert len({tuple(text) for text in together}) == 4
    assert engine.counters["prefix_hits"] == 3 * 32
    assert engine.counters["read_tokens"] == 39 + 3 * 7 + 4 * 11
    assert together == [engine_of(model, tokenizer).run([r])[0].output_ids for r in requests]
    # a conversation that goes on finds the written tokens too
    more = [*prompt, *together[0], 7, 8]
    assert engine.run([Request(more, GREEDY)])[0].output_ids == greedy_without_cache(model, more, 12)
    assert engine.counters["prefix_hits"] == 3 * 32 + 48


def test_memory_that_is_needed_again(model, tokenizer):
    """Known pages give way, oldest first, and a page never holds what its name does not say."""
    engine = engine_of(model, tokenizer, max_cached_tokens=96, max_batch_size=3)
    numbers = random.Random(1)
    beginnings = [[numbers.randrange(3, 60) for _ in range(20)] for _ in range(4)]
    requests = [Request([*b, i], settings(max_new_tokens=4)) for i in range(6) for b in numbers.sample(beginnings, 3)]
    texts = [s.output_ids for s in engine.run(requests)]
    assert texts == [engine_of(model, tokenizer).run([r])[0].output_ids for r in requests]
    assert 0 < engine.counters["prefix_hits"] < 16 * len(requests)


def test_new_weights_are_noticed_after_forget(tokenizer):
    model, prompt = random_model(), [i % 50 + 3 for i in range(20)]
    engine = engine_of(model, tokenizer)
    engine.run([Request(prompt, GREEDY)])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1)
    engine.forget()
    assert engine.run([Request(prompt, GREEDY)])[0].output_ids == greedy_without_cache(model, prompt, 12)


def test_log_probabilities_equal_the_forward(model, tokenizer):
    prompt = [9, 4, 44, 7, 21, 3, 3, 50]
    params = settings(temperature=0.7, top_k=40, logprobs=3, prompt_logprobs=2)
    sequence = engine_of(model, tokenizer, prefill_chunk=3).run([Request(prompt, params)])[0]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([sequence.ids])))[0, :-1]
    logprobs = logits.log_softmax(-1)
    reported = [*sequence.prompt_logprobs[1:], *sequence.logprobs]
    assert sequence.prompt_logprobs[0] is None
    assert [r.id for r in reported] == sequence.ids[1:]
    picked = logprobs.gather(-1, torch.tensor(sequence.ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([r.logprob for r in reported]), picked, rtol=0, atol=1e-5)
    for r, row in zip(reported, logprobs):
        count = len(r.top)
        assert [i for i, _ in r.top] == row.topk(count).indices.tolist()
        assert all(value == r.logprob for i, value in r.top if i == r.id)  # the same float
    assert {len(r.top) for r in sequence.logprobs} == {3}
    cut = logits[len(prompt) - 1 :] / 0.7
    cut = cut.masked_fill(cut < cut.topk(40).values[:, -1:], float("-inf")).log_softmax(-1)
    drawn = cut.gather(-1, torch.tensor(sequence.output_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sequence.behaviour_logprobs), drawn, rtol=0, atol=3e-5)
    alone = engine_of(model, tokenizer).run([Request(prompt, settings(max_new_tokens=0, prompt_logprobs=0))])[0]
    assert [r.logprob for r in alone.prompt_logprobs[1:]] == pytest.approx(picked[:7].tolist(), abs=1e-5)
    assert (alone.output_ids, alone.finish_reason) == ([], "length")


def test_penalties_biases_and_what_is_forbidden(model, tokenizer):
    """Each against its definition, applied to the full forward's logits step by step."""
    prompt = [9, 4, 44]
    free = greedy_without_cache(model, prompt, 12)

    def write(**params):
        return engine_of(model, tokenizer).run([Request(prompt, settings(temperature=0, max_new_tokens=12, **params))])[
            0
        ]

    def expected(change):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                logits = model.logits(model(torch.tensor([ids]))[0, -1])
                change(logits, ids)
                ids.append(int(logits.argmax()))
        return ids[3:]

    def counted(presence, frequency):
        def change(logits, ids):
            for i in ids[3:]:
                logits[i] -= frequency
            logits[list(set(ids[3:]))] -= presence

        return change

    assert write(presence_penalty=1.5).output_ids == expected(counted(1.5, 0.0))
    assert write(frequency_penalty=0.8).output_ids == expected(counted(0.0, 0.8))
    assert write(presence_penalty=-3.0, frequency_penalty=0.5).output_ids == expected(counted(-3.0, 0.5))

    def biased(logits, ids):
        logits[17] += 2.5
        logits[free[0]] -= 100

    assert write(logit_bias={17: 2.5, free[0]: -100}).output_ids == expected(biased) != free
    assert write(logit_bias={33: 100}).output_ids == [33] * 12

    def bad(logits, ids):
        logits[free[0]] = -torch.inf
        if ids[-2:] == [free[3], free[4]]:
            logits[free[5]] = -torch.inf

    text = write(bad_words_ids=((free[0],), tuple(free[3:6]))).output_ids
    assert text == expected(bad) != free
    only_longer = write(bad_words_ids=(tuple(free[3:6]),)).output_ids
    assert only_longer[:5] == free[:5]
    assert only_longer[5] != free[5]
    ends = write(stop_token_ids=(free[2],))
    assert (ends.output_ids, ends.finish_reason) == (free[: free.index(free[2]) + 1], "stop")
    later = write(stop_token_ids=(free[2],), min_new_tokens=6)
    assert free[2] not in later.output_ids[:6]


def test_too_much_is_refused(model, tokenizer):
    engine = engine_of(model, tokenizer, max_waiting=2, max_cached_tokens=32)
    with pytest.raises(UserError, match="do not fit"):
        engine.submit(Request([3] * 20, settings(max_new_tokens=28)))
    with pytest.raises(UserError, match="context is 48"):
        engine.submit(Request([3] * 49, settings()))
    with pytest.raises(UserError, match="token id 300"):
        engine.submit(Request([300], settings()))
    with pytest.raises(UserError, match="adapter 'x'"):
        engine.submit(Request([3], settings(), adapter="x"))
    with pytest.raises(UserError, match="logit_bias"):
        engine.submit(Request([3], settings(logit_bias={300: 1.0})))
    for bad in (
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": -1},
        {"logit_bias": {3: float("inf")}}, {"stop": ("",)}, {"bad_words_ids": ((),)}, {"seed": -1}, {"logprobs": -1},
        {"presence_penalty": float("nan")}, {"repetition_penalty": 0}, {"min_new_tokens": 1.5}, {"top_k": True},
    ):  # fmt: skip
        with pytest.raises(UserError):
            settings(**bad)
    for _ in range(2):
        engine.submit(Request([3], settings()))
    with pytest.raises(QueueFull):
        engine.submit(Request([3], settings()))
    engine.step()
    engine.submit(Request([3], settings()))


def test_settings_that_leave_nothing_harm_nobody(model, tokenizer):
    """Extreme settings of one request must not end the others with "the logits are not numbers"."""
    everything = tuple((i,) for i in range(300))
    wild = [
        {"bad_words_ids": everything}, {"stop_token_ids": tuple(range(300)), "min_new_tokens": 5},
        {"temperature": 1e-40}, {"temperature": 1e4}, {"top_p": 0.0, "min_p": 1.0, "top_k": 1},
        {"repetition_penalty": 0.01, "temperature": 1e-4}, {"logit_bias": dict.fromkeys(range(300), -1e4)},
        {"frequency_penalty": 1e4, "presence_penalty": -1e4}, {"top_k": 10**30},
    ]  # fmt: skip
    calm = Request([3, 4], settings())
    sequences = engine_of(model, tokenizer).run([*(Request([3, 4], settings(**w)) for w in wild), calm])
    assert all(s.finish_reason in ("stop", "length") for s in sequences)
    assert sequences[-1].output_ids == engine_of(model, tokenizer).run([calm])[0].output_ids


def test_weights_that_are_no_numbers(tokenizer):
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    engine = engine_of(model, tokenizer)
    sequence = engine.submit(Request([3, 4], settings()))
    with pytest.raises(UserError, match="not numbers"):
        engine.step()
    assert sequence.finish_reason == "cancelled"
    assert engine.counters["running"] == engine.counters["cached_tokens"] == 0


def events_of(engine: Engine, request: Request):
    engine.submit(request)
    events = []
    while engine.waiting or engine.running:
        events += engine.step()
    return events


def test_streamed_text_has_whole_characters_and_no_part_of_a_stop_string(tokenizer):
    emoji = tokenizer.encode("the \N{GRINNING FACE} cat sat", add_special_tokens=False)
    assert len(emoji) > 6  # its four bytes are tokens of their own
    lm = scripted(tokenizer, emoji)
    pieces = [e.text for e in events_of(Engine(lm), Request([0], GREEDY))]
    assert "".join(pieces) == "the \N{GRINNING FACE} cat sat"[: len("".join(pieces))]
    assert any("\N{GRINNING FACE}" in piece for piece in pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    ids = [i for character in "the cat sat" for i in tokenizer.encode(character, add_special_tokens=False)]
    events = events_of(Engine(scripted(tokenizer, ids)), Request([0], settings(temperature=0, stop=("at s",))))
    assert [e.text for e in events] == ["t", "h", "e", " ", "c", "", "", "", ""]
    assert events[-1].finish_reason == "stop"


# ---------------------------------------------------------------- guessing ahead


def repetitive(count: int) -> list[Request]:
    """Prompts that copy themselves, so that there is something to look up."""
    numbers = random.Random(3)
    requests = []
    for i in range(count):
        run = [numbers.randrange(3, 60) for _ in range(6)]
        requests.append(Request(run * 3, settings(i, temperature=[0, 0.3, 1.0][i % 3], max_new_tokens=25)))
    return requests


@pytest.mark.parametrize("shape", ["llama", "gpt2", "window", "gemma2"])
@pytest.mark.parametrize("kind", ["lookup", "model", "the model itself"])
def test_guessing_ahead_changes_no_token(shape, kind, tokenizer):
    model, requests = random_model(**SHAPES[shape]), repetitive(6)
    drafter = PromptLookup() if kind == "lookup" else DraftModel(random_model(1) if kind == "model" else model)
    engine = engine_of(model, tokenizer, drafter=drafter, max_batch_size=4)
    plain = [(s.output_ids, s.finish_reason) for s in engine_of(model, tokenizer).run(requests)]
    assert [(s.output_ids, s.finish_reason) for s in engine.run(requests)] == plain
    counters = engine.counters
    assert 0 < counters["drafted_tokens"] >= counters["kept_tokens"]
    assert counters["generated_tokens"] == 6 * 25
    assert counters["cached_tokens"] == 0
    if kind == "the model itself":
        assert counters["kept_tokens"] == counters["drafted_tokens"]
        assert counters["steps"] < 60


def test_guesses_that_are_drawn_have_the_models_distribution(tokenizer):
    """Chi-square over many seeds, of the second and third token, with a drafter that is often right and often wrong."""
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.lm_head.weight.add_(0.05 * random_model(1).lm_head.weight)
    prompt = [5, 6, 7, 5, 6]
    engine = engine_of(model, tokenizer, drafter=DraftModel(small, num_tokens=3), max_batch_size=8)
    params = {"top_k": 4, "max_new_tokens": 3, "temperature": 1.0}
    count = 800
    texts = [tuple(s.output_ids) for s in engine.run(Request(prompt, settings(i, **params)) for i in range(count))]
    assert 0.05 < engine.counters["kept_tokens"] / engine.counters["drafted_tokens"] < 0.95

    def following(ids):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids]))[0, -1])
        top = logits.topk(4)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist()))

    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        expected = {(*text, i): p * q for text, p in expected.items() for i, q in following([*prompt, *text]).items()}
    found = Counter(texts)
    assert set(found) <= set(expected)
    large = {text: p for text, p in expected.items() if p * count >= 5}
    rest = 1 - sum(large.values())
    chi = sum((found[text] - p * count) ** 2 / (p * count) for text, p in large.items())
    chi += (count - sum(found[text] for text in large) - rest * count) ** 2 / (rest * count) if rest * count > 5 else 0
    degrees = len(large)
    assert chi < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations
    assert degrees > 8


def test_lookup_gives_up_where_nothing_repeats(tokenizer):
    model = random_model(vocab_size=300, max_position_embeddings=400)
    engine = engine_of(model, tokenizer, drafter=PromptLookup(min_ngram=1))
    engine.run([Request([5, 5, 6, 5], settings(temperature=3.0, max_new_tokens=300))])
    assert engine.counters["drafted_tokens"] < 150
    with pytest.raises(UserError):
        PromptLookup(max_ngram=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_the_native_reader_gives_the_same_bits_in_any_batch(dtype, int8, tokenizer, bf16):
    model = random_model(hidden_size=40, intermediate_size=88, num_hidden_layers=3, sliding_window=20).to(dtype)
    model = quantize_int8(model) if int8 else model
    if not NativeReader.fits(model):
        pytest.skip("no C compiler")
    requests = [Request(p, settings(i, max_new_tokens=20)) for i, p in enumerate(ragged_prompts(9, seed=8))]
    together = engine_of(model, tokenizer).run(requests)
    for request, sequence in zip(requests, together):
        alone = engine_of(model, tokenizer, prefill_chunk=3).run([request])[0]
        assert alone.output_ids == sequence.output_ids
        assert alone.behaviour_logprobs == sequence.behaviour_logprobs  # to the bit


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To one in 127 of the largest of 64 numbers."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))
    shares = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / shares).round() * shares).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("shape", ["llama", "window"])
@pytest.mark.parametrize("count", [5, 40])  # of tokens at once, which take two ways
def test_the_native_reader_in_int8_rounds_what_is_multiplied_too(shape, count, monkeypatch):
    model = quantize_int8(random_model(**SHAPES[shape], hidden_size=72, intermediate_size=200, head_dim=24))
    if not NativeReader.fits(model):
        pytest.skip("no C compiler")
    ids, pages = (ragged_prompts(6, seed=3)[0] * 40)[:count], Pages(model, 64)
    forward = Linear8bit.forward
    exact = model.logits(model(torch.tensor([ids]))[0])
    monkeypatch.setattr(Linear8bit, "forward", lambda self, x: forward(self, rounded(x)))
    with torch.inference_mode():
        expected = model.logits(model(torch.tensor([ids]))[0])
    got = NativeReader(model, pages)([Piece(ids, 0, pages.take(3), len(ids))])
    error = (got - expected).norm() / expected.norm()
    assert error < 0.01  # where sums differ in the last place, a number may be rounded the other way
    assert error < 0.5 * (exact - expected).norm() / expected.norm()


def test_adapters_in_one_batch(tokenizer):
    model = random_model()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    for seed, name in enumerate(("one", "two")):
        add_lora(model, config, name, seed=seed)
    with torch.no_grad():
        for seed, (name, p) in enumerate(model.named_parameters()):
            if ".adapters." in name:
                p.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed))
    set_adapter(model, None)
    prompts, names = ragged_prompts(6, seed=4), [None, "one", "two"] * 2
    prompts[3:] = prompts[:3] = [prompts[0] * 3] * 3
    engine = engine_of(model, tokenizer)
    texts = [s.output_ids for s in engine.run(Request(p, GREEDY, adapter=n) for p, n in zip(prompts, names))]
    expected = []
    for name in names[:3]:
        set_adapter(model, name)
        expected.append(greedy_without_cache(model, prompts[0], 12))
    assert texts == expected * 2
    assert len({tuple(text) for text in expected}) == 3
    with pytest.raises(UserError, match="Did you mean 'one'"):
        engine.submit(Request([3], GREEDY, adapter="ome"))
