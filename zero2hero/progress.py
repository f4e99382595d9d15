"""What a person sees while something long runs: a bar in a terminal, a plain line now and then elsewhere.

A terminal gets one line that is redrawn in place and fits in 80 columns:

    step 1200/5000 ━━━━━━━━━━━━━━ loss 1.8423  41.3k tok/s  62% of peak  0:48 < 2:31

(elapsed < still to go). A pipe, a log file or CI gets the same as text: the first update, then one about
every ten seconds, and the last. Drawing happens a few times a second, whatever the number of updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

LINE_SECONDS = 10.0  # between plain lines
DRAW_SECONDS = 0.2  # between redraws of the bar
MIN_BAR = 10  # columns; in a narrow terminal the least important numbers give way to it

_CONTROL = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}

T = TypeVar("T")


class TrainingProgress:
    """The display of one training run; use it as a context manager or call `close`.

    enabled: None shows a bar in a terminal and lines elsewhere, True a bar in any case, False nothing at all
    (every rank of a distributed run but the first).
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self._display = _Display("step", total_steps, start_step, enabled, console)

    def update(
        self,
        step: int,
        loss: float | None = None,
        per_second: float | None = None,
        peak_share: float | None = None,
        items: str = "tok",
    ) -> None:
        """`step` steps are done, at `per_second` of `items`.

        peak_share: of the machine's measured matmul peak, 0 to 1.
        """
        parts = []
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if per_second is not None:
            few = per_second < 100 and items != "tok"
            parts.append(f"{per_second:.3g} {items}/s" if few else f"{human_count(per_second)} {items}/s")
        if peak_share is not None:
            parts.append(f"{peak_share:.0%} of peak")
        self._display.update(step, parts)

    def print(self, text: str) -> None:
        """Write text (a sample, an evaluation) above the bar, exactly as it is."""
        self._display.print(text)

    def close(self) -> None:
        self._display.close()

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(
    iterable: Iterable[T], description: str, total: int | None = None, enabled: bool | None = None
) -> Iterator[T]:
    """Iterate and show how far it is: `for text in track(texts, "tokenizing"): ...`."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    display = _Display(description, total, 0, enabled, None)
    try:
        for done, item in enumerate(iterable, start=1):
            yield item
            display.update(done, [])
    finally:
        display.close()


def visible(text: str) -> str:
    """Text without control characters but newline and tab: a model may write escape sequences, and a
    terminal would obey them."""
    return text.translate(_CONTROL)


def human_count(number: float) -> str:
    """Three figures and a suffix: 853, 41.3k, 12.6M, 7.24B."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:  # what would round to 1000 of the unit below
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.0f}"


def human_bytes(count: float) -> str:
    """1.4 GiB, 812 MiB, 96 KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.{1 if count < 100 * size else 0}f} {unit}"
    return f"{count / 1024:.0f} KiB"


def clock(seconds: float) -> str:
    """0:48, 2:31, 1:02:48."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Display:
    """A bar or lines for work of `total` parts (None: not known), `start` of which were done before."""

    def __init__(self, what: str, total: int | None, start: int, enabled: bool | None, console: Console | None) -> None:
        self.console = console or Console()
        self.what, self.total, self.start, self.done = what, total, start, start
        self.parts: list[str] = []
        self.began, self.drawn = time.monotonic(), -math.inf
        self.waits = False  # an update has not been drawn yet
        self.silent = enabled is False
        self.bar: Progress | None = None
        if enabled or (enabled is None and self.console.is_terminal and not self.console.is_dumb_terminal):
            one_line = Column(no_wrap=True)
            self.bar = Progress(
                TextColumn("{task.description}", markup=False, table_column=one_line),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=MIN_BAR)),
                TextColumn("{task.fields[status]}", markup=False, table_column=one_line),
                console=self.console,
                expand=True,
                auto_refresh=False,
            )
            self.task = self.bar.add_task(what, total=total, completed=start, status="")
            self.bar.start()
            self.draw()

    def update(self, done: int, parts: list[str]) -> None:
        self.done, self.parts, self.waits = done, parts, True
        if time.monotonic() - self.drawn >= (DRAW_SECONDS if self.bar else LINE_SECONDS):
            self.draw()

    def draw(self) -> None:
        self.drawn, self.waits = time.monotonic(), False
        elapsed = self.drawn - self.began
        times = clock(elapsed)
        if self.total is not None and self.done > self.start:
            times += f" < {clock(elapsed * (self.total - self.done) / (self.done - self.start))}"
        counted = f"{self.what} {self.done}" + ("" if self.total is None else f"/{self.total}")
        parts = [*self.parts, times]
        if self.bar:
            room = self.console.width - len(counted) - MIN_BAR - 2
            while len(parts) > 2 and len("  ".join(parts)) > room:
                del parts[-2]  # the share of peak first, then the speed; loss and time stay
            status = "  ".join(parts)
            self.bar.update(self.task, completed=self.done, description=counted, status=status)
            self.bar.refresh()
        elif not self.silent:
            self.print("  ".join([counted, *parts]))

    def print(self, text: str) -> None:
        if not self.silent:
            encoding = self.console.encoding or "utf-8"
            shown = visible(text).encode(encoding, "replace").decode(encoding)
            wrap_words = self.bar is not None  # a log file keeps long lines whole
            self.console.print(shown, markup=False, highlight=False, emoji=False, soft_wrap=not wrap_words)

    def close(self) -> None:
        if self.waits:
            self.draw()
        if self.bar:
            self.bar.stop()
