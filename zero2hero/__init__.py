"""zero2hero: from the first neural network to an aligned, deployed language model.

    import zero2hero as z2h
    lm = z2h.load("runs/quickstart")
    lm.generate("Once upon a time", max_new_tokens=64, temperature=0.8)

Names are resolved on first use, so that `import zero2hero` itself stays instant and imports no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A thread of torch's that waits for the others spins for a moment (some 0.3 ms), then gives its core away. By default
# it spins until its time slice ends when another program holds the core it waits for: a busy machine then makes a step
# ten times slower. Read by the OpenMP library when torch is imported; yours to set otherwise.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

# public name -> the module that defines it
_PUBLIC = {
    "load": "zero2hero.language_model",
    "save": "zero2hero.language_model",
    "pipeline": "zero2hero.pipelines",
    "LanguageModel": "zero2hero.language_model",
    "UserError": "zero2hero.errors",
}

__all__ = ["LanguageModel", "UserError", "__version__", "load", "pipeline", "save"]

if TYPE_CHECKING:
    from zero2hero.errors import UserError
    from zero2hero.language_model import LanguageModel, load, save
    from zero2hero.pipelines import pipeline


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'zero2hero' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
