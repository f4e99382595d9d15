"""The decoder families against transformers 4, in a Python of its own: `ZERO2HERO_TRANSFORMERS4=v4/bin/python pytest`.

python -m venv v4 && v4/bin/pip install transformers==4.57.6 torch
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zero2hero.models import from_pretrained, save_pretrained

PYTHON = os.environ.get("ZERO2HERO_TRANSFORMERS4")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not PYTHON, reason="ZERO2HERO_TRANSFORMERS4 names no Python that has transformers 4"),
]

SHAPE = {
    "vocab_size": 61, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = SHAPE | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
CASES = {
    "llama": ("llama", SHAPE | {"rope_theta": 5e4, "tie_word_embeddings": True}),
    "llama, linear": ("llama", SHAPE | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama, llama3": ("llama", SHAPE | {"head_dim": 32, "rope_theta": 5e3, "rope_scaling": LLAMA3}),
    "llama, yarn": ("llama", SHAPE | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "mistral": ("mistral", SHAPE | {"sliding_window": 5}),
    "qwen2, window": (
        "qwen2", SHAPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SHAPE | {"head_dim": 12}),
    "mixtral": ("mixtral", SHAPE | {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe", SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12},
    ),
    "gemma": ("gemma", SHAPE | {"head_dim": 12}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA | {"rope_theta": 5e3, "rope_local_base_freq": 100.0}),
    "gpt2": ("gpt2", {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "arcee": ("arcee", SHAPE | {"head_dim": 8}),
}  # fmt: skip

PROGRAM = """
import json, sys, torch, transformers
from pathlib import Path
assert transformers.__version__.startswith("4."), transformers.__version__
verb, folder = sys.argv[1], Path(sys.argv[2])
cases, ids = json.loads(sys.stdin.read()), torch.arange(48).view(2, 24) * 7 % 61
for i, (model_type, settings) in enumerate(cases):
    if verb == "write":
        config = transformers.AutoConfig.for_model(model_type, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(7)
        for p in model.parameters():
            p.data.normal_(1.0 if p.dim() == 1 else 0.0, 0.3, generator=generator)
        model.save_pretrained(folder / str(i) / "theirs")
    else:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder / str(i) / "ours", output_loading_info=True, attn_implementation="eager"
        )
        assert not any(report.values()), report
        assert model.config.model_type == model_type
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, folder / str(i) / f"{verb}.pt")
"""


def run(verb: str, folder: Path) -> None:
    done = subprocess.run(
        [str(PYTHON), "-c", PROGRAM, verb, str(folder)],
        input=json.dumps(list(CASES.values())), capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All cases written there, loaded and saved here, and read there again: two processes in all."""
    folder = tmp_path_factory.mktemp("version4")
    run("write", folder)
    for i in range(len(CASES)):
        save_pretrained(from_pretrained(folder / str(i) / "theirs"), folder / str(i) / "ours")
    run("read", folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tensors_in_both_directions(folder, name):
    case = folder / str(list(CASES).index(name))
    ids = torch.arange(48).view(2, 24) * 7 % 61
    before, after = (load_file(case / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    model = from_pretrained(case / "theirs")
    with torch.no_grad():
        ours = model.logits(model(ids))
    for verb in ("write", "read"):
        theirs = torch.load(case / f"{verb}.pt", weights_only=True)
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-4, verb
