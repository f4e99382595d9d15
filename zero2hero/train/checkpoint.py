"""Checkpoints: everything that a run needs to go on exactly where it stopped, and nothing that can be half-written.

    checkpoints/
        LATEST                     the name of the newest: step-000200
        step-000200/
            model.safetensors      fp32 master weights, under our own names (a divided model: see sharded_checkpoint.py)
            optimizer.safetensors  the optimizers' moments
            optimizer.json         their settings
            state.safetensors      random states; tensors that the data and the watchers must remember
            state.json             step and counters, best loss, sums since the last log line, and the like
            MANIFEST.json          size, SHA-256 and tensors of each file, and what the run is made with; written last

A checkpoint is written in a folder with a temporary name, every file is flushed to the disk, and the folder is
renamed: it is there whole or not at all. The newest one whose files match its manifest is taken on resume; a damaged
one is passed over with a loud line. Tensors are safetensors and the rest is JSON, so loading cannot run code, and all
of it is read and checked before anything is overwritten.

The position of the schedule and of the record in metrics.jsonl is the step; so is that of the data, where they are a
pure function of the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.io import atomic_directory, atomic_write, saving
from zero2hero.train import sharded_checkpoint
from zero2hero.train.parallel import ALONE, Ranks
from zero2hero.train.sharding import as_part, as_whole

FORMAT = 2  # raise when the files above change
MANIFEST, LATEST = "MANIFEST.json", "LATEST"
_TENSOR = "__tensor__"  # in JSON, {"__tensor__": name} stands for a tensor of the safetensors file beside it

Optimizers = list[torch.optim.Optimizer]


def folder_of(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"step-{step:06d}"


# --- a folder with a manifest, whatever is in it --------------------------------------------------------------


@contextlib.contextmanager
def publishing(folder: Path, ranks: Ranks = ALONE, **about: Any) -> Iterator[Path]:
    """Yield a temporary folder to fill; then it gets its manifest, becomes `folder`, and LATEST names it.

    Every rank must come here, and all get the same folder. `about`: JSON values for the manifest, such as step,
    eval_loss and made_with.

    Raises:
        UserError: the disk is full or read-only; earlier folders are untouched.
    """
    if not ranks.is_main:
        yield Path(ranks.gather(None)[0])
        ranks.barrier()  # all has been written
        ranks.barrier()  # it has been published
        return
    with atomic_directory(folder) as temporary:
        ranks.gather(str(temporary.resolve()))
        yield temporary
        ranks.barrier()
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        described = {path.relative_to(temporary).as_posix(): _describe(path) for path in files}
        manifest = {"format": FORMAT, **about, "files": described}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    atomic_write(folder.parent / LATEST, folder.name + "\n")
    ranks.barrier()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises OSError or ValueError: it is not there, or not one that this program reads."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not manifest.get("files"):
        raise ValueError(f"{MANIFEST} is not of format {FORMAT}, which this program reads")
    return manifest


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        for name, expected in read_manifest(folder)["files"].items():
            if _describe(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def good_checkpoints(output_dir: str | Path) -> Iterator[Path]:
    """Those whose files are the ones of their manifests, newest first. Says aloud which it passes over."""
    for folder in reversed(_all(output_dir)):
        fault = verify(folder)
        if fault is None:
            yield folder
        else:
            print(f"WARNING: {folder} is damaged ({fault}); falling back to the one before it.", file=sys.stderr)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint, or None when none was ever written.

    Raises:
        UserError: there are checkpoints, and each is damaged.
    """
    folder = next(good_checkpoints(output_dir), None)
    if folder is None and (damaged := _all(output_dir)):
        raise UserError(
            f"no checkpoint in {damaged[-1].parent} can be used: {damaged[-1].name} is damaged ({verify(damaged[-1])})"
            + (f", and so are the {len(damaged) - 1} before it" if damaged[1:] else "")
            + ". Put a copy back if there is one, or start the run anew in another --output_dir."
        )
    return folder


def best_checkpoint(output_dir: str | Path) -> Path | None:
    """Of the whole checkpoints, the first with the lowest held-out loss; None when none was evaluated."""
    best = min(reversed(list(good_checkpoints(output_dir))), key=eval_loss, default=None)
    return best if best is not None and math.isfinite(eval_loss(best)) else None


def eval_loss(folder: Path) -> float:
    """The held-out loss at a checkpoint's step, infinite where it was not measured."""
    try:
        loss = float(read_manifest(folder)["eval_loss"])
        return loss if math.isfinite(loss) else math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def remove_old(output_dir: str | Path, step: int, keep_last: int, keep_best: int = 0) -> None:
    """Delete checkpoints but the `keep_last` newest and the `keep_best` of lowest held-out loss up to that of `step`,
    which was just written.

    Any later ones were found damaged on resume and passed over; they go too, so that they cannot push out whole ones.
    So does what a save that was killed left half done.
    """
    folders = _all(output_dir)
    written = folders[: folders.index(folder_of(output_dir, step)) + 1]
    evaluated = sorted((f for f in written if math.isfinite(eval_loss(f))), key=eval_loss)
    kept = {*written[-max(1, keep_last) :], *evaluated[:keep_best]}
    parent = folder_of(output_dir, step).parent
    with saving(parent):
        for folder in folders:
            if folder not in kept and folder.exists():  # out of sight first: deletion may be killed half way
                os.rename(folder, Path(tempfile.mkdtemp(prefix=".old.", dir=parent)) / folder.name)
        for left in parent.glob(".*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _all(output_dir: str | Path) -> list[Path]:
    """Oldest first; from a million steps on, the names grow longer. One that LATEST names should be there."""
    parent = Path(output_dir) / "checkpoints"
    found = set(parent.glob("step-*"))
    with contextlib.suppress(OSError, ValueError):
        latest = (parent / LATEST).read_text().strip()
        if re.fullmatch(r"step-\d+", latest):
            found.add(parent / latest)
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, and the dtype and shape of each tensor in it."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    found: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found["tensors"] = {name: f"{s.get_dtype()} {s.get_shape()}" for name, s in slices.items()}
    return found


# --- what is in it --------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """What was read from `folder`; `state` is the trainer's own."""

    folder: Path
    weights: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    random: dict[str, Any]
    state: dict[str, Any]

    def check(self, weights: Mapping[str, Tensor], optimizers: Optimizers) -> None:
        """Raises UserError: it does not fit this model and these optimizers."""
        check_weights(self.folder, self.weights, weights)
        theirs = [_sizes(saved.get("param_groups", [])) for saved in self.optimizers]
        ours = [_sizes(optimizer.param_groups) for optimizer in optimizers]
        if theirs != ours:
            raise UserError(f"{self.folder} holds another optimizer's state: groups of {theirs} tensors, not {ours}")

    def restore(self, weights: Mapping[str, Tensor], optimizers: Optimizers) -> None:
        """Put weights, moments and random states back in place; they have been checked."""
        copy_weights(self.weights, weights)
        for optimizer, saved in zip(optimizers, self.optimizers):
            _restore_optimizer(optimizer, saved)
        set_random_state(self.random)


def save_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], optimizers: Optimizers, state: dict[str, Any], ranks: Ranks = ALONE,
    **about: Any,
) -> None:  # fmt: skip
    """Write one checkpoint; every rank must call it.

    Args:
        folder: where; see `folder_of`.
        weights: the fp32 parameters that the optimizers own.
        optimizers: their states are kept as `state_dict` gives them.
        state: the rest, nested dictionaries (with texts as keys) and lists of tensors and JSON values.
        ranks: those that hold parts of the tensors, or the same.
        **about: for the manifest, see `publishing`.

    Raises:
        UserError: the disk is full or read-only; earlier checkpoints are untouched.
    """
    states = []
    for optimizer in optimizers:
        found, parameters = optimizer.state_dict(), parameters_of(optimizer)
        moments = {}
        for i, values in found["state"].items():
            moments[str(i)] = as_wholes(values, dict.fromkeys(values, parameters[i]))
        states.append(found | {"state": moments})
    with publishing(folder, ranks, **about) as temporary:
        write_named(temporary, "model", as_wholes(weights, weights), ranks)
        write_tree(temporary, "optimizer", states, ranks)
        write_tree(temporary, "state", {"random": random_state(), "state": as_wholes(state, weights)}, ranks)


def read_checkpoint(
    folder: Path, made_with: Mapping[str, str], weights: Mapping[str, Tensor], optimizers: Optimizers
) -> Checkpoint:
    """All that `save_checkpoint` wrote, or this rank's parts of it; the folder has been verified.

    Args:
        folder: where.
        made_with: what this run is made with, by name (settings, tokenizer, data), as hashes.
        weights, optimizers: those that it is for; they say how tensors are divided.

    Raises:
        UserError: the checkpoint was made with something else, or holds something else than it should.
    """
    try:
        found = read_manifest(folder)["made_with"]
        changed = [what for what in sorted(made_with.keys() | found.keys()) if made_with.get(what) != found.get(what)]
        if changed:
            raise UserError(
                f"{folder} was made with other {' and '.join(changed)} than this run has now. --resume continues a "
                "run as it began: put back what was changed, or start a new run in another --output_dir."
            )
        state = read_tree(folder, "state", weights)
        moments = read_tree(folder, "optimizer", parameters_by_place(optimizers))
        return Checkpoint(folder, read_weights(folder, weights), moments, state["random"], state["state"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a checkpoint that can be read: {type(error).__name__}: {error}") from error


def read_weights(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return read_tensors(folder, "model", weights)


def check_weights(folder: Path, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises UserError: `saved` does not have the names, shapes and dtypes of `weights`."""
    theirs, ours = ({name: (tuple(t.shape), t.dtype) for name, t in all.items()} for all in (saved, weights))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{folder} holds another model: {name} does not fit "
                f"({theirs.get(name, 'missing')} there, {ours.get(name, 'none')} in this run)"
            )


@torch.no_grad()
def copy_weights(saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, value in saved.items():
        weights[name].copy_(value)


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    states = {int(parameter): values for parameter, values in saved["state"].items()}
    optimizer.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
    parameters = parameters_of(optimizer)
    for index, values in states.items():
        ours = optimizer.state[parameters[index]]
        for name, value in values.items():  # torch turns all but `step` to the parameter's dtype: not so 8-bit moments
            if isinstance(value, Tensor) and ours[name].dtype != value.dtype:
                ours[name] = value.to(ours[name].device)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which a state dictionary numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameters_by_place(optimizers: Optimizers) -> dict[str, Tensor]:
    """The parameter whose state stands at `<optimizer>.state.<parameter>` of the tree."""
    lists = [parameters_of(optimizer) for optimizer in optimizers]
    return {f"{i}.state.{j}": p for i, parameters in enumerate(lists) for j, p in enumerate(parameters)}


def random_state() -> dict[str, Any]:
    """The state of every generator that training may draw from: Python's, NumPy's, torch's on each device."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {})


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = np.asarray(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda in zip(range(torch.cuda.device_count()), state.get("cuda", [])):
            torch.cuda.set_rng_state(cuda, device)


# --- trees of tensors and JSON values -------------------------------------------------------------------------


def write_tree(folder: Path, name: str, tree: Any, ranks: Ranks = ALONE) -> None:
    """`name`.json, and its tensors beside it."""
    tensors: dict[str, Tensor] = {}
    skeleton = _take_out(tree, "", tensors)
    write_named(folder, name, tensors, ranks)
    if ranks.is_main:
        (folder / f"{name}.json").write_text(json.dumps(skeleton))


def read_tree(folder: Path, name: str, parts: Mapping[str, Tensor] | None = None) -> Any:
    return _put_in(json.loads((folder / f"{name}.json").read_text()), read_tensors(folder, name, parts or {}))


def write_named(folder: Path, name: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """`name`.safetensors; or, when some are divided among ranks, the folder `name`."""
    if any(hasattr(tensor, "placements") for tensor in tensors.values()):
        sharded_checkpoint.write(folder / name, tensors)
    elif ranks.is_main:
        write_tensors(folder / f"{name}.safetensors", tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # so it reports a full disk
        raise OSError(str(error)) from error


def read_tensors(folder: Path, name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `write_named` wrote. `parts`: parameters, by the place of what is divided as they are."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        return sharded_checkpoint.read(folder / name, parts)
    found = {}
    for key, value in load_file(file).items():
        p = sharded_checkpoint.like(key, value.shape, parts)
        found[key] = value if p is None else as_part(p, value)
    return found


def as_wholes(tree: Any, parts: Mapping[str, Tensor]) -> Any:
    """`tree` with each tensor that is divided like the parameter of its name as the whole that it belongs to."""
    if not isinstance(tree, Mapping):
        return tree
    found = {}
    for name, value in tree.items():
        p = parts.get(name) if isinstance(value, Tensor) else None
        divided = p is not None and hasattr(p, "whole") and value.shape == p.shape
        found[name] = as_whole(p, value.detach()) if divided else as_wholes(value, parts)
    return found


def _take_out(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """`value` with a reference where each tensor was; the tensors go to `tensors`, named for their place."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {_TENSOR: place}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{place}: JSON knows only texts as keys, not {list(value)}")
        return {key: _take_out(inner, f"{place}.{key}".lstrip("."), tensors) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(inner, f"{place}.{i}".lstrip("."), tensors) for i, inner in enumerate(value)]
    return value


def _put_in(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value[_TENSOR]] if _TENSOR in value else {k: _put_in(v, tensors) for k, v in value.items()}
    return [_put_in(inner, tensors) for inner in value] if isinstance(value, list) else value
