"""What transformers 4.57 writes opens here, and what is saved here opens there, to the last digit.

It needs that version in a folder of its own, which ZERO2HERO_TRANSFORMERS_4 names:

    pip install --no-deps --target FOLDER transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1 \
        requests urllib3 idna certifi charset-normalizer
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers_4 import CASES, ids

from zero2hero.models import Encoder, EncoderDecoder, from_pretrained, save_pretrained

FOLDER = os.environ.get("ZERO2HERO_TRANSFORMERS_4")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not FOLDER, reason="ZERO2HERO_TRANSFORMERS_4 names no folder with transformers 4.57"),
]


def there(mode: str, folder: Path) -> dict[str, float]:
    script = Path(__file__).with_name("transformers_4.py")
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, mode, folder], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """Their checkpoints, ours beside them, and how far ours are from theirs when opened there."""
    folder = tmp_path_factory.mktemp("version_4")
    there("write", folder)
    for name in CASES:
        save_pretrained(from_pretrained(folder / name / "theirs"), folder / name / "ours")
    return folder, there("check", folder)


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(ids(), ids()[:, :12]) if isinstance(model, EncoderDecoder) else model(ids())
        if isinstance(model, Encoder) and model.config.task == "features":
            return hidden
        logits = model.logits(hidden)
        question = isinstance(model, Encoder) and model.config.task == "question_answering"
        return logits[..., 0] if question else logits


@pytest.mark.parametrize("name", CASES)
def test_what_version_4_wrote_opens_here(checkpoints, name):
    folder = checkpoints[0] / name
    wanted = load_file(folder / "answers.safetensors")["answer"]
    assert wanted.std() > 0.1
    assert (answer(from_pretrained(folder / "theirs")) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_here_opens_in_version_4(checkpoints, name):
    folder, distances = checkpoints
    before, after = (load_file(folder / name / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert distances[name] < 1e-4
