"""Fine-tuning with adapters: functions model -> model, applied from outside.

model = add_lora(model, LoraConfig(r=16, lora_alpha=32))     adapters.py, lora.py, targets.py
save_adapter(model, "runs/mine")                             interchange.py: PEFT's files
model = load_adapter(model, "runs/mine")
model = merge(model)                                         merging.py
model = quantize_nf4(model)                                  quantize.py: the base below adapters in four bits
model = add_prompt(model), add_prefix(model)                 prompt_tuning.py, prefix_tuning.py
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it
_PUBLIC = {
    "LoraConfig": "config",
    "adapted_modules": "adapters",
    "adapter_names": "adapters",
    "add_lora": "adapters",
    "add_prefix": "prefix_tuning",
    "add_prompt": "prompt_tuning",
    "base_folder": "interchange",
    "dequantize": "quantize",
    "disable_adapter": "adapters",
    "is_adapter": "interchange",
    "load_adapter": "interchange",
    "load_prefix": "prefix_tuning",
    "load_prompt": "prompt_tuning",
    "merge": "merging",
    "quantize_int8": "quantize",
    "quantize_nf4": "quantize",
    "save_adapter": "interchange",
    "save_virtual_tokens": "prompt_tuning",
    "set_adapter": "adapters",
}

__all__ = [
    "LoraConfig",
    "adapted_modules",
    "adapter_names",
    "add_lora",
    "add_prefix",
    "add_prompt",
    "base_folder",
    "dequantize",
    "disable_adapter",
    "is_adapter",
    "load_adapter",
    "load_prefix",
    "load_prompt",
    "merge",
    "quantize_int8",
    "quantize_nf4",
    "save_adapter",
    "save_virtual_tokens",
    "set_adapter",
]

if TYPE_CHECKING:
    from zero2hero.tune.adapters import adapted_modules, adapter_names, add_lora, disable_adapter, set_adapter
    from zero2hero.tune.config import LoraConfig
    from zero2hero.tune.interchange import base_folder, is_adapter, load_adapter, save_adapter
    from zero2hero.tune.merging import merge
    from zero2hero.tune.prefix_tuning import add_prefix, load_prefix
    from zero2hero.tune.prompt_tuning import add_prompt, load_prompt, save_virtual_tokens
    from zero2hero.tune.quantize import dequantize, quantize_int8, quantize_nf4


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zero2hero.tune.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'zero2hero.tune' has no attribute {name!r}")
