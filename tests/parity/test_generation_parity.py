"""Generation equals transformers': every transformation of the logits, and greedy text of every family."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from zero2hero.config import DecoderConfig
from zero2hero.generate.decode import generate_tokens
from zero2hero.generate.request import Request, SamplingParams, Sequence
from zero2hero.generate.rows import History, Row, transform
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.language_model import load
from zero2hero.models import from_pretrained
from zero2hero.models.families import FAMILIES

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "tinystories656k").is_dir(), reason="needs the real weights in ../shared/data/tinystories656k"
)

# ---------------------------------------------------------------- transformations


def awkward_logits() -> dict[str, torch.Tensor]:
    random = torch.randn(6, 97, generator=torch.Generator().manual_seed(0)) * 4
    return {
        "random": random,
        "coarse, with many ties": random.round(),
        "all equal": torch.zeros(2, 97),
        "huge and tiny": random * 1e4,
        "some impossible": random.masked_fill(random < 1, -math.inf),
        "one possible": torch.full((1, 97), -math.inf).index_fill(1, torch.tensor([13]), 2.5),
    }


SETTINGS = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m, "repetition_penalty": r}
    for t, k, p, m, r in itertools.product(
        (1.0, 0.3, 2.5), (0, 1, 5, 500), (1.0, 0.9, 0.0), (0.0, 0.2), (1.0, 1.7, 0.6)
    )
]


@pytest.mark.parametrize("name", awkward_logits())
def test_transformations_equal_transformers(name):
    logits = awkward_logits()[name]
    ids = torch.randint(97, (len(logits), 12), generator=torch.Generator().manual_seed(1))
    for setting in SETTINGS:
        config = transformers.GenerationConfig(
            do_sample=True, **{k: v for k, v in setting.items() if k != "min_p" or v}
        )
        expected = reference_processors(config)(ids, logits.clone())
        got = transform(logits, rows_of(ids, **setting))
        assert torch.equal(got, expected), setting


def rows_of(ids, **setting) -> list[Row]:
    """Texts with these ids, all with the same settings."""
    rows = []
    for text in ids.tolist():
        sequence = Sequence(Request(text, SamplingParams(**setting)), text, 9, frozenset(), None)
        sequence.history = History(sequence, 97, torch.device("cpu"))
        rows.append(Row(sequence, []))
    return rows


def reference_processors(config):
    """What transformers' `generate` makes of a configuration, its own order included."""
    owner = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=97))
    return owner._get_logits_processor(config, input_ids_seq_length=12)


def test_defaults_change_nothing():
    logits = awkward_logits()["random"]
    assert torch.equal(transform(logits, rows_of(torch.ones(len(logits), 1, dtype=torch.int64))), logits)


# ---------------------------------------------------------------- greedy text

LLAMA = {
    "vocab_size": 61, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXTRA = {"gpt2": GPT2, "mistral": LLAMA | {"sliding_window": 7}, "qwen3": LLAMA | {"head_dim": 12}}


@pytest.mark.parametrize("model_type", sorted(name for name, f in FAMILIES.items() if f.config_class is DecoderConfig))
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_transformers(model_type, penalty, tmp_path):
    config = transformers.AutoConfig.for_model(model_type, **EXTRA.get(model_type, LLAMA))
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            norm = p.dim() == 1 and name.endswith("weight")
            p.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    numbers = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 61, (n,), generator=numbers).tolist() for n in (1, 9, 4, 17)]
    expected = [
        theirs.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=penalty,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    got: list[list[int]] = [[] for _ in prompts]
    settings = SamplingConfig(temperature=0, max_new_tokens=20, repetition_penalty=penalty)
    for token in generate_tokens(ours, prompts, settings, eos_ids={2}):
        got[token.row].append(token.id)
    assert got == expected
    assert len({tuple(text) for text in got}) == len(prompts)


# ---------------------------------------------------------------- real weights


@needs_data
def test_real_weights_reproduce_the_reference():
    reference = json.loads((DATA / "reference_outputs.json").read_text())["tinystories656k"]
    lm = load(DATA / "tinystories656k", device="cpu")
    config = SamplingConfig(temperature=0, max_new_tokens=len(reference["greedy_ids"]))
    tokens = list(generate_tokens(lm.model, [reference["prompt_ids"]], config, lm.eos_ids))
    ids = reference["prompt_ids"] + [token.id for token in tokens]
    assert ids[: len(reference["greedy_ids"])] == reference["greedy_ids"]
    assert set(ids[len(reference["greedy_ids"]) :]) <= lm.eos_ids
    text = (DATA / "tinystories" / "tinystories_train_head.txt").read_text()[:1500]
    nll = -lm.loglikelihood("", text) / (reference["n_tokens"] - 1)
    assert nll == pytest.approx(reference["mean_nll"], abs=1e-5)


@needs_data
def test_real_weights_stream_what_they_generate():
    lm = load(DATA / "tinystories656k", device="cpu")
    text = lm.generate("Once upon a time", temperature=0, max_new_tokens=40)
    assert text.startswith("Once upon a time, a little girl named Lily")
    assert "".join(lm.stream("Once upon a time", temperature=0, max_new_tokens=40)) == text[len("Once upon a time") :]
    assert lm.loglikelihood("Once upon a", " time") > lm.loglikelihood("Once upon a", " car")
