"""Pictures without a library: shapes by their distance, and PNG files.

A shape is a function from a point to its distance from the shape's edge, negative inside (Hart 1996, "Sphere tracing").
What is inside is painted; where the edge runs through a pixel, the pixel is painted in part, and no stairs show.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Pixels = NDArray[np.uint8]  # [height, width, 3], or [height, width] in grey


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1.0


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(abs(x), abs(y)) - 0.85


def _triangle(x: Floats, y: Floats) -> Floats:
    """Point up."""
    return np.maximum(0.87 * abs(x) - 0.5 * y - 0.5, y - 0.85)


def _cross(x: Floats, y: Floats) -> Floats:
    long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(long - 1.0, short - 0.33)


def _ring(x: Floats, y: Floats) -> Floats:
    return abs(np.hypot(x, y) - 0.72) - 0.26


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


def paint(canvas: Floats, shape: str, colour: tuple[float, ...], x: float, y: float, radius: float) -> None:
    """Paint a shape on a canvas [S, S, 3] of values in 0 ... 1; place and radius in pixels."""
    rows, columns = np.mgrid[0 : canvas.shape[0], 0 : canvas.shape[1]].astype(np.float32) + 0.5
    distance = SHAPES[shape]((columns - x) / radius, (rows - y) / radius) * radius
    share = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    canvas += share * (np.asarray(colour, np.float32) - canvas)


def png(pixels: Pixels) -> bytes:
    """The pixels as a PNG file (ISO/IEC 15948): each row behind a 0, for "as it is"; all of it compressed."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else 2
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
