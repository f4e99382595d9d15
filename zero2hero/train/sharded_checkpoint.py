"""Checkpoints of a divided model: every rank writes its parts, and any number of ranks reads the parts that it needs.

torch.distributed.checkpoint does it, with its storage of Hugging Face safetensors: each file's header says where in the
whole its tensors lie, so nothing else has to be kept, and nothing is pickled. In a checkpoint's folder `model/` and
`optimizer/` then stand in the place of `model.safetensors` and `optimizer.safetensors`; the rest is the same. Either
kind is read here: by one process, which wants whole tensors, or by ranks that want their parts.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zero2hero.train.sharding import as_whole, whole_shape


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, DTensors among them, into `folder`. Every rank must call it, with the same names."""
    import torch.distributed.checkpoint as dcp

    with _no_warnings():
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read(folder: Path, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in `folder`: whole, or this rank's part of those that are divided like one of `parts`, see `like`."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    wanted: dict[str, Any] = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        size, dtype = found.size, found.properties.dtype  # type: ignore[union-attr]
        p = like(name, size, parts)
        empty = torch.empty(size, dtype=dtype) if p is None else torch.empty_like(p, dtype=dtype, requires_grad=False)
        wanted[name] = empty if p is None else as_whole(p, empty)
    with _no_warnings():
        dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    return {name: value.to_local() if hasattr(value, "placements") else value for name, value in wanted.items()}


def like(name: str, size: torch.Size, parts: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter that a tensor of a checkpoint is divided like: its name ends in the parameter's (an average of it),
    or begins with where its moments stand, and it is as large. None: it is not divided."""
    words = name.split(".")
    for key in [*(".".join(words[i:]) for i in range(len(words))), ".".join(words[:-1])]:
        if key in parts and hasattr(parts[key], "whole") and whole_shape(parts[key]) == size:
            return parts[key]
    return None


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Of a storage that torch still calls new, and of a process that reads alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
