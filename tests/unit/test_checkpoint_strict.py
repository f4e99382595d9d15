"""Invariant 8: loading is strict and says what does not fit; a failed save leaves the old files as they were."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zero2hero.cli import main
from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder, from_pretrained, init_weights, save_pretrained
from zero2hero.models.families import family_to_write

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = DecoderConfig(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False
)
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def made(config: DecoderConfig = SHAPE, seed: int = 0) -> Decoder:
    model = Decoder(config)
    init_weights(model, seed)
    return model


@pytest.fixture
def saved(tmp_path) -> Path:
    save_pretrained(made(), tmp_path / "model")
    return tmp_path / "model"


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refused(folder, *words: str) -> str:
    """The message of the error that loading raises; each of `words` is in it."""
    with pytest.raises(UserError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message.strip()
    return message


# --- tensors ------------------------------------------------------------------------------------------------

QUERY = "model.layers.1.self_attn.q_proj.weight"


def test_missing(saved):
    edit_tensors(saved, lambda t: t.pop(QUERY))
    refused(saved, "1 tensor missing", QUERY)


def test_many_missing_are_counted(saved):
    edit_tensors(saved, lambda t: [t.pop(k) for k in list(t) if "mlp" in k])
    refused(saved, "6 tensors missing", "model.layers.0.mlp.gate_proj.weight")


def test_unexpected(saved):
    edit_tensors(saved, lambda t: t.update({QUERY.replace("weight", "bias"): torch.zeros(16)}))
    refused(saved, QUERY.replace("weight", "bias"), f"Did you mean '{QUERY}'")


def test_a_layer_too_many(saved):
    edit_config(saved, num_hidden_layers=1)
    refused(saved, "9 tensors", "model.layers.1.", "no place in llama")


def test_renamed_names_the_nearest(saved):
    wrong = "model.layers.1.self_attn.query_proj.weight"
    edit_tensors(saved, lambda t: t.update({wrong: t.pop(QUERY)}))
    refused(saved, QUERY, f"Did you mean '{wrong}'")


@pytest.mark.parametrize("shape", [(16, 15), (17, 16), (16,), (256,), (16, 16, 1)])
def test_misshapen(saved, shape):
    edit_tensors(saved, lambda t: t.update({QUERY: torch.zeros(shape)}))
    refused(saved, QUERY, str(list(shape)), "[16, 16]")


def test_gpt2_shapes_are_reported_as_the_file_has_them(tmp_path):
    shape = dataclasses.replace(
        SHAPE, position="learned", norm="layernorm", feedforward="gelu_new",
        attention_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip
    save_pretrained(made(shape), tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    edit_tensors(tmp_path, lambda t: t.update({name: torch.zeros(48, 16)}))  # the transpose of what it should be
    refused(tmp_path, name, "[48, 16]", "[16, 48]")


def test_quantized_numbers_are_refused(saved):
    edit_tensors(saved, lambda t: t.update({QUERY: torch.zeros(16, 16, dtype=torch.int8)}))
    refused(saved, QUERY, "torch.int8")


def test_old_buffers_are_passed_over(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(saved, lambda t: t.update({name: torch.zeros(4)}))
    from_pretrained(saved)


def test_a_tied_head_may_be_stored_twice_but_must_be_the_same(tmp_path):
    save_pretrained(made(dataclasses.replace(SHAPE, tie_word_embeddings=True)), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = from_pretrained(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1e-3))
    refused(tmp_path, "tie_word_embeddings", "lm_head.weight")


def test_a_tied_matrix_stored_under_the_heads_name_only(tmp_path):
    model = made(dataclasses.replace(SHAPE, tie_word_embeddings=True))
    save_pretrained(model, tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(from_pretrained(tmp_path).embed_tokens.weight, model.embed_tokens.weight)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights(saved, keep):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:keep])
    refused(saved, WEIGHTS, "damaged")


def test_weights_that_are_something_else(saved):
    (saved / WEIGHTS).write_bytes(b"\xff" * 200)
    refused(saved, WEIGHTS, "damaged")


def test_no_weights(saved):
    (saved / WEIGHTS).unlink()
    refused(saved, f"has no {WEIGHTS}")


def test_pickle_only_is_refused_and_not_opened(saved):
    (saved / WEIGHTS).rename(saved / "pytorch_model.bin")
    refused(saved, "pytorch_model.bin", "pickle")


def shard(folder: Path) -> dict:
    tensors = load_file(folder / WEIGHTS)
    halves: dict[str, dict] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    weight_map = {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        weight_map[name] = list(halves)[i % 2]
        halves[weight_map[name]][name] = tensor
    for file, part in halves.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards(saved):
    whole = from_pretrained(saved).state_dict()
    shard(saved)
    parts = from_pretrained(saved).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_shard_that_is_not_there(saved):
    shard(saved)
    (saved / "model-00002-of-00002.safetensors").unlink()
    refused(saved, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_may_not_point_elsewhere(saved, name):
    index = shard(saved)
    index["weight_map"][QUERY] = name
    (saved / INDEX).write_text(json.dumps(index))
    refused(saved, INDEX if name != ".." else "..")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}'])
def test_broken_index(saved, content):
    (saved / INDEX).write_text(content)
    refused(saved, INDEX)


# --- config.json --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "llama"', "[1]", "null", b"\xff\xfe"])
def test_broken_config(saved, content):
    (saved / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(saved, CONFIG)


def test_no_config(saved):
    (saved / CONFIG).unlink()
    refused(saved, "has no config.json")


@pytest.mark.parametrize(("name", "hint"), [("lama", "'llama'"), ("qwen4", "'qwen"), ("gpt-2", "'gpt2'"), (None, "")])
def test_unknown_family(saved, name, hint):
    edit_config(saved, model_type=name)
    refused(saved, repr(name), "mistral", hint)


def test_unknown_architecture(saved):
    edit_config(saved, architectures=["LlamaForCasualLM"])
    refused(saved, "'LlamaForCasualLM'", "Did you mean 'LlamaForCausalLM'")
    edit_config(saved, architectures=None)
    from_pretrained(saved)


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"rope_scaling": {"type": "linear"}}, ["'linear'", "needs factor"]),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["'llama3'", "low_freq_factor"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, ["factor", "'2'"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -2}}, ["factor", "-2"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 1}}, ["beta_fast"]),
        ("llama", {"rope_parameters": {"rope_type": "yrn", "rope_theta": 1e4}}, ["'yrn'", "Did you mean 'yarn'"]),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["'longrope'"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ("llama", {"pretraining_tp": 2}, ["pretraining_tp"]),
        ("arcee", {"hidden_act": "silu"}, ["hidden_act", "'relu2'"]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            ["layer_types"],
        ),
        ("gemma", {"hidden_act": "relu"}, ["hidden_act", "gelu_pytorch_tanh"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gpt2", {"activation_function": "tanh"}, ["activation_function", "'tanh'"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
    ],
)
def test_mathematics_that_is_not_supported(saved, model_type, changes, words):
    edit_config(
        saved,
        model_type=model_type,
        architectures=None,
        **({"rope_parameters": ...} if model_type == "llama" else {}) | changes,
    )
    refused(saved, *words)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "16"},
        {"hidden_size": 16.5},
        {"hidden_size": 0},
        {"hidden_size": ...},
        {"vocab_size": None},
        {"vocab_size": -31},
        {"num_attention_heads": 3},
        {"num_attention_heads": 5, "head_dim": None},
        {"num_key_value_heads": -1},
        {"num_hidden_layers": [2]},
        {"intermediate_size": "wide"},
        {"rope_parameters": "none"},
        {"rope_parameters": {"rope_theta": "big"}},
        {"rope_scaling": [1]},
    ],
)
def test_nonsense_in_config_is_a_clear_error(saved, changes):
    edit_config(saved, **changes)
    refused(saved)


# --- where it is --------------------------------------------------------------------------------------------


def test_no_such_directory(saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(saved.parent / "modell", "there is no folder", "Did you mean 'model'")
    refused(saved / CONFIG, "is a file")
    monkeypatch.chdir(saved.parent.parent)
    refused(f"{saved.parent.name}/modle", "Did you mean 'model'")  # could be a hub id as well
    refused("surely/no such id", "neither a folder here")
    refused("surely/nothing", "no folder", "the hub cannot be reached")


def test_a_hub_id_comes_from_the_cache_when_the_hub_is_away(saved, tmp_path, monkeypatch):
    import huggingface_hub

    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert from_pretrained("someone/model").config.hidden_size == SHAPE.hidden_size

    def broken(*arguments, **options):
        raise RuntimeError("a proxy's refusal")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    assert from_pretrained("someone/model").config.hidden_size == SHAPE.hidden_size
    refused("someone/other", "no folder", "the hub cannot be reached")


# --- saving -------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_save_and_load_is_the_identity(tmp_path):
    model = made()
    save_pretrained(model, tmp_path / "deep" / "down")
    again = from_pretrained(tmp_path / "deep" / "down")
    assert {p.name for p in (tmp_path / "deep" / "down").iterdir()} == {WEIGHTS, CONFIG}
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_large_model_is_written_in_parts(tmp_path):
    model = made()
    save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, max_shard_size=8000)
    names = {p.name for p in tmp_path.iterdir()}
    shards = names - {CONFIG, INDEX}
    assert INDEX in names
    assert WEIGHTS not in names
    assert 2 < len(shards) < 8
    assert all(os.path.getsize(tmp_path / name) < 8000 + 2000 for name in shards)
    again = from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    save_pretrained(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


# --- old weights --------------------------------------------------------------------------------------------


def old_model(folder: Path, parts: int = 1) -> Decoder:
    """A folder as it was written before safetensors."""
    model = made()
    save_pretrained(model, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    (folder / "tokenizer.json").write_text("{}")
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return model
    weight_map = {key: f"pytorch_model-{i % parts + 1:05}-of-{parts:05}.bin" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        torch.save({key: t for key, t in tensors.items() if weight_map[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


@pytest.mark.parametrize("parts", [1, 3])
def test_convert(tmp_path, parts, capsys):
    model = old_model(tmp_path / "old", parts)
    refused(tmp_path / "old", "old pickle format", "zero2hero convert")
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    again = from_pretrained(tmp_path / "new")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert {p.name for p in (tmp_path / "new").iterdir()} == {CONFIG, WEIGHTS, "tokenizer.json"}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_convert_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old_model(tmp_path / "old")
    for content in ({"model.norm.weight": Evil()}, Evil(), [torch.zeros(1)], {"model.norm.weight": 3}):
        torch.save(content, tmp_path / "old" / "pytorch_model.bin")
        assert main(["convert", "old", "new"]) == 2
        assert "pytorch_model.bin" in capsys.readouterr().err
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"nonsense")
    assert main(["convert", "old", "new"]) == 2
    assert "damaged or holds more than tensors" in capsys.readouterr().err
    assert main(["convert", "nowhere", "new"]) == 2
    assert not (tmp_path / "evil-was-here").exists()
    assert not list((tmp_path / "new").iterdir()) if (tmp_path / "new").exists() else True


def test_convert_is_strict(tmp_path, capsys):
    old_model(tmp_path / "old")
    tensors = torch.load(tmp_path / "old" / "pytorch_model.bin", weights_only=True)
    tensors.pop(QUERY)
    torch.save(tensors, tmp_path / "old" / "pytorch_model.bin")
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 2
    assert QUERY in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_model(saved):
    """A limit on the size of files stands for the full disk: the write fails half-way, in the system itself."""
    before = contents(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot save .*model\.safetensors.*What was there before is untouched"):
            save_pretrained(made(seed=1), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(saved) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("function", ["fsync_path", "save_file"])
def test_an_error_of_the_disk_leaves_the_old_model(saved, monkeypatch, function, code):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    before = contents(saved)
    monkeypatch.setattr(f"zero2hero.models.checkpoint.{function}", fail)
    with pytest.raises(UserError, match=os.strerror(code)):
        save_pretrained(made(seed=1), saved)
    assert contents(saved) == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot save"):
        save_pretrained(made(), tmp_path / "file" / "model")
    with pytest.raises(UserError, match="cannot save"):  # refuses even root
        save_pretrained(made(), "/proc/zero2hero-test")


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "none"},
        {"position": "sinusoidal", "norm": "layernorm"},
        {"feedforward": "gelu"},
        {"qk_norm": True, "mlp_bias": True},
        {"norm": "layernorm"},
        {"attention_bias": True, "mlp_bias": True},
        {"output_bias": True},
        {"qk_norm": True, "feedforward": "relu2"},
        {"position": "learned", "norm": "layernorm", "feedforward": "gelu_new"},
    ],
)
def test_a_shape_that_nobody_could_open_is_refused(tmp_path, changes):
    config = dataclasses.replace(SHAPE, **changes)
    with pytest.raises(UserError, match="no published architecture") as caught:
        save_pretrained(made(config), tmp_path)
    for name in ("position", "norm", "feedforward", "qk_norm", "sliding_window"):
        assert f"{name} {getattr(config, name)}" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_the_format_has_no_name_for_is_not_dropped(tmp_path):
    model = made()
    model.layers[0].self_attn.q_proj.lora_A = torch.nn.Parameter(torch.zeros(2, 16))
    with pytest.raises(UserError, match=r"llama files have no place for layers.0.self_attn.q_proj.lora_A"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_family_that_it_came_from_is_kept():
    qwen2 = dataclasses.replace(SHAPE, attention_bias=True).derived()
    assert family_to_write(qwen2).model_type == "qwen2"
    assert family_to_write(SHAPE.derived()).model_type == "llama"
    mistral = dataclasses.replace(SHAPE, model_type="mistral").derived()
    assert family_to_write(mistral).model_type == "mistral"
    grown = dataclasses.replace(SHAPE, model_type="llama", qk_norm=True).derived()  # no longer a Llama
    assert family_to_write(grown).model_type == "qwen3"
