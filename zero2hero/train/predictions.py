"""predictions.json: what a finished model says of held-out pictures, for the report to show.

pictures    [{"png": base64, "question": ..., "truth": ..., "prediction": ...}, ...]
labels      their names, and
confusion   confusion[i][j] records of label i that were taken for label j
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zero2hero.data.worlds.raster import png
from zero2hero.io import atomic_write

FILE = "predictions.json"
SHOWN = 36  # pictures, half of them mistakes where there are so many


def choose(right: Sequence[bool]) -> list[int]:
    """The records to show: the first mistakes and the first that are right."""
    wrong = [i for i, good in enumerate(right) if not good][: SHOWN // 2]
    return wrong + [i for i, good in enumerate(right) if good][: SHOWN - len(wrong)]


def picture(pixels_CHW: np.ndarray, truth: str, prediction: str, question: str = "") -> dict[str, str]:
    """One entry; pixels are uint8."""
    planes = pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0)
    return {"png": base64.b64encode(png(planes)).decode(), "question": question, "truth": truth,
            "prediction": prediction}  # fmt: skip


def confusion(truth: Sequence[int], predicted: Sequence[int], labels: int) -> list[list[int]]:
    """How many of each label (rows) were taken for each label (columns)."""
    counts = np.zeros((labels, labels), dtype=int)
    np.add.at(counts, (np.asarray(truth), np.asarray(predicted)), 1)
    return counts.tolist()


def write(directory: str | Path, **content: Any) -> None:
    atomic_write(Path(directory) / FILE, json.dumps(content) + "\n")
