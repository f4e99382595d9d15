"""Invariants 3 and 14 of generation: cached = full forward, padded = alone, batch of 1 = batch of 16, one seed
one text; and of streaming: the pieces join to the text, without half characters or parts of a stop string."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zero2hero.config import DecoderConfig, MoEConfig
from zero2hero.device import pick_device
from zero2hero.errors import UserError
from zero2hero.generate.decode import generate_tokens
from zero2hero.generate.fast import PlainDecoder, PreparedDecoder, prepare
from zero2hero.generate.native_reader import NativeReader
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.language_model import LanguageModel, load, save
from zero2hero.models.decoder import Decoder
from zero2hero.models.gemma import Gemma, GemmaConfig
from zero2hero.nn.feedforward import ACTIVATIONS
from zero2hero.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = DecoderConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=48, tie_word_embeddings=False, bos_token_id=1,
)  # fmt: skip
GPT2 = {
    "position": "learned", "norm": "layernorm", "feedforward": "gelu_new", "attention_bias": True,
    "output_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "dropout": 0.5,
}  # fmt: skip
SHAPES = {
    "llama": {},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "as many key heads as heads": {"num_key_value_heads": 4},
    "head width of its own": {"head_dim": 12},
    "window": {"sliding_window": 5},
    "qk_norm": {"qk_norm": True, "head_dim": 12},
    "biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "bias on queries, keys and values only": {"attention_bias": True},
    "gpt2": GPT2,
    "sinusoidal": {"position": "sinusoidal"},
    "no positions": {"position": "none"},
    "window of one layer": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}},
    "geglu": {"feedforward": "geglu"},
    "experts": {"moe": MoEConfig(4, 2)},
    "gemma2": {
        "norm": "rmsnorm_offset",
        "feedforward": "geglu",
        "post_norms": True,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    **{f"plain feed-forward, {name}": {"feedforward": name} for name in ACTIVATIONS},
}


OF_THEIR_OWN = ("experts", "gemma2")  # blocks that the fast forms do not know


def random_model(seed: int = 0, **changes) -> Decoder:
    """Every weight random, large enough that the logits differ clearly."""
    if "post_norms" in changes:
        model: Decoder = Gemma(GemmaConfig(**{**vars(SMALL), **changes})).eval()
    else:
        model = Decoder(dataclasses.replace(SMALL, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return model


def ragged_prompts(count: int = 4, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(61) for _ in range(numbers.randrange(1, 15))] for _ in range(count)]


def run(model: Decoder, prompts, eos_ids=(), **config) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in range(len(prompts) * config.get("num_return_sequences", 1))]
    for token in generate_tokens(model, prompts, SamplingConfig(**config), eos_ids):
        texts[token.row].append(token.id)
    return texts


def greedy_without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_batch_with_cache_equals_full_forward_alone(shape):
    model, prompts = random_model(**SHAPES[shape]), ragged_prompts()
    expected = [greedy_without_cache(model, prompt, 12) for prompt in prompts]
    assert len({tuple(text) for text in expected}) > 2
    assert run(model, prompts, temperature=0, max_new_tokens=12) == expected
    # equal lengths take another way through the masks
    assert run(model, [prompts[0]] * 2, temperature=0, max_new_tokens=12) == [expected[0]] * 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_prepared_model_equals_the_model(shape, ragged):
    model = random_model(**SHAPES[shape])
    ids = torch.tensor(ragged_prompts(6, seed=3)[0][:4] * 3).view(3, -1)
    positions = torch.tensor([[ids.shape[1]], [2], [1]]) if ragged else None
    caches = [model.make_cache(3, 20), model.make_cache(3, 20)]
    prepared = prepare(model)
    assert type(prepared) is (PlainDecoder if shape in OF_THEIR_OWN else PreparedDecoder)
    with torch.inference_mode():
        for part, at in ((ids, None), (ids[:, :1], positions)):
            expected = model(part, positions=at, cache=caches[0])
            got = prepared(model, part, caches[1], at)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(prepared.logits(got[:, -1]), model.logits(expected[:, -1]), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [SHAPES["window of one layer"], SHAPES["experts"], SHAPES["gemma2"], SHAPES["geglu"],
     {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}],
)  # fmt: skip
def test_the_native_reader_refuses_what_it_does_not_know(changes):
    model = random_model(**changes)
    assert not NativeReader.fits(model)
    assert run(model, [[3, 1]], temperature=0, max_new_tokens=20)[0] == greedy_without_cache(model, [3, 1], 20)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "window"])
def test_sampled_text_is_the_same_alone_and_in_a_batch_of_16(shape):
    model, prompts = random_model(**SHAPES[shape]), ragged_prompts(16, seed=1)
    options = {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 5, "max_new_tokens": 15}
    eos_ids = {3, 4, 5}
    together = run(model, prompts, eos_ids, **options)
    assert len({len(text) for text in together}) > 2  # rows left the batch at different times
    assert together == [run(model, [prompt], eos_ids, **options)[0] for prompt in prompts]
    assert together == run(model, prompts, eos_ids, **options)
    assert together != run(model, prompts, eos_ids, **options | {"seed": 6})


def test_samples_of_one_prompt_share_the_prefill_and_differ():
    model, prompts = random_model(), ragged_prompts(3)
    texts = run(model, prompts, num_return_sequences=4, seed=1, max_new_tokens=12)
    assert len({tuple(text) for text in texts}) == 12
    for i, prompt in enumerate(prompts):
        assert run(model, [prompt], num_return_sequences=4, seed=1, max_new_tokens=12) == texts[4 * i : 4 * i + 4]
        assert run(model, [prompt], seed=1, max_new_tokens=12) == [texts[4 * i]]


def test_recorded_logprobs_equal_the_models_own():
    """What policy-gradient methods rely on: ratio 1 before the first update."""
    model, prompt = random_model(), [5, 9, 2]
    tokens = list(generate_tokens(model, [prompt], SamplingConfig(temperature=0.7, seed=2, max_new_tokens=30)))
    ids = torch.tensor([prompt + [t.id for t in tokens]])
    with torch.no_grad():
        logprobs = (model.logits(model(ids))[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor([t.logprob for t in tokens]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_a_change_of_the_weights_is_noticed(optimizer):
    """Fused optimizers change weights without advancing their version counters."""
    model, prompt = random_model(), [7, 8]
    before = run(model, [prompt], temperature=0, max_new_tokens=20)[0]
    step = torch.optim.AdamW(model.parameters(), lr=0.3, **optimizer)
    model.logits(model(torch.tensor([[1, 2, 3]]))).square().sum().backward()
    step.step()
    after = run(model, [prompt], temperature=0, max_new_tokens=20)[0]
    assert after == greedy_without_cache(model, prompt, 20) != before
    model.lm_head.weight.data.mul_(-1)
    assert run(model, [prompt], temperature=0, max_new_tokens=20)[0] == greedy_without_cache(model, prompt, 20) != after


class Halved(torch.nn.Module):
    """A projection that is no `nn.Linear`, as LoRA's and quantized ones are."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.5 * self.inner(x)


def test_projections_of_another_kind_and_hooks_take_part():
    model, prompt = random_model(), [3, 1, 4]
    for block in model.layers:
        block.self_attn.q_proj, block.mlp.down_proj = Halved(block.self_attn.q_proj), Halved(block.mlp.down_proj)
    assert isinstance(prepare(model), PreparedDecoder)
    assert run(model, [prompt], temperature=0, max_new_tokens=20)[0] == greedy_without_cache(model, prompt, 20)
    model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -output)
    assert isinstance(prepare(model), PlainDecoder)
    assert run(model, [prompt], temperature=0, max_new_tokens=20)[0] == greedy_without_cache(model, prompt, 20)


def test_generating_in_the_middle_of_training():
    model = random_model(**GPT2).train()
    first, second = (run(model, [[1, 2]], temperature=0, max_new_tokens=9) for _ in range(2))
    assert first == second  # no dropout
    assert model.training
    for p in model.parameters():
        assert not p.is_inference()
    model.logits(model(torch.tensor([[1, 2]]))).sum().backward()


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_the_context_is_the_limit(shape):
    model = random_model(**SHAPES[shape])
    tokens = list(generate_tokens(model, [[1] * 40, [2] * 48], SamplingConfig(temperature=0, max_new_tokens=100)))
    assert [t.row for t in tokens].count(0) == 9  # positions 40 to 47, and one after the last
    assert [t.row for t in tokens].count(1) == 1
    assert [t.finish_reason for t in tokens if t.finish_reason] == ["length", "length"]
    with pytest.raises(UserError, match="49 tokens; the model's context is 48"):
        next(generate_tokens(model, [[1] * 49]))
    with pytest.raises(UserError, match="token id 61"):
        next(generate_tokens(model, [[61]]))
    with pytest.raises(UserError, match="token id -1"):
        next(generate_tokens(model, [[-1]]))


def test_an_empty_prompt_is_the_begin_of_text_token():
    model = random_model()
    assert run(model, [[]], temperature=0) == run(model, [[1]], temperature=0)
    assert run(model, [], temperature=0) == []
    with pytest.raises(UserError, match="empty"):
        next(generate_tokens(random_model(bos_token_id=None), [[]]))


def test_every_end_token_ends_and_is_yielded():
    model, prompts = random_model(), ragged_prompts(4, seed=2)
    free = run(model, prompts, temperature=0, max_new_tokens=20)
    eos_ids = {free[0][5], free[1][9]}
    for text, cut in zip(free, run(model, prompts, eos_ids, temperature=0, max_new_tokens=20)):
        end = next((i + 1 for i, token in enumerate(text) if token in eos_ids), 20)
        assert cut == text[:end]


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat. Then the cat slept. "] * 20, vocab_size=300)


def scripted(tokenizer: Tokenizer, ids: list[int], **changes) -> LanguageModel:
    """A model that writes `ids` after a prompt of one token: its next token depends on the position alone."""
    length = len(ids) + 2
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=length, num_attention_heads=1, num_hidden_layers=1,
        position="learned", max_position_embeddings=length, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    model = Decoder(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_() if p.dim() > 1 else p.fill_(1.0)
        model.embed_positions.weight.copy_(torch.eye(length))
        for position, token_id in enumerate(ids):
            model.lm_head.weight[token_id, position] = 1.0
    return LanguageModel(model, tokenizer)


TEXTS = st.text(alphabet=st.sampled_from("the cat. 🙂é世\n👩‍👩‍👧"), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, stops=st.lists(st.text(alphabet=st.sampled_from("the ca🙂世"), min_size=1, max_size=6), max_size=3))
def test_streamed_text_is_whole_and_never_part_of_a_stop_string(tokenizer, text, stops):
    ids = tokenizer.encode(text, add_special_tokens=False)
    lm = scripted(tokenizer, ids)
    options = {"max_new_tokens": len(ids), "temperature": 0, "stop": stops}
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text  # the stop string that is complete first ends the text
    pieces = list(lm.stream("", **options))
    assert "".join(pieces) == expected
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert lm.generate("", **options) == expected
    heard: list[str] = []
    lm.generate("", stream=heard.append, **options)
    assert heard == pieces


def test_text_is_given_out_as_soon_as_it_is_safe(tokenizer):
    text = "the cat 🙂 sat"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = list(scripted(tokenizer, ids).stream("", max_new_tokens=len(ids), temperature=0))
    assert len(pieces) > 3
    held = list(scripted(tokenizer, ids).stream("", max_new_tokens=len(ids), temperature=0, stop="cat 🙃"))
    assert "".join(held) == text
    assert pieces[0] == held[0]


def test_a_stop_string_that_is_a_special_token(tokenizer):
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    lm = scripted(tokenizer, [*ids, tokenizer.token_to_id("<|im_end|>"), *ids])
    assert lm.generate("", temperature=0, stop="<|im_end|>") == "the cat"


def test_end_tokens_of_generation_config_and_their_order(tokenizer):
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    lm = scripted(tokenizer, [*ids, 3, *ids, 4], eos_token_id=4)
    assert lm.eos_ids == {4}
    assert lm.generate("", temperature=0) == "the cat" * 2
    lm.generation_config["eos_token_id"] = [4, 3]
    assert lm.generate("", temperature=0) == "the cat"
    lm.generation_config |= {"temperature": 0.9, "top_k": 7, "do_sample": False, "max_new_tokens": 5}
    assert lm.sampling_config() == SamplingConfig(temperature=0.9, top_k=7, do_sample=False, max_new_tokens=5)
    assert not lm.sampling_config(temperature=0.5).greedy
    with pytest.raises(UserError, match="Did you mean 'temperature'"):
        lm.generate("", temprature=0.5)


@pytest.fixture(scope="module")
def lm(tokenizer) -> LanguageModel:
    return LanguageModel(random_model(vocab_size=tokenizer.vocab_size, num_key_value_heads=2), tokenizer)


def test_what_generate_returns(lm, capsys):
    options = {"max_new_tokens": 6, "seed": 1}
    one = lm.generate("the cat", **options)
    assert one.startswith("the cat")
    assert one == "the cat" + lm.generate("the cat", return_full_text=False, **options)
    assert one == "the cat" + "".join(lm.stream("the cat", **options))
    several = lm.generate(["the cat", "on", "the cat"], batch_size=2, **options)
    assert several[0] == several[2] == one
    assert lm.generate([], **options) == []
    samples = lm.generate("the cat", num_return_sequences=3, **options)
    assert len(set(samples)) == 3
    assert samples[0] == one
    capsys.readouterr()
    lm.generate("the cat", stream=True, **options)
    assert capsys.readouterr().out == one + "\n"
    with pytest.raises(UserError, match="one text can be streamed"):
        lm.generate(["a", "b"], stream=True)


def test_loglikelihood_adds_up(lm):
    texts = ("the cat", " sat on", " the mat")
    parts = lm.loglikelihood(texts[0], texts[1]) + lm.loglikelihood(texts[0] + texts[1], texts[2])
    assert parts == pytest.approx(lm.loglikelihood(texts[0], texts[1] + texts[2]), abs=1e-4)
    assert lm.loglikelihood("the cat", "") == 0


def test_saved_and_loaded_it_writes_the_same(lm, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "run" / "model.safetensors.index.json").write_text("{}\n")
    (tmp_path / "run" / "README.md").write_text("mine\n")
    lm.generation_config = {"eos_token_id": [1, 4], "top_k": 5}
    for directory in (tmp_path / "run", tmp_path / "new"):
        save(lm, directory)
        again = load(directory, device="cpu")
        assert again.eos_ids == {1, 4}
        assert again.sampling_config().top_k == 5
        assert again.generate("the cat", seed=3) == lm.generate("the cat", seed=3)
        assert not list(directory.glob(".*"))
    assert (tmp_path / "run" / "README.md").read_text() == "mine\n"
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert "pipeline_tag: text-generation" in (tmp_path / "new" / "README.md").read_text()
    assert load(tmp_path / "new", "cpu", "bfloat16").model.embed_tokens.weight.dtype == torch.bfloat16
    lm.generation_config = {}


def test_an_interrupted_save_leaves_the_old_model(lm, tmp_path, monkeypatch):
    save(lm, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(Tokenizer, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(UserError, match="No space"):
        save(LanguageModel(random_model(1, vocab_size=lm.tokenizer.vocab_size), lm.tokenizer), tmp_path / "run")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_loading_what_is_not_there_or_does_not_fit(lm, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load(tmp_path / "nowhere")
    save(LanguageModel(random_model(), lm.tokenizer), tmp_path / "run")
    with pytest.raises(UserError, match="do not belong together"):
        load(tmp_path / "run")
    with pytest.raises(UserError, match="dtype"):
        load(tmp_path / "run", dtype="float23")


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="unknown device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="not available"):
            pick_device("cuda:3")


@pytest.mark.parametrize("shape", ["llama", "gpt2", "window", "qk_norm"])
def test_bf16_steps_are_as_exact_as_the_models(shape, bf16):
    """Both round, but not alike: their distances to the fp32 logits are compared, over several models."""
    distance = {"model": 0.0, "prepared": 0.0}
    ids = torch.arange(12)[None]
    for seed in range(6):
        exact, model = random_model(seed, **SHAPES[shape]), random_model(seed, **SHAPES[shape]).to(torch.bfloat16)
        caches = [m.make_cache(1, 20) for m in (exact, model, model)]
        with torch.inference_mode():
            for part in (ids, ids[:, :1], ids[:, :1]):
                target = exact.logits(exact(part, cache=caches[0])[:, -1])
                plain = model.logits(model(part, cache=caches[1])[:, -1])
                got = prepare(model).logits(prepare(model)(model, part, caches[2])[:, -1])
                distance["model"] += float((plain.float() - target).square().sum())
                distance["prepared"] += float((got.float() - target).square().sum())
    assert distance["prepared"] < 2.5 * distance["model"]  # the model's own kernels round less often
