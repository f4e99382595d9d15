"""What the server counts, in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zero2hero.generate.engine import Event

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
_GAUGES = ("running", "waiting", "cached_tokens")  # of the engine's counters; the others only rise


class Histogram:
    """How many observations fell below each bound."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(_BOUNDS) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(_BOUNDS, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        total, lines = 0, [f"# TYPE {name} histogram"]
        for bound, count in zip((*_BOUNDS, "+Inf"), self.counts):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum}", f"{name}_count {total}"]


class Metrics:
    """Requests by path and status, the time to the first token of a text and between its tokens."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token, self.between_tokens = Histogram(), Histogram()

    def answered(self, path: str, status: int) -> None:
        self.requests[path, status] += 1

    def wrote(self, event: Event, last: float, began: float) -> None:
        """An event of a text whose request came at `began`, and whose last event at `last` (`began`: none so far)."""
        if event.token_ids:
            histogram = self.first_token if last == began else self.between_tokens
            histogram.observe(time.monotonic() - last)

    def text(self, engine: Mapping[str, int]) -> str:
        lines = ["# TYPE zero2hero_requests_total counter"]
        lines += [
            f'zero2hero_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        for name, value in engine.items():
            kind, full = ("gauge", name) if name in _GAUGES else ("counter", f"{name}_total")
            lines += [f"# TYPE zero2hero_{full} {kind}", f"zero2hero_{full} {value}"]
        lines += self.first_token.lines("zero2hero_time_to_first_token_seconds")
        lines += self.between_tokens.lines("zero2hero_time_between_tokens_seconds")
        return "\n".join(lines) + "\n"
