"""`zero2hero convert IN OUT`: old weights as an ordinary model directory.

`.bin` files of PyTorch are pickles, which can name any function to be called while they are read. They are therefore
opened here and nowhere else, on explicit request, by torch's restricted reader, which builds tensors and nothing else.
What comes out has passed the same strict loading as any other model. llama2.c files are plain numbers.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from zero2hero.errors import UserError
from zero2hero.io import saving
from zero2hero.models.checkpoint import SINGLE, from_pretrained, read_json, save_pretrained, save_tensors
from zero2hero.models.llama2c import read_llama2c
from zero2hero.options import ConvertConfig

OLD, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_BESIDE = (
    "tokenizer*", "*.jinja", "generation_config.json", "special_tokens_map.json", "vocab.*", "merges.txt",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def convert(config: ConvertConfig) -> None:
    """Write the model of `config.source` into the folder `config.output_dir`.

    Raises:
        UserError: nothing there that can be converted, a file that holds more than tensors, or tensors that do not fit.
    """
    source, output = Path(config.source).expanduser(), Path(config.output_dir)
    if source.is_file():
        save_pretrained(read_llama2c(source), output)
    elif source.is_dir():
        save_pretrained(_read_old(source, output), output)
        copy_beside(source, output)
    else:
        raise UserError(f"there is no {source}: give a folder with {OLD}, or a llama2.c file")
    print(f"{source} -> {output}")


def copy_beside(source: Path, output: Path) -> None:
    """Copy what lies beside a model's weights: its tokenizer, its generation settings, how images are prepared."""
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            shutil.copyfile(file, output / file.name)


def _read_old(source: Path, output: Path) -> nn.Module:
    """The model of a folder with pickled weights, by way of a temporary folder that the strict loader reads."""
    if (source / OLD_INDEX).exists():
        names = sorted({Path(str(name)).name for name in read_json(source / OLD_INDEX).get("weight_map", {}).values()})
    else:
        names = [OLD]
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= _read_pickle(source / name)
    with saving(output):
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting.", dir=output) as folder:
            save_tensors(Path(folder) / SINGLE, {name: t.clone() for name, t in tensors.items()})
            shutil.copyfile(source / "config.json", Path(folder) / "config.json")
            return from_pretrained(folder)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except Exception as error:  # of many kinds: refused by the restricted reader, damaged, something else
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{path} is damaged or holds more than tensors, and is not opened: {first}") from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path} does not hold a table of tensors")
    return content
