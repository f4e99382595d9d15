"""Adapters in PEFT's folders, in both directions: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight [r, in]    base_model.model.<module>.lora_B.weight [out, r]
    base_model.model.<module>.lora_magnitude_vector [out]                                         (DoRA)
    base_model.model.<module>.lora_embedding_A [r, V]  base_model.model.<module>.lora_embedding_B [D, r]
    base_model.model.<parameter>                                                                  (modules_to_save)

<module> is the name in the family's files. Several of our matrices may be one there: GPT-2's query, key and value are
`c_attn`. Read, its A goes to all three and its B is divided; written, the A are stacked and the B become blocks, of a
rank that is theirs together.

Loading is strict. PEFT passes over a tensor whose name it does not know, and the adapter then does nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zero2hero.errors import UserError, did_you_mean
from zero2hero.fetch import find_folder
from zero2hero.io import atomic_write
from zero2hero.models.checkpoint import read_json, save_tensors, to_ours, to_theirs
from zero2hero.models.decoder import Decoder
from zero2hero.models.encoder import Encoder
from zero2hero.models.encoder_decoder import EncoderDecoder
from zero2hero.models.families import family_to_write
from zero2hero.tune.adapters import adapted_modules, adapter_names, adapter_parameters, install
from zero2hero.tune.config import LoraConfig
from zero2hero.tune.lora import LowRank
from zero2hero.tune.targets import base_parameters, is_kept, matches, modules_by_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Sizes = dict[str, tuple[int, float]]  # module -> rank, lora_alpha

_LINEAR = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "base": "base_layer.weight",
}
_EMBEDDING = _LINEAR | {"A": "lora_embedding_A", "B": "lora_embedding_B"}
_KINDS = {theirs: ours for kinds in (_LINEAR, _EMBEDDING) for ours, theirs in kinds.items()}
# Keys of adapter_config.json that change no mathematics once an adapter is trained.
_HARMLESS = {
    "peft_type", "auto_mapping", "revision", "inference_mode", "peft_version", "fan_in_fan_out", "layers_pattern",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
    "ensure_weight_tying", "runtime_config",
}  # fmt: skip


def read_config(folder: str | Path) -> LoraConfig:
    """The settings in a folder's adapter_config.json; keys that are absent have PEFT's defaults.

    Raises:
        UserError: another kind of adapter, or a setting that changes the mathematics in an unsupported way.
    """
    where = Path(folder) / CONFIG
    theirs, known = read_json(where), {f.name for f in fields(LoraConfig)}
    if theirs.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {theirs.get('peft_type')!r} is not LORA, the kind of adapter that is read")
    for key, value in theirs.items():
        if value and key not in known | _HARMLESS:
            raise UserError(f"{where}: {key} = {value!r} may change what the adapter computes, and is not supported")
    try:
        return LoraConfig(**{key: value for key, value in theirs.items() if key in known and value is not None})
    except (UserError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def base_folder(folder: Path, base_model: str | None = None) -> Path:
    """The folder of an adapter's base: `base_model`, or what its configuration names (as it stands, or beside it).

    Raises:
        UserError: it names none, or that cannot be found.
    """
    name = base_model or read_config(folder).base_model_name_or_path
    if not name:
        raise UserError(f"{folder / CONFIG} names no base_model_name_or_path: say which model it adapts")
    beside = folder.parent / name
    try:
        return find_folder(beside if beside.is_dir() and not Path(name).is_dir() else name)
    except UserError as error:
        raise UserError(f"the base of the adapter {folder}: {error}") from None


def load_adapter(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> nn.Module:
    """Put an adapter from a folder or hub id on its base model and make it the active one.

    Args:
        model: the base, of any precision; other adapters may be on it.
        folder: what PEFT or `save_adapter` wrote.
        adapter_name: what to call it here.
        is_trainable: its parameters require a gradient, to go on training.

    Returns:
        The same model, changed in place.

    Raises:
        UserError: an adapter of another base, or a tensor that is missing, left over or of another shape; nothing is
            changed then.
    """
    folder = find_folder(folder, needed=CONFIG, files=(CONFIG, WEIGHTS))
    config = read_config(folder)
    values, sizes, saved = _Reader(model, folder, config).read()
    install(model, config, adapter_name, sizes, saved)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, adapter_name).items():
            parameter.copy_(values[_plain(name, adapter_name)])
            parameter.requires_grad_(is_trainable)
    return model


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write an adapter as PEFT does.

    Args:
        model: has the adapter on it.
        folder: where to.
        adapter_name: which one.
        state: parameters to write instead of the model's own, by their names in it (fp32 masters, say).
        base_model_name_or_path: where the base is, if the adapter's own configuration does not say.

    Raises:
        UserError: no such adapter, a module for which the family's files have no name, or a folder that cannot be
            written.
    """
    if adapter_name not in adapter_names(model):
        raise UserError(f"the model has no adapter {adapter_name!r}.{did_you_mean(adapter_name, adapter_names(model))}")
    own = dict(adapter_parameters(model, adapter_name)) | dict(state or {})
    values = {_plain(n, adapter_name): own[n].detach().cpu() for n in adapter_parameters(model, adapter_name)}
    adapters = {n: m.adapters[adapter_name] for n, m in adapted_modules(model).items() if adapter_name in m.adapters}
    bases, family = modules_by_name(model), family_to_write(model.config)
    tensors: dict[str, Tensor] = {}
    sizes: Sizes = {}
    saved: dict[str, None] = {}
    placed: set[str] = set()
    for rule in family.rules_for(base_parameters(model)):
        parts, theirs = [part.rpartition(".")[0] for part in rule.parts], rule.theirs.rpartition(".")[0]
        if rule.theirs.endswith(".weight") and any(isinstance(adapters.get(part), LowRank) for part in parts):
            updates = {part: (adapters.get(part), bases[part]) for part in parts}
            joined, sizes[theirs] = _joined(updates, values)
            spelt = _EMBEDDING if isinstance(bases[parts[0]], nn.Embedding) else _LINEAR
            tensors |= {f"{PREFIX}{theirs}.{spelt[kind]}": value.contiguous() for kind, value in joined.items()}
        elif all(part in values for part in rule.parts):
            tensors[PREFIX + rule.theirs] = to_theirs(rule, values)
            saved[theirs] = None
        else:
            continue
        placed |= set(parts)
    for name in adapters.keys() - placed:
        raise UserError(
            f"{family.model_type} files have no name for {name}, so no other program could read its adapter"
        )
    config: LoraConfig = next(a.config for a in adapters.values() if isinstance(a, LowRank))
    known = [rule.theirs for rule in family.rules_for(base_parameters(model))] if _spelt_alike(model) else []
    content = _spell(config, sizes, list(saved), known)
    content["fan_in_fan_out"] = family.model_type == "gpt2"
    content["base_model_name_or_path"] = base_model_name_or_path or config.base_model_name_or_path
    save_tensors(Path(folder) / WEIGHTS, tensors)
    atomic_write(Path(folder) / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _plain(name: str, adapter_name: str) -> str:
    """An adapter's parameter by its module: "layers.0.self_attn.q_proj.A", say."""
    return name.replace(f".adapters.{adapter_name}.", ".")


# --- reading ----------------------------------------------------------------------------------------------


class _Reader:
    """An adapter's folder, read for a model."""

    def __init__(self, model: nn.Module, folder: Path, config: LoraConfig) -> None:
        self.folder, self.config, self.modules = folder, config, modules_by_name(model)
        self.family = family_to_write(model.config)
        self.rules = {rule.theirs: rule for rule in self.family.rules_for(base_parameters(model))}
        self.places = {  # their modules, and ours
            theirs.removesuffix(".weight"): [part.removesuffix(".weight") for part in rule.parts]
            for theirs, rule in self.rules.items()
            if theirs.endswith(".weight")
        }

    def read(self) -> tuple[dict[str, Tensor], Sizes, list[str]]:
        """Values by our names, the ranks and alphas, and the modules that are trained as a whole."""
        low_rank, whole = self._sorted()
        values = self._whole(whole)
        saved = list(dict.fromkeys(name.rpartition(".")[0] for name in values))
        self._check_complete(low_rank, saved)
        sizes: Sizes = {}
        for theirs, parts in low_rank.items():
            for name, tensors in self._divided(theirs, parts).items():
                values |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
                sizes[name] = self.config.rank_of(theirs), self.config.alpha_of(theirs)
        return values, sizes, saved

    def _sorted(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The file's tensors: those of updates by module and kind, and the others by name."""
        low_rank: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        kinds = "|".join(re.escape(kind) for kind in _KINDS)
        for key, value in _open(self.folder).items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)(?:\.({kinds}))?", key)
            if not match:
                raise UserError(f"{self.folder}: the name of tensor {key} should begin with {PREFIX}")
            theirs, kind = match.groups()
            if kind is None:
                whole[self.family.newer_name(theirs)] = value
                continue
            module = self.family.newer_name(f"{theirs}.weight").removesuffix(".weight")
            if module not in self.places:
                raise self._unfit(f"tensor {key} is for a module that is not there.{did_you_mean(module, self.places)}")
            low_rank.setdefault(module, {})[_KINDS[kind]] = value
        return low_rank, whole

    def _divided(self, theirs: str, parts: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """One module's update for each of our matrices that are one there, every shape checked."""
        names, rank = self.places[theirs], self.config.rank_of(theirs)
        bases = [self.modules[name] for name in names]
        embedding = isinstance(bases[0], nn.Embedding)
        outs = [base.embedding_dim if embedding else base.out_features for base in bases]
        width = bases[0].num_embeddings if embedding else bases[0].in_features
        wanted: dict[str, tuple[int, ...]] = {"A": (rank, width), "B": (sum(outs), rank)}
        if self.config.use_dora:
            wanted["magnitude"] = (sum(outs),)
        self._check_base(theirs, bases[0], parts.pop("base", None))
        for kind in {**wanted, **parts}:
            spelt = f"{theirs}.{(_EMBEDDING if embedding else _LINEAR)[kind]}"
            if (kind in parts) != (kind in wanted):
                raise UserError(f"{self.folder}: {spelt} is {'missing' if kind in wanted else 'unexpected'}")
            if tuple(parts[kind].squeeze().shape) != tuple(n for n in wanted[kind] if n != 1):
                raise self._unfit(f"{spelt} has shape {list(parts[kind].shape)} and should have {list(wanted[kind])}")
        split = {kind: parts[kind].reshape(wanted[kind]).split(outs) for kind in wanted if kind != "A"}
        return {n: {"A": parts["A"]} | {kind: piece[i] for kind, piece in split.items()} for i, n in enumerate(names)}

    def _whole(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of modules that were trained as a whole, by our names."""
        own = {name: dict(module.named_parameters(recurse=False)) for name, module in self.modules.items()}
        shapes = {f"{name}.{kind}": p.shape for name, parameters in own.items() for kind, p in parameters.items()}
        found: dict[str, Tensor] = {}
        for theirs, value in stored.items():
            if theirs not in self.rules:
                raise self._unfit(f"it has no parameter {theirs}.{did_you_mean(theirs, self.rules)}")
            found |= to_ours(self.rules[theirs], value, shapes, theirs)
        for name in list(found):
            module = name.rpartition(".")[0]
            missing = [kind for kind in own[module] if f"{module}.{kind}" not in found]
            if missing:
                raise UserError(f"{self.folder} has {name}, but not {module}.{missing[0]}, which belongs to it")
        return found

    def _check_base(self, theirs: str, base: Any, stored: Tensor | None) -> None:
        """PEFT also writes the weights under an embedding's adapter, in case its vocabulary has grown."""
        if stored is not None and (
            stored.shape != base.weight.shape or not torch.equal(stored.to(base.weight), base.weight)
        ):
            raise self._unfit(f"the weights of {theirs} that the adapter brings along are not the model's")

    def _check_complete(self, low_rank: dict[str, Any], saved: list[str]) -> None:
        """Every module that adapter_config.json names should have its update."""
        if not low_rank:
            raise UserError(f"{self.folder}: {WEIGHTS} holds no update of any module")
        for theirs, names in self.places.items():
            wanted = self.config.target_modules != "all-linear" and matches(self.config.target_modules, (theirs,))
            if wanted and is_kept(self.config, theirs, (theirs,)) and names[0] not in saved and theirs not in low_rank:
                raise self._unfit(f"there is no update for {theirs}, which target_modules names")

    def _unfit(self, fault: str) -> UserError:
        base = self.config.base_model_name_or_path
        made_for = f" The adapter was made for {base}." if base else ""
        return UserError(f"{self.folder} does not fit this {self.family.model_type} model: {fault}{made_for}")


def _open(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {WEIGHTS} (an adapter_model.bin is a pickle, and not read)") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is damaged or not a safetensors file: {error}") from None


# --- writing ----------------------------------------------------------------------------------------------


def _joined(
    updates: dict[str, tuple[Any, Any]], values: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[int, float]]:
    """The updates of the matrices that are one in the files as one update, and its rank and alpha.

    `updates`: module -> its adapter (or None) and its base.
    """
    there = {name: adapter for name, (adapter, _) in updates.items() if adapter is not None}
    one, config = next(iter(there.values())), next(iter(there.values())).config
    if config.use_dora and len(there) < len(updates):
        raise UserError(
            f"DoRA of {', '.join(there)} needs it of {', '.join(updates)} too: they are one matrix in the files"
        )
    magnitude = {"magnitude": torch.cat([values[f"{n}.magnitude"] for n in there])} if config.use_dora else {}
    As, Bs = [values[f"{n}.A"] for n in there], {n: values[f"{n}.B"] * (a.scale / one.scale) for n, a in there.items()}
    if len(there) == len(updates) and all(torch.equal(A, As[0]) for A in As):
        return {"A": As[0], "B": torch.cat(list(Bs.values())), **magnitude}, (one.rank, one.alpha)
    blocks = [Bs[n] if n in there else torch.zeros(base.out_features, 0) for n, (_, base) in updates.items()]
    rank = sum(a.rank for a in there.values())
    alpha = one.scale * (math.sqrt(rank) if config.use_rslora else rank)
    return {"A": torch.cat(As), "B": torch.block_diag(*blocks), **magnitude}, (rank, alpha)


def _spelt_alike(model: nn.Module) -> bool:
    """Whether transformers names modules as files do. In version 5 it does not for models that see images; an adapter
    of theirs names its targets in full, so that PEFT says what it does not find and does not pass over it.
    """
    return isinstance(model, (Decoder, Encoder, EncoderDecoder))


def _spell(config: LoraConfig, sizes: Sizes, saved: list[str], parameters: list[str]) -> dict[str, Any]:
    """adapter_config.json, modules by the names of the family's files: their ends where these pick out no others.

    `parameters`: all there are; none where ends will not do.
    """
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    modules = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
    ends = sorted({name.rpartition(".")[2] for name in sizes})
    short = {name for name in modules if matches(ends, (name,))} == sizes.keys()
    heads = [next((head for head in config.heads if head in name.split(".")), name) for name in saved]
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": ends if short else sorted(sizes),
        "modules_to_save": list(dict.fromkeys(heads)) or None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "init_lora_weights": config.init_lora_weights,
        "rank_pattern": {name: r for name, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in sizes.items() if a != alpha},
    }
