"""Adapters are PEFT's: the same logits in both directions, for every kind of model and of adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zero2hero as z2h
from zero2hero.cli import main
from zero2hero.errors import UserError
from zero2hero.models import from_pretrained
from zero2hero.models.encoder_decoder import EncoderDecoder
from zero2hero.tokenizer import Tokenizer
from zero2hero.tune import (
    LoraConfig,
    adapter_names,
    add_lora,
    disable_adapter,
    load_adapter,
    load_prefix,
    load_prompt,
    merge,
    save_adapter,
    save_virtual_tokens,
)
from zero2hero.tune.adapters import adapter_parameters

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
BERT = LLAMA | {"num_labels": 3}
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
      "decoder_start_token_id": 0}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
MODELS = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig, LLAMA),
    "tied": ("LlamaForCausalLM", transformers.LlamaConfig, LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", transformers.Qwen3Config, LLAMA | {"head_dim": 12}),
    "gemma3": ("Gemma3ForCausalLM", transformers.Gemma3TextConfig, LLAMA | {"head_dim": 12, "sliding_window": 5}),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config, GPT2),
    "bert": ("BertForSequenceClassification", transformers.BertConfig, BERT),
    "roberta": ("RobertaForSequenceClassification", transformers.RobertaConfig, BERT),
    "bert mlm": ("BertForMaskedLM", transformers.BertConfig, BERT),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config, T5),
}
SHAPES = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}}
# model, PEFT's settings
CASES = {
    "lora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora, all linear": ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5}),
    "dora": ("llama", {"target_modules": ["q_proj", "k_proj", "gate_proj"], "use_dora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], **SHAPES}),
    "some layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "regular expression": ("llama", {"target_modules": r".*layers\.0.*proj", "exclude_modules": ["up_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding of a tied pair": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head of a tied pair": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]}),
    "qwen3": ("qwen3", {"target_modules": "all-linear"}),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "bert, dora": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "use_dora": True}),
    "roberta": ("roberta", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert, masked words": ("bert mlm", {"target_modules": ["query", "value"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi"], "task_type": "SEQ_2_SEQ_LM"}),
}
IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The base models, each as transformers writes it."""
    made = {}
    for name, (architecture, config, settings) in MODELS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("base") / name.replace(" ", "_")
        getattr(transformers, architecture)(config(**settings)).save_pretrained(made[name])
    return made


def theirs(folders, name: str):
    return getattr(transformers, MODELS[name][0]).from_pretrained(folders[name]).eval()


def logits(model) -> torch.Tensor:
    """Of theirs or ours."""
    with torch.no_grad():
        if not hasattr(model, "logits"):
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            inputs = {"decoder_input_ids": IDS} if base.config.is_encoder_decoder else {}
            return model(input_ids=IDS, **inputs).logits
        return model.logits(model(IDS, IDS) if isinstance(model, EncoderDecoder) else model(IDS))


def randomize(parameters) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.empty(p.shape).normal_(0, 0.1, generator=generator))


def trained_by_peft(folders, name: str, settings: dict, folder: Path):
    model = peft.get_peft_model(theirs(folders, name), peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    randomize(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_both_directions(folders, tmp_path: Path, case: str):
    """PEFT's adapter here; the same written by us in PEFT; merged; and the base under it untouched."""
    name, settings = CASES[case]
    expected = logits(trained_by_peft(folders, name, settings, tmp_path / "theirs"))
    model = from_pretrained(folders[name])
    base = logits(model)
    load_adapter(model, tmp_path / "theirs")
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    save_adapter(model, tmp_path / "ours", base_model_name_or_path=str(folders[name]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        again = peft.PeftModel.from_pretrained(theirs(folders, name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    third = load_adapter(from_pretrained(folders[name]), tmp_path / "ours")
    torch.testing.assert_close(logits(third), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=1e-4, atol=1e-4)
    assert not adapter_names(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_made_here(folders, tmp_path: Path, name: str, kind: str):
    """GPT-2's separate A for query, key and value become blocks of one larger rank."""
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    model = from_pretrained(folders[name])
    add_lora(model, LoraConfig(r=3, use_dora=kind == "dora", use_rslora=True, task_type=task))
    randomize(p for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path)
    again = peft.PeftModel.from_pretrained(theirs(folders, name), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_the_smallest_and_the_full_configuration(folders, tmp_path: Path, full: bool):
    trained = trained_by_peft(folders, "llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 5}, tmp_path)
    if not full:
        least = {"peft_type": "LORA", "r": 4, "lora_alpha": 5, "target_modules": ["v_proj", "q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(least))
    model = load_adapter(from_pretrained(folders["llama"]), tmp_path)
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())
    again = load_adapter(from_pretrained(folders["llama"]), tmp_path, "mine", is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == adapter_parameters(again, "mine").keys()


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["model.norm"]}
    trained_by_peft(folders, "llama", settings, folder)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lora_B.weight is missing"),
        (lambda t: [t.pop(f"{Q}.lora_{x}.weight") for x in "AB"], "no update for model.layers.0.self_attn.q_proj"),
        (lambda t: t.update({Q.replace("q_proj", "q_porj") + ".lora_A.weight": t.pop(f"{Q}.lora_A.weight")}),
         "Did you mean 'model.layers.0.self_attn.q_proj'"),
        (lambda t: t.update({Q.replace(".0.", ".7.") + ".lora_A.weight": torch.zeros(4, 32)}), "not there"),
        (lambda t: t.update({f"{Q}.lora_A.default.weight": torch.zeros(4, 32)}), "no parameter model.layers.0"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)}), "unexpected"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(5, 32)}), r"shape \[5, 32\] and should have \[4, 32\]"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(48, 4)}), r"shape \[48, 4\] .* made for"),
        (lambda t: t.update({"lora_A": torch.zeros(1)}), "should begin with base_model.model."),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(31)}), "shape"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(61, 32)}),
         "brings along"),
        (lambda t: t.clear(), "no update of any module"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(folders, adapter: Path, tmp_path: Path, damage, message: str):
    """PEFT passes over most of these with a warning."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    model = from_pretrained(folders["llama"])
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "'IA3' is not LORA"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "changed its base"),
        ({"lora_bias": True}, "lora_bias = True may change"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"something_new": "x"}, "something_new"),
        ({"r": "four"}, "whole number"),
        ({"lora_dropout": "much"}, "adapter_config.json"),
        ({"target_modules": 3}, "adapter_config.json"),
        ({"rank_pattern": ["q_proj"]}, "adapter_config.json"),
    ],
)
def test_a_setting_that_changes_the_mathematics_is_refused(folders, adapter: Path, tmp_path, settings, message):
    content = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    save_file(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        load_adapter(from_pretrained(folders["llama"]), tmp_path)


def test_an_adapter_of_another_base_is_refused(folders, adapter: Path, tmp_path: Path):
    for name in ("gpt2", "bert"):
        with pytest.raises(UserError, match=f"does not fit this {name} model"):
            load_adapter(from_pretrained(folders[name]), adapter)
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="is a pickle"):
        load_adapter(from_pretrained(folders["llama"]), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="damaged"):
        load_adapter(from_pretrained(folders["llama"]), tmp_path)


def test_an_adapters_folder_opens_and_merges_by_itself(folders, tmp_path: Path, capsys):
    """z2h.load and `zero2hero merge` find the base by its name, also beside the adapter."""
    base = tmp_path / "base"
    shutil.copytree(folders["llama"], base)
    Tokenizer.train(["a tale of a fox"], vocab_size=61, kind="char").save_pretrained(base)
    expected = logits(trained_by_peft(folders, "llama", {"target_modules": "all-linear"}, tmp_path / "adapter"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}))
    lm = z2h.load(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(lm.model), expected, rtol=1e-5, atol=1e-5)
    assert lm.generate("a", max_new_tokens=3, temperature=0)
    assert main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(
        logits(z2h.load(tmp_path / "merged", device="cpu").model), expected, rtol=1e-4, atol=1e-4
    )
    theirs_merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(theirs_merged), expected, rtol=1e-4, atol=1e-4)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "other")]) == 2
    assert "names no base_model_name_or_path" in capsys.readouterr().err
    options = ["--output_dir", str(tmp_path / "other"), "--base_model", str(base)]
    assert main(["merge", str(tmp_path / "adapter"), *options]) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens(folders, tmp_path: Path, name: str, kind: str):
    settings = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind](**settings)
    load = {"prompt": load_prompt, "prefix": load_prefix}[kind]
    trained = peft.get_peft_model(theirs(folders, name), config).eval()
    randomize(p for p in trained.parameters() if p.requires_grad)
    trained.save_pretrained(tmp_path / "theirs")
    model = load(from_pretrained(folders[name]), tmp_path / "theirs")
    expected = logits(trained)[:, -IDS.shape[1] :]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(from_pretrained(folders[name]))).abs().max() > 0.01
    save_virtual_tokens(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs(folders, name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again)[:, -IDS.shape[1] :], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="peft_type"):
        {"prompt": load_prefix, "prefix": load_prompt}[kind](from_pretrained(folders[name]), tmp_path / "ours")
