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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zero2hero.errors import UserError, did_you_mean
from zero2hero.fetch import find_folder
from zero2hero.io import atomic_write, fsync_path, saving
from zero2hero.models import quantized_files
from zero2hero.models.families import Family, Rule, family_of_config, family_to_write
from zero2hero.nn import nf4
from zero2hero.nn.nf4 import NF4
from zero2hero.nn.quantized import Int8, moved, put_in, quantizable, quantize_rows, quantized_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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
    path_or_id: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> nn.Module:
    """Load a model from a directory or a hub id.

    Args:
        path_or_id: a directory with config.json and safetensors (single or sharded), or a hub id.
        dtype: of the weights in memory; as stored by default.
        device: where the weights go.
        load_in_4bit, load_in_8bit: quantize the layers' matrices as they are read (NF4 with double quantization, or
            int8; see tune/quantize.py). What bitsandbytes quantized stays so in any case.

    Returns:
        The model that the family of config.json builds, in evaluation mode.

    Raises:
        UserError: an unknown family, an unsupported setting, or tensors that do not fit exactly.
    """
    if load_in_4bit and load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit exclude each other")
    quantize = nf4.quantize if load_in_4bit else quantize_rows if load_in_8bit else None
    directory = find_folder(path_or_id)
    theirs = read_json(directory / "config.json")
    quantized_files.check_config(theirs.pop(quantized_files.KEY, None))
    family = family_of_config(theirs)
    try:
        config = family.read_config(theirs)
        with _open_weights(directory) as files:
            config = family.settle(config, files.keys())
        with torch.device("meta"):
            model = family.build(config)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # a number that is a text, say
        raise UserError(f"{directory / 'config.json'} holds a value of the wrong kind: {error}") from None
    state, quantized = _read_tensors(directory, family, model, dtype, device, quantize)
    for name, weight in quantized.items():
        put_in(model, name.removesuffix(".weight"), weight)
    parameters = {name: nn.Parameter(tensor) for name, tensor in state.items()}
    for name, first in _first_names(model).items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, parameters[first])
    return model.to(device).eval()


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's name -> the first name that the same parameter has (a tied head's is the embedding's)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _read_tensors(
    directory: Path, family: Family, model: nn.Module, dtype: torch.dtype | None, device: torch.device | str,
    quantize: Callable[[Tensor], NF4 | Int8] | None,
) -> tuple[dict[str, Tensor], dict[str, NF4 | Int8]]:  # fmt: skip
    """Every parameter of the model by its first name, and apart from them those that are quantized, or become so."""
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    first = _first_names(model)
    rules = {r.theirs: r for r in family.rules_for(shapes)}
    may_be = {f"{name}.weight" for name in quantizable(model)}
    state: dict[str, Tensor] = {}
    quantized: dict[str, NF4 | Int8] = {}
    source: dict[str, str] = {}
    unexpected: list[str] = []
    with _open_weights(directory) as files:
        for stored, file in files.items():
            rule = rules.get(stored) or rules.get(family.newer_name(stored))
            if rule is None:
                ignored = stored.endswith(family.ignored or ("\0",))
                if not ignored and not quantized_files.describes_another(stored, files):
                    unexpected.append(stored)
                continue
            if quantized_files.is_quantized(stored, files):
                if rule.transpose or len(rule.parts) > 1 or rule.parts[0] not in may_be:
                    raise UserError(f"tensor {stored} is quantized; only a layer's linear module can be, one by one")
                weight = quantized_files.read(stored, files, tuple(shapes[rule.parts[0]]))
                quantized[rule.parts[0]] = moved(weight, device)
                continue
            for name, value in to_ours(rule, file.get_tensor(stored), shapes, stored).items():
                value = value.to(device=device, dtype=dtype or value.dtype)
                if quantize is not None and name in may_be:
                    quantized[name] = quantize(value)
                    continue
                if quantize is not None:  # the file, much larger than what is kept, need not stay mapped
                    value = value.clone()
                before = source.setdefault(first[name], stored)
                kept = state.setdefault(first[name], value)
                if kept is not value and not torch.equal(kept, value):
                    raise UserError(
                        f"{directory}: {stored} differs from {before}, although they are one matrix under "
                        "config.json's tie_word_embeddings. Set it to false if each is its own."
                    )
    absent = set(first.values()) - state.keys() - quantized.keys()
    missing = [r.theirs for r in rules.values() if absent & set(r.parts)] or sorted(absent)
    _complain(directory, family.model_type, list(rules), missing, unexpected)
    return state, quantized


def to_ours(rule: Rule, value: Tensor, shapes: dict[str, torch.Size], stored: str) -> dict[str, Tensor]:
    """One stored tensor as our parameters: transposed and split as the rule says, every shape checked."""
    if not value.is_floating_point():
        raise UserError(f"tensor {stored} holds {value.dtype} numbers, and nothing beside it says what they stand for")
    if rule.transpose:
        value = value.t().contiguous()
    expected = tuple(shapes[rule.parts[0]])
    rows = [shapes[name][0] for name in rule.parts] if len(rule.parts) > 1 else []
    if rows:
        expected = (sum(rows), *expected[1:])
    ours, expected = expected, rule.stored_shape(expected)
    if tuple(value.shape) != expected:
        want = expected[::-1] if rule.transpose else expected
        got = tuple(value.shape)[::-1] if rule.transpose else tuple(value.shape)
        raise UserError(f"tensor {stored} has shape {list(got)}; config.json says it should be {list(want)}")
    value = value.reshape(ours)
    if not rows:
        return {rule.parts[0]: value}
    return {name: part.clone() for name, part in zip(rule.parts, value.split(rows))}


def _complain(directory: Path, model_type: str, known: list[str], missing: list[str], unexpected: list[str]) -> None:
    names, others, fault = (missing, unexpected, "missing for") if missing else (unexpected, known, "with no place in")
    if names:
        raise UserError(
            f"{directory}: {len(names)} tensor{'s' * (len(names) > 1)} {fault} {model_type}: "
            f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}.{did_you_mean(names[0], others)}"
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
                hint = ""
                if old:
                    hint = (
                        f" ({old.name} is in the old pickle format, which can run code; `zero2hero convert` opens it)"
                    )
                raise UserError(f"{self.directory} has no {name}{hint}") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
            files.update({key: file for key in file.keys()})  # noqa: SIM118
        return files

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def to_family(state: Mapping[str, Any], family: Family) -> Iterator[tuple[str, Any]]:
    """Our parameters as the family's named tensors; quantized weights as they are.

    Raises:
        UserError: a parameter for which the family has no name (of an adapter, say), or not as it is quantized.
    """
    rules = family.rules_for(state)
    strange = state.keys() - {part for rule in rules for part in rule.parts}
    if strange:
        raise UserError(
            f"{family.model_type} files have no place for {sorted(strange)[0]}; merge adapters before saving"
        )
    for rule in rules:
        if all(isinstance(state[part], Tensor) for part in rule.parts):
            yield rule.theirs, to_theirs(rule, state)
        elif rule.transpose or len(rule.parts) > 1:
            raise UserError(f"{family.model_type} files cannot hold {rule.parts[0]} quantized; dequantize it first")
        else:
            yield rule.theirs, state[rule.parts[0]]


def to_theirs(rule: Rule, state: Mapping[str, Tensor]) -> Tensor:
    """Our parameters as the one tensor that the rule makes of them."""
    value = torch.cat([state[p] for p in rule.parts]) if len(rule.parts) > 1 else state[rule.parts[0]]
    value = value.reshape(rule.stored_shape(tuple(value.shape)))
    return (value.t() if rule.transpose else value).contiguous()


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


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    state: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json and model.safetensors, which transformers 4.57 and 5 read.

    Args:
        model: has a `config` that one of the families can write.
        directory: where to; the weights of another model there are replaced.
        state: parameters to write instead of the model's own (fp32 masters of a bf16 model, say).
        max_shard_size: bytes, or a text such as "5GB"; a larger model becomes several files and an index.

    Raises:
        UserError: no published architecture fits, or the directory cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    directory = Path(directory)
    config: Any = model.config
    family = family_to_write(config)
    own = {name: p.detach() for name, p in model.named_parameters()}
    numbers, quantized = {name: (state or own)[name].cpu() for name in own}, quantized_weights(model)
    dtype = str(next(iter(numbers.values())).dtype).removeprefix("torch.")
    tensors: dict[str, Tensor] = {}
    for name, value in to_family(numbers | quantized, family):
        tensors |= {name: value} if isinstance(value, Tensor) else quantized_files.spelt(name, value, dtype)
    content = family.write_config(config) | quantized_files.config_of(quantized.values())
    for each in (content, *(content[key] for key in family.parts)):
        each |= {"torch_dtype": dtype, "dtype": dtype}
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        save_tensors(directory / name, {key: tensors[key] for key in keys})
    atomic_write(directory / "config.json", json.dumps(content, indent=2, sort_keys=True) + "\n")
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        atomic_write(directory / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    remove_other_weights(directory, {*plan.filename_to_tensors, *([INDEX] if plan.is_sharded else [])})


def remove_other_weights(directory: Path, kept: set[str]) -> None:
    """Remove the weights of an earlier model: its index first, for that is what a loader goes by."""
    for path in [directory / INDEX, directory / SINGLE, *directory.glob("model-*-of-*.safetensors")]:
        if path.name not in kept:
            path.unlink(missing_ok=True)
