"""`zero2hero merge ADAPTER`: an adapter and its base as one ordinary model directory."""

from __future__ import annotations

import warnings
from pathlib import Path

from zero2hero.fetch import find_folder
from zero2hero.language_model import torch_dtype
from zero2hero.models.checkpoint import from_pretrained, save_pretrained
from zero2hero.models.convert import copy_beside
from zero2hero.options import MergeConfig
from zero2hero.tune.interchange import CONFIG, base_folder, load_adapter
from zero2hero.tune.merging import merge


def merge_adapter(config: MergeConfig) -> None:
    """Write the merged model, and what lies beside base and adapter (tokenizer, chat template).

    Raises:
        UserError: no adapter there, a base that cannot be found or that it does not fit, or a folder that cannot be
            written.
    """
    folder = find_folder(config.adapter, needed=CONFIG)
    base = base_folder(folder, config.base_model)
    model = load_adapter(from_pretrained(base, dtype=torch_dtype(config.dtype)), folder)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        save_pretrained(merge(model), config.output_dir)
    for source in (base, folder):
        copy_beside(source, Path(config.output_dir))
    for warning in heard:
        print(f"note: {warning.message}")
    print(f"{config.adapter} + {base} -> {config.output_dir}")
