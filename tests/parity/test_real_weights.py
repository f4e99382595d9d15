"""Weights that others trained: the likelihoods, texts and activations that were recorded for them come out again."""

from __future__ import annotations

import base64
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zero2hero.cli import main
from zero2hero.errors import UserError
from zero2hero.models import Decoder, Encoder, EncoderConfig, from_pretrained
from zero2hero.models.llama2c import read_llama2c
from zero2hero.tune import load_adapter, merge

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def expected(shared_data: Path) -> dict:
    return json.loads((shared_data / "reference_outputs.json").read_text())


def story(shared_data: Path) -> str:
    return (shared_data / "tinystories" / "tinystories_train_head.txt").read_text()[:1500]


def mean_nll(model, ids: list[int]) -> float:
    x = torch.tensor([ids])
    with torch.no_grad():
        logits = model.logits(model(x))[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, x[0, 1:]))


def greedy(model, ids: list[int], length: int) -> list[int]:
    cache, ids = model.make_cache(1, length), list(ids)
    with torch.no_grad():
        new = torch.tensor([ids])
        while len(ids) < length:
            ids.append(int(model.logits(model(new, cache=cache)[0, -1]).argmax()))
            new = torch.tensor([ids[-1:]])
    return ids


def test_tinystories656k(shared_data, expected):
    from zero2hero.tokenizer import Tokenizer

    record, folder = expected["tinystories656k"], shared_data / "tinystories656k"
    model, tokenizer = from_pretrained(folder), Tokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(story(shared_data), add_special_tokens=False)]
    assert len(ids) == record["n_tokens"]
    nll = mean_nll(model, ids)
    assert nll == pytest.approx(record["mean_nll"], abs=1e-5)
    assert math.exp(nll) == pytest.approx(record["ppl"], rel=1e-5)
    assert sum(p.numel() for p in model.parameters()) == record["n_params"]
    prompt = record["prompt_ids"]
    with torch.no_grad():
        last = model.logits(model(torch.tensor([prompt])))[0, -1]
    assert last[:8].tolist() == pytest.approx(record["logits_last_first8"], abs=1e-4)
    assert greedy(model, prompt, len(record["greedy_ids"])) == record["greedy_ids"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    x = torch.tensor([ids])
    with torch.no_grad():
        assert (model.logits(model(x)) - theirs(x).logits).abs().max() < 1e-4


@pytest.fixture(params=["stories260K.bin", "stories260K_v1.bin"])
def stories260k(request, shared_data) -> Decoder:
    return read_llama2c(shared_data / "stories260K" / request.param)


def test_stories260k(stories260k, shared_data, expected):
    record = expected["stories260K"]
    with torch.no_grad():
        first = stories260k.logits(stories260k(torch.tensor([[1]])))[0, 0]
    assert first[:8].tolist() == pytest.approx(record["logits_bos_first8"], abs=1e-4)
    ids = record["greedy_ids"]
    assert greedy(stories260k, ids[:1], len(ids)) == ids
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = sentencepiece.SentencePieceProcessor(str(shared_data / "stories260K" / "tok512.model"))
    text = [1, *tokenizer.encode(story(shared_data))][:512]  # the context
    assert len(text) == record["n_tokens"]
    assert mean_nll(stories260k, text) == pytest.approx(record["mean_nll"], abs=1e-5)


def test_both_formats_hold_the_same_and_convert(shared_data, tmp_path, capsys):
    models = []
    for name in ("stories260K.bin", "stories260K_v1.bin"):
        assert main(["convert", str(shared_data / "stories260K" / name), str(tmp_path / name)]) == 0
        models.append(from_pretrained(tmp_path / name))
    assert models[0].config.model_type == "llama"
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(a, b), name


def test_broken_llama2c_files(shared_data, tmp_path):
    for name in ("stories260K.bin", "stories260K_v1.bin"):
        content = (shared_data / "stories260K" / name).read_bytes()
        broken = {
            "too short": content[:100],
            r"has \d+ bytes; a llama2.c model with its header would have \d+": content[:-4],
            "does not begin like": b"\xff" * 300,
            "version 2": b"24ka\x02\0\0\0" + content[8:],
        }
        for message, damaged in broken.items():
            (tmp_path / "broken.bin").write_bytes(damaged)
            with pytest.raises(UserError, match=message):
                read_llama2c(tmp_path / "broken.bin")
    with pytest.raises(UserError, match="cannot read"):
        read_llama2c(tmp_path / "nowhere.bin")


# --- nanogpt_sort: minGPT's layout is GPT-2's with nn.Linear weights, [out, in], and a head of its own ----------------


def array(entry: dict) -> torch.Tensor:
    numbers = np.frombuffer(base64.b64decode(entry["data"]), "<f4").copy()
    return torch.from_numpy(numbers).view(entry["shape"])


@pytest.fixture
def sorter(shared_data, tmp_path) -> Decoder:
    stored = json.loads((shared_data / "nanogpt_sort" / "gpt-nano-sort-model.json").read_text())
    c = stored.pop("config")
    tensors = {name: array(entry) for name, entry in stored.items()}
    for name, tensor in tensors.items():
        if ".attn.c_" in name or ".mlp.c_" in name:
            tensors[name] = tensor.t().contiguous() if tensor.dim() == 2 else tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt2", "n_layer": c["n_layer"], "n_head": c["n_head"], "n_embd": c["n_embd"],
        "vocab_size": c["vocab_size"], "n_positions": c["block_size"], "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return from_pretrained(tmp_path)


def test_every_activation_of_the_sorter(sorter, shared_data, expected):
    record = json.loads((shared_data / "nanogpt_sort" / "gpt-nano-sort-t0-partials.json").read_text())
    ids = torch.tensor(expected["nanogpt_sort"]["idx"])
    want = {name: array(entry) for name, entry in record.items() if name not in ("config", "idx")}
    assert torch.equal(array(record["idx"]).long(), ids)
    got: dict[str, torch.Tensor] = {}
    block = sorter.layers[0]
    outputs = {
        "ln1": block.input_layernorm, "q": block.self_attn.q_proj, "k": block.self_attn.k_proj,
        "v": block.self_attn.v_proj, "yProj": block.self_attn.o_proj, "ln2": block.post_attention_layernorm,
        "fc": block.mlp.up_proj, "mlp": block.mlp.down_proj, "mlpResid": block, "ln_f": sorter.norm,
        **{f"block{i}": layer for i, layer in enumerate(sorter.layers)},
    }  # fmt: skip
    inputs = {
        "x": block.input_layernorm, "y": block.self_attn.o_proj, "attnResid": block.post_attention_layernorm,
        "gelu": block.mlp.down_proj,
    }  # fmt: skip
    for name, module in outputs.items():
        module.register_forward_hook(lambda m, i, o, name=name: got.update({name: o}))
    for name, module in inputs.items():
        module.register_forward_pre_hook(lambda m, i, name=name: got.update({name: i[0]}))
    with torch.no_grad():
        got["lm_head"] = sorter.logits(sorter(ids))
        got["probs"] = got["lm_head"].softmax(-1)
        got["tok_emb"], got["pos_emb"] = sorter.embed_tokens(ids), sorter.embed_positions.weight[None]
        got["qkv"] = torch.cat([got[name] for name in "qkv"], -1)
        for name in "qkv":
            got[name] = got[name].unflatten(-1, (3, 16)).transpose(1, 2)
        past = torch.ones(11, 11, dtype=torch.bool).tril()
        got["att"] = (got["q"] @ got["k"].transpose(2, 3) / 4).masked_fill(~past, -torch.inf)
        got["attSm"] = got["att"].softmax(-1)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_sorter_sorts(sorter):
    problems = torch.tensor(list(itertools.product(range(3), repeat=6)))
    ids = problems
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, sorter.logits(sorter(ids[:, :11])[:, -1]).argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids[:, 6:], problems.sort(-1).values)


# --- roberta_lora_mnli: an adapter that microsoft/LoRA published, whose names need an ending to be PEFT's ------------


def test_an_adapter_of_roberta_base(shared_data, tmp_path):
    """Every tensor finds its place in an encoder of RoBERTa base's width and depth, and is what `merge` adds."""
    stored = load_file(shared_data / "roberta_lora_mnli" / "roberta_base_lora_mnli.safetensors")
    assert len(stored) == 12 * 2 * 2 + 4  # A and B of queries and values, and the classifier's two layers
    tensors = {
        f"base_model.model.{n}.weight" if ".lora_" in n else f"base_model.model.{n}": t for n, t in stored.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["query", "value"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    # what the adapter does not touch is small
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 8}
    roberta = {"vocab_size": 50, "max_position_embeddings": 514, "position_offset": 2, "pad_token_id": 1}
    model = Encoder(
        EncoderConfig(
            **shape,
            **roberta,
            task="sequence_classification",
            id2label=dict(enumerate("abc")),
            model_type="roberta",
        )  # fmt: skip
    ).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merge(load_adapter(model, tmp_path))
    for i, layer in enumerate(model.layers):
        for theirs, ours in (("query", "q_proj"), ("value", "v_proj")):
            a, b = (stored[f"roberta.encoder.layer.{i}.attention.self.{theirs}.lora_{kind}"] for kind in "AB")
            name = f"self_attn.{ours}"
            added = layer.get_submodule(name).weight - before[f"layers.{i}.{name}.weight"]
            assert added.std() > 1e-3
            torch.testing.assert_close(added, 2 * b @ a, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.self_attn.k_proj.weight, before[f"layers.{i}.self_attn.k_proj.weight"])
    for name in ("dense", "out_proj"):
        for kind in ("weight", "bias"):
            assert torch.equal(getattr(model.head.get_submodule(name), kind), stored[f"classifier.{name}.{kind}"])
    tensors.pop("base_model.model.roberta.encoder.layer.3.attention.self.value.lora_B.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer\.3\.attention\.self\.value\.lora_B.* is missing"):
        load_adapter(model, tmp_path)
