"""Invariant 2: logits equal transformers' for every family, from checkpoints that either side wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zero2hero.config import DecoderConfig, MoEConfig
from zero2hero.data.batches import Batch
from zero2hero.errors import UserError
from zero2hero.models import Decoder, from_pretrained, save_pretrained
from zero2hero.models.families import FAMILIES
from zero2hero.models.gemma import Gemma, GemmaConfig
from zero2hero.nn.moe import load_balancing_loss
from zero2hero.train.objectives import causal_lm

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = {"vocab_size": 61, "max_position_embeddings": 64}
LLAMA = COMMON | {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def rope(theta: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def scaled(kind: str, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e3, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = LLAMA | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5, "num_hidden_layers": 3}
GEMMA3 = GEMMA | {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    }
}
QWEN_WINDOW = LLAMA | {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3, "max_window_layers": 1}
QWEN_MOE = LLAMA | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12}

# name -> (model_type, what differs from the common shape)
CASES = {
    "llama": ("llama", LLAMA),
    "llama, as many key heads as heads": ("llama", LLAMA | {"num_key_value_heads": 4}),
    "llama, one key head, tied": ("llama", LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, head_dim of its own": ("llama", LLAMA | {"head_dim": 12}),
    "llama, biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama, other base and eps": ("llama", LLAMA | rope(500_000.0) | {"rms_norm_eps": 1e-3}),
    "mistral, window": ("mistral", LLAMA | {"sliding_window": 5}),
    "mistral, window and head_dim": ("mistral", LLAMA | {"sliding_window": 7, "head_dim": 16}),
    "mistral, no window": ("mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2, tied, other base": ("qwen2", LLAMA | rope(1e6) | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 12}),
    "qwen3, tied, biases": ("qwen3", LLAMA | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "arcee": ("arcee", LLAMA | {"head_dim": 8}),
    "arcee, biases, tied": (
        "arcee", LLAMA | {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, linear": ("llama", LLAMA | scaled("linear", factor=3.0)),
    "llama, dynamic": ("llama", LLAMA | scaled("dynamic", factor=3.0) | {"max_position_embeddings": 20}),
    "llama, llama3": ("llama", LLAMA | scaled("llama3", **LLAMA3) | {"head_dim": 32}),
    "llama, yarn": ("llama", LLAMA | scaled("yarn", **YARN) | {"head_dim": 32}),
    "qwen3, yarn with all its parameters": (
        "qwen3",
        LLAMA | scaled("yarn", **YARN, beta_fast=8.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.1, truncate=False)
        | {"head_dim": 32},
    ),
    "qwen2, yarn, attention factor": ("qwen2", LLAMA | scaled("yarn", **YARN, attention_factor=1.7)),
    "qwen2, window of the last layers": ("qwen2", QWEN_WINDOW),
    "qwen3, window of some layers": (
        "qwen3", QWEN_WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma": ("gemma", LLAMA | {"head_dim": 12}),
    "gemma, untied, one key head": ("gemma", LLAMA | {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}),
    "gemma2, no caps": ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3, as published, seven layers": ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "sliding_window": 4}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4}),
    "mixtral, window, three each": (
        "mixtral", LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5},
    ),
    "qwen3_moe": ("qwen3_moe", QWEN_MOE),
    "qwen3_moe, normalized, some layers dense": (
        "qwen3_moe", QWEN_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3],
                                 "norm_topk_prob": True},
    ),
    "qwen3_moe, window": ("qwen3_moe", QWEN_MOE | {"use_sliding_window": True, "sliding_window": 5}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, inner width, untied": ("gpt2", GPT2 | {"n_inner": 40, "tie_word_embeddings": False}),
    "gpt2, gelu, eps": ("gpt2", GPT2 | {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    "gpt2, relu": ("gpt2", GPT2 | {"activation_function": "relu"}),
    "gpt2, silu": ("gpt2", GPT2 | {"activation_function": "silu"}),
    "gpt2, relu2": ("gpt2", GPT2 | {"activation_function": "relu2"}),
}  # fmt: skip


def reference(model_type: str, settings: dict):
    """A model of transformers, every weight of it random: biases and norms too."""
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model


def ids(vocab_size: int = 61, length: int = 24) -> torch.Tensor:
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(1))


def same_logits(ours: Decoder, theirs) -> None:
    x = ids(ours.config.vocab_size)
    with torch.no_grad():
        got, want = ours.logits(ours(x)), theirs(x).logits
    assert want.std() > 0.1, "a test of logits that hardly differ proves nothing"
    assert (got - want).abs().max() < 1e-4


def reread(directory: Path, **options):
    """Loaded by transformers, which must find every tensor and no other."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", **options
    )
    assert not any(report.values()), report
    return model.eval()


def test_every_family_has_cases():
    decoders = {name for name, family in FAMILIES.items() if issubclass(family.config_class, DecoderConfig)}
    assert {model_type for model_type, _ in CASES.values()} == decoders


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(their model, our model, folder with their file, folder with ours)."""
    folder = tmp_path_factory.mktemp("family")
    theirs = reference(*CASES[request.param])
    theirs.save_pretrained(folder / "theirs")
    ours = from_pretrained(folder / "theirs")
    save_pretrained(ours, folder / "ours")
    return theirs, ours, folder / "theirs", folder / "ours"


def test_logits_in_both_directions(case):
    theirs, ours, _, our_folder = case
    same_logits(ours, theirs)
    again = reread(our_folder)
    assert type(again) is type(theirs)
    same_logits(ours, again)


def test_tensors_are_byte_equal(case):
    before, after = (load_file(folder / "model.safetensors") for folder in case[2:])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key]), key


def test_config_keeps_what_it_said(case):
    _, ours, *folders = case
    before, after = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in folders)
    for config in (before, after):
        # null and its meaning are two spellings of one thing; a step and a list name the same layers
        for key in ("_name_or_path", "head_dim", "n_inner", "decoder_sparse_step", "mlp_only_layers"):
            config.pop(key, None)
    assert before == after
    again = from_pretrained(folders[1]).config
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(ours.config, extra={})


def test_config_is_spelt_for_versions_4_and_5(case, tmp_path):
    theirs, _, _, our_folder = case
    written = json.loads((our_folder / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "float32"
    if theirs.config.model_type != "gpt2":
        rope = theirs.config.rope_parameters
        new = written["rope_parameters"]
        if theirs.config.model_type == "gemma3_text":
            assert written["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
            rope, new = rope["full_attention"], new["full_attention"]
        assert written["rope_theta"] == new["rope_theta"] == rope["rope_theta"]
    version_4 = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    (tmp_path / "config.json").write_text(json.dumps(version_4))
    (tmp_path / "model.safetensors").symlink_to(our_folder / "model.safetensors")
    same_logits(from_pretrained(tmp_path), theirs)


SHAPE = DecoderConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
FRESH = {
    "llama": SHAPE,
    "llama untied gqa": dataclasses.replace(
        SHAPE, num_key_value_heads=2, tie_word_embeddings=False, rope_theta=1e5, mlp_bias=True, attention_bias=True,
        output_bias=True, bos_token_id=1,
    ),
    "mistral": dataclasses.replace(SHAPE, sliding_window=4),
    "qwen2": dataclasses.replace(SHAPE, attention_bias=True),
    "qwen3": dataclasses.replace(SHAPE, qk_norm=True, head_dim=10),
    "arcee": dataclasses.replace(SHAPE, feedforward="relu2"),
    "qwen3 window": dataclasses.replace(SHAPE, qk_norm=True, sliding_window=4),
    "mixtral": dataclasses.replace(SHAPE, moe=MoEConfig(3, 2)),
    "qwen3_moe": dataclasses.replace(SHAPE, qk_norm=True, moe=MoEConfig(3, 2, 20, False, dense_layers=[1])),
    "llama llama3": dataclasses.replace(SHAPE, head_dim=32, rope_scaling={"rope_type": "llama3", **LLAMA3}),
    "gemma": GemmaConfig(**{**vars(SHAPE), "norm": "rmsnorm_offset", "feedforward": "geglu"}),
    "gpt2": dataclasses.replace(
        SHAPE, position="learned", norm="layernorm", feedforward="gelu_new", attention_bias=True, output_bias=True,
        mlp_bias=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FRESH)
def test_a_model_made_here_opens_there(name, tmp_path):
    config = FRESH[name]
    ours = (Gemma if isinstance(config, GemmaConfig) else Decoder)(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    save_pretrained(ours, tmp_path)
    theirs = reread(tmp_path)
    assert theirs.config.model_type == name.split()[0]
    same_logits(ours, theirs)


@pytest.mark.parametrize("case", ["llama", "gemma", "gemma2", "gemma3"])
def test_the_loss_and_its_gradients_are_theirs(case, tmp_path):
    """Gemma 2 among them, whose logits are soft-capped."""
    theirs = reference(*CASES[case])
    theirs.save_pretrained(tmp_path)
    ours, x = from_pretrained(tmp_path), ids()
    targets = torch.cat([x[:, 1:], torch.full((len(x), 1), -100)], 1)
    loss = causal_lm(ours, Batch(x, targets, torch.arange(x.shape[1]).expand_as(x), None))
    mean, want = loss.sum / loss.weight, theirs(input_ids=x, labels=x).loss
    torch.testing.assert_close(mean, want)
    mean.backward()
    want.backward()
    for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"):
        torch.testing.assert_close(
            ours.get_parameter(name).grad, theirs.model.get_parameter(name).grad, rtol=1e-3, atol=1e-5
        )


def test_the_balancing_loss_is_theirs():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = [torch.randn(11, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for top_k in (1, 2, 5):
        expected = load_balancing_loss_func(tuple(logits), 5, top_k)
        torch.testing.assert_close(load_balancing_loss(logits, top_k), torch.as_tensor(expected))


def test_dynamic_scaling_with_a_cache(tmp_path):
    """Within the trained length nothing is scaled; a text that grows past it in a cache is refused, not garbled."""
    reference("llama", LLAMA | scaled("dynamic", factor=3.0) | {"max_position_embeddings": 20}).save_pretrained(
        tmp_path
    )
    model, x = from_pretrained(tmp_path), ids()
    with torch.no_grad():
        whole, longer = model(x[:, :20]), model(x)
        assert not torch.allclose(longer[:, :20], whole, atol=1e-3)
        assert torch.equal(model(x[:, :20]), whole)  # the short text's frequencies are back
        cache = model.make_cache(3, 24)
        parts = [model(part, cache=cache) for part in x[:, :20].split(7, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
        with pytest.raises(UserError, match="longer than 20 tokens is read as a whole"):
            model(x[:, 20:], cache=cache)


def test_null_and_absent_in_config(tmp_path):
    """An absent window of a Mistral is 4,096 tokens and null is none; null heads are derived."""
    theirs = reference("mistral", LLAMA | {"sliding_window": None, "num_key_value_heads": 4})
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text()) | {"head_dim": None, "num_key_value_heads": None}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert from_pretrained(tmp_path).config.sliding_window is None
    same_logits(from_pretrained(tmp_path), theirs)
    del written["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(written | {"num_key_value_heads": 4}))
    expected = transformers.AutoConfig.from_pretrained(tmp_path).sliding_window
    assert from_pretrained(tmp_path).config.sliding_window == expected == 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(dtype, tmp_path):
    """Bytes go through unchanged; `dtype` converts; the head is still tied."""
    theirs = reference("llama", LLAMA | {"tie_word_embeddings": True}).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    save_pretrained(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    widened = from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert widened.lm_head.weight is widened.embed_tokens.weight
    same_logits(widened, reread(tmp_path / "theirs", dtype=torch.float32))


def test_gpt2_as_on_the_hub(tmp_path):
    """The first GPT-2 files have no `transformer.` prefix, and masks stored as tensors."""
    theirs = reference("gpt2", GPT2)
    theirs.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same_logits(from_pretrained(tmp_path), theirs)


def test_weights_in_memory_are_not_the_file(tmp_path):
    """Tensors come memory-mapped; training in place must not write through to the checkpoint."""
    reference("llama", LLAMA).save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").read_bytes()
    model = from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == stored
    save_pretrained(model, tmp_path)  # over the very file that is mapped
    assert all(not p.any() for p in from_pretrained(tmp_path).parameters())
