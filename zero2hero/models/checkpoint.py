"""Models in and out of Hugging Face directories, strictly.

A tensor that is missing, left over or of another shape is an error that names it and its nearest relative:
a loader that shrugs gives a model that writes fluent nonsense. Nothing in a file is executed: weights are
safetensors (a JSON header and raw numbers), configuration is JSON.

Tensors go one by one from the memory-mapped file to their place, so loading takes about the time of reading the
bytes, and the memory of one model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError, did_you_mean
from zero2hero.io import atomic_write, fsync_path, saving
from zero2hero.models.decoder import Decoder
from zero2hero.models.families import Family, Rule, family_of_config, family_to_write

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_directory(path_or_id: str | Path) -> Path:
    """A local directory as it is, or a hub id's snapshot (downloaded, or from the offline cache).

    Raises:
        UserError: neither a directory nor a hub id that can be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_id)
    if path.exists():
        raise UserError(f"{name} is a file; give the directory that holds config.json and {SINGLE}")
    near = did_you_mean(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()])
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"no such model directory: {name}.{near}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"no local directory named {name}, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}). Check the name, the network, or HF_TOKEN for a private model.{near}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON object file; a `UserError` says where it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: is it a model's directory?") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def from_pretrained(
    path_or_id: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """Load a model from a directory or a hub id.

    Args:
        path_or_id: a directory with config.json and safetensors (single or sharded), or a hub id.
        dtype: of the weights in memory; as stored by default.
        device: where the weights go.

    Raises:
        UserError: an unknown family, an unsupported setting, or tensors that do not fit exactly.
    """
    directory = find_directory(path_or_id)
    theirs = read_json(directory / "config.json")
    family = family_of_config(theirs)
    try:
        config = family.read_config(theirs)
        with torch.device("meta"):
            model = Decoder(config)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # a number that is a text, say
        raise UserError(f"{directory / 'config.json'} holds a value of the wrong kind: {error}") from None
    state = _read_tensors(directory, family, model, dtype, device)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.reset_buffers()
    return model.to(device).eval()


def _read_tensors(
    directory: Path, family: Family, model: Decoder, dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    rules = {r.theirs: r for r in family.rules_for(model.config, set(shapes))}
    state: dict[str, Tensor] = {}
    unexpected: list[str] = []
    with _open_weights(directory) as files:
        prefix = family.optional_prefix
        bare = bool(prefix) and not any(key.startswith(prefix) for key in files)
        tied_head: Tensor | None = None
        for stored, file in files.items():
            key = prefix + stored if bare and prefix + stored in rules else stored
            if key in rules:
                for name, value in _to_ours(rules[key], file.get_tensor(stored), shapes, stored).items():
                    state[name] = value.to(device=device, dtype=dtype or value.dtype)
            elif key == "lm_head.weight" and model.config.tie_word_embeddings:
                tied_head = file.get_tensor(stored)
            elif not stored.endswith(family.ignored or ("\0",)):
                unexpected.append(stored)
    if tied_head is not None and "embed_tokens.weight" not in state:  # tied, and stored under the head's name
        state["embed_tokens.weight"] = tied_head.to(device=device, dtype=dtype or tied_head.dtype)
        tied_head = None
    _complain(directory, family, rules, state, shapes, unexpected)
    if tied_head is not None and not torch.equal(
        tied_head.to(dtype or tied_head.dtype), state["embed_tokens.weight"].cpu()
    ):
        raise UserError(
            f"{directory}: config.json ties the head to the embedding (tie_word_embeddings), but the file holds a "
            "different lm_head.weight. Set tie_word_embeddings to false if the head is its own."
        )
    return state


def _to_ours(rule: Rule, value: Tensor, shapes: dict[str, torch.Size], stored: str) -> dict[str, Tensor]:
    """One stored tensor as our parameters: transposed and split as the rule says, every shape checked."""
    if not value.is_floating_point():
        raise UserError(f"tensor {stored} holds {value.dtype} numbers; quantized weights cannot be loaded")
    if rule.transpose:
        value = value.t().contiguous()
    rows = [shapes[name][0] for name in rule.parts]
    expected = (sum(rows), *shapes[rule.parts[0]][1:])
    if tuple(value.shape) != expected:
        want = expected[::-1] if rule.transpose else expected
        got = tuple(value.shape)[::-1] if rule.transpose else tuple(value.shape)
        raise UserError(f"tensor {stored} has shape {list(got)}; config.json says it should be {list(want)}")
    if len(rows) == 1:
        return {rule.parts[0]: value}
    return {name: part.clone() for name, part in zip(rule.parts, value.split(rows))}


def _complain(directory: Path, family: Family, rules, state, shapes, unexpected: list[str]) -> None:
    missing = [name for name in shapes if name not in state]
    theirs = {part: r.theirs for r in rules.values() for part in r.parts}
    if missing:
        names = [theirs.get(name, name) for name in missing]
        near = did_you_mean(names[0], unexpected)
        raise UserError(
            f"{directory}: {len(names)} tensor{'s' * (len(names) > 1)} missing for {family.model_type}: "
            f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}.{near}"
        )
    if unexpected:
        near = did_you_mean(unexpected[0], [r.theirs for r in rules.values()])
        raise UserError(
            f"{directory}: {len(unexpected)} tensor{'s' * (len(unexpected) > 1)} that {family.model_type} has no "
            f"place for: {', '.join(unexpected[:3])}{' ...' if len(unexpected) > 3 else ''}.{near}"
        )


class _open_weights:
    """The safetensors of a directory, single or sharded, memory-mapped: {tensor name: file}."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.stack = directory, ExitStack()

    def __enter__(self) -> dict[str, Any]:
        if (self.directory / INDEX).exists():
            placed = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
                raise UserError(f"{self.directory / INDEX} has no weight_map of tensors to files")
            names = sorted(set(placed.values()))
            if any(Path(name).name != name for name in names):
                raise UserError(f"{self.directory / INDEX} points outside its directory")
        else:
            names = [SINGLE]
        files: dict[str, Any] = {}
        for name in names:
            path = self.directory / name
            try:
                file = self.stack.enter_context(safe_open(str(path), framework="pt"))
            except FileNotFoundError:
                old = next(self.directory.glob("*.bin"), None)
                hint = f" ({old.name} is in the old pickle format, which can run code: convert it first)" if old else ""
                raise UserError(f"{self.directory} has no {name}{hint}") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
            files.update({key: file for key in file.keys()})  # noqa: SIM118
        return files

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def to_family(model_state: dict[str, Tensor], config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """Our parameters as the family's named tensors."""
    family = family_to_write(config)
    for rule in family.rules_for(config, set(model_state)):
        value = torch.cat([model_state[p] for p in rule.parts]) if len(rule.parts) > 1 else model_state[rule.parts[0]]
        yield rule.theirs, (value.t() if rule.transpose else value).contiguous()


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, fsync, rename."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        try:
            try:
                save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
            os.chmod(temporary, 0o644)
            fsync_path(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_path(path.parent)


def save_pretrained(model: Decoder, directory: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors, which transformers 4.57 and 5 read.

    `state`: parameters to write instead of the model's own (fp32 masters of a bf16 model, say).

    Raises:
        UserError: no published architecture fits, or the directory cannot be written.
    """
    directory = Path(directory)
    family = family_to_write(model.config)
    own = {name: p.detach() for name, p in model.named_parameters()}
    tensors = dict(to_family({name: (state or own)[name].cpu() for name in own}, model.config))
    config = family.write_config(model.config)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config |= {"torch_dtype": dtype, "dtype": dtype}
    save_tensors(directory / SINGLE, tensors)
    atomic_write(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
