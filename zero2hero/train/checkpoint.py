"""Checkpoints: everything that a run needs to go on exactly where it stopped, and nothing that can be half-written.

    checkpoints/step-000200/
        model.safetensors      fp32 master weights, under our own names
        optimizer.safetensors  the optimizers' moments, and the random state
        state.json             step, counters, best loss, schedule position
        MANIFEST.json          size and SHA-256 of each file; written last

A checkpoint is written in a folder with a temporary name, every file is flushed to the disk, and the folder is
renamed: it is there whole or not at all. On resume the newest one whose files match its manifest is taken; a damaged
one is passed over with a loud line. Tensors are safetensors and the rest is JSON, so loading cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.io import atomic_directory

FORMAT = 1


def folder_of(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
) -> None:
    """Write one checkpoint. `weights` are the fp32 parameters that the optimizers own.

    Raises:
        UserError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    moments, groups = _flatten(optimizers)
    with atomic_directory(folder) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary / "model.safetensors")
            save_file(moments | _random_tensors(), temporary / "optimizer.safetensors")
        except Exception as error:  # safetensors reports a full disk as an error of its own
            raise OSError(str(error)) from error
        everything = state | {"optimizers": groups, "python_random": random.getstate()}
        (temporary / "state.json").write_text(json.dumps(everything))
        manifest = {
            "format": FORMAT,
            "step": state["step"],
            "files": {p.name: _fingerprint(p) for p in sorted(temporary.iterdir())},
        }
        (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))


def load_checkpoint(
    folder: Path, weights: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Put a checkpoint's weights, moments and random state back in place; returns the state that was saved.

    Raises:
        UserError: its tensors are not those of this model and these optimizers.
    """
    saved = load_file(folder / "model.safetensors")
    odd = sorted(saved.keys() ^ weights.keys())
    shapes = [name for name in saved.keys() & weights.keys() if saved[name].shape != weights[name].shape]
    if odd or shapes:
        raise UserError(f"{folder} holds another model: {(odd + shapes)[0]} does not fit")
    state = json.loads((folder / "state.json").read_text())
    with torch.no_grad():
        for name, value in saved.items():
            weights[name].copy_(value)
    moments = load_file(folder / "optimizer.safetensors")
    for index, (optimizer, groups) in enumerate(zip(optimizers, state.pop("optimizers"))):
        prefix = f"{index}."
        restored: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            if key.startswith(prefix):
                _, parameter, name = key.split(".", 2)
                restored.setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict({"state": restored, "param_groups": groups})
    torch.set_rng_state(moments["random.torch"])
    *keys, position = moments["random.numpy"].tolist()
    np.random.set_state({"bit_generator": "MT19937", "state": {"key": np.asarray(keys, np.uint32), "pos": position}})
    version, internal, gauss = state.pop("python_random")
    random.setstate((version, tuple(internal), gauss))
    return state


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files are those of its manifest, or None. Says aloud which it passes over."""
    for folder in reversed(_all(output_dir)):
        fault = verify(folder)
        if fault is None:
            return folder
        print(f"WARNING: {folder} is damaged ({fault}); falling back to the one before it.", file=sys.stderr)
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this program reads {FORMAT}"
        for name, expected in manifest["files"].items():
            if _fingerprint(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def remove_old(output_dir: str | Path, step: int, keep_last: int) -> None:
    """Delete all but the `keep_last` newest checkpoints up to the one of `step`, which was just written.

    Any later ones were found damaged on resume and passed over; they go too, so that they cannot push out whole ones.
    """
    folders = _all(output_dir)
    kept = folders[: folders.index(folder_of(output_dir, step)) + 1][-max(1, keep_last) :]
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _all(output_dir: str | Path) -> list[Path]:
    """Oldest first; from a million steps on, the names grow longer."""
    return sorted((Path(output_dir) / "checkpoints").glob("step-*"), key=lambda p: (len(p.name), p.name))


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flatten(optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[list[dict[str, Any]]]]:
    """Optimizer states as flat tensors `<optimizer>.<parameter>.<name>`, and the groups as JSON."""
    tensors: dict[str, Tensor] = {}
    groups = []
    for index, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        groups.append(state["param_groups"])
        for parameter, values in state["state"].items():
            for name, value in values.items():
                tensors[f"{index}.{parameter}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors, groups


def _random_tensors() -> dict[str, Tensor]:
    _, keys, position, *_ = np.random.get_state()
    return {
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.from_numpy(np.append(np.asarray(keys, dtype=np.int64), int(position))),
    }
