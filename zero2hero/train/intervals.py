"""How sure a measured share is."""

from __future__ import annotations

import math


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` independent cases (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))
