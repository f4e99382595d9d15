"""What transformers 4.57 writes opens here, and what is saved here opens there, to the last digit.

That version lies in a folder of its own, beside the version 5 of the other tests; torch is the same. The first run puts
it into the cache with pip; where that does not work within its time, these tests skip and say why.
ZERO2HERO_TRANSFORMERS_4 names another folder that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers_4 import CASES, ids

from zero2hero.models import Encoder, EncoderDecoder, from_pretrained, save_pretrained

WANTED = ["transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1"]
FOLDER = Path("~/.cache/zero2hero/transformers-4.57").expanduser()
SECONDS = 60

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def version_4() -> Path:
    """The folder with transformers 4.57: whole, or not there at all."""
    if given := os.environ.get("ZERO2HERO_TRANSFORMERS_4"):
        return Path(given)
    if not FOLDER.exists():
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as staged:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "0"]
            command = [*pip, "--no-deps", "--only-binary", ":all:", "--target", f"{staged}/made", *WANTED]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                pytest.skip(f"transformers 4.57 could not be installed within {SECONDS} s")
            except subprocess.CalledProcessError as error:
                lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
                pytest.skip(f"transformers 4.57 cannot be installed: {lines[-1]}")
            with suppress(OSError):  # another run was faster
                Path(staged, "made").rename(FOLDER)
    return FOLDER


def there(version_4: Path, mode: str, folder: Path) -> dict[str, float]:
    script = Path(__file__).with_name("transformers_4.py")
    environment = os.environ | {"PYTHONPATH": str(version_4), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, mode, folder], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoints(version_4, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """Their checkpoints, ours beside them, and how far ours are from theirs when opened there."""
    folder = tmp_path_factory.mktemp("version_4")
    there(version_4, "write", folder)
    for name in CASES:
        save_pretrained(from_pretrained(folder / name / "theirs"), folder / name / "ours")
    return folder, there(version_4, "check", folder)


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
