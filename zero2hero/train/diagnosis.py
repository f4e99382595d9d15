"""What looks wrong with a run, and what to try: a judgement of metrics.jsonl, in words.

Each check is a pure function of the run's rows (see `tracking`) and its config.json, so that any run can be judged at
any time, also long after. It returns a `Finding` with its evidence, or None. What is measured for it is in `vitals.py`.

Thresholds are meant to pass every healthy run and to catch what is plainly ill; between the two a person looks at the
curves. Sources: Karpathy 2019, "A Recipe for Training Neural Networks" (karpathy.github.io/2019/04/25/recipe) and 2015,
cs231n.github.io/neural-networks-3 (loss at the start, update ratio, gap between train and validation); Goodfellow,
Bengio & Courville 2016, "Deep Learning", chapter 11 (deeplearningbook.org) and section 7.8 (early stopping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zero2hero.train.tracking import METRICS_FILE, read_metrics, series
from zero2hero.train.watch import Watcher

if TYPE_CHECKING:
    from zero2hero.train.loop import Trainer

Rows = Sequence[Mapping[str, Any]]
Config = Mapping[str, Any]

MIN_ROWS = 8  # log lines before a course is judged
HIGH_RATIO, LOW_RATIO = 0.5, 1e-4  # update over weight, at the full learning rate
DEAD_SHARE = 0.3  # of a layer's units
WAITING_SHARE = 0.25  # of the time of a step
SPIKE_NATS, SPIKE_SPREADS, SPIKE_HISTORY = 0.5, 10.0, 16
TOO_HIGH = "learning rate too high"
CONSEQUENCES = ("loss spike", "over-fitting", "dead units")  # of that; they say nothing of their own then


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong."""

    name: str  # a few words: "over-fitting"
    what: str  # a sentence
    evidence: str  # the numbers and the steps
    advice: str  # what to try, with options in `backquotes`
    serious: bool = False  # worth stopping a run for

    def __str__(self) -> str:
        return f"{self.name}: {self.what} {self.evidence} Try: {self.advice}".replace("`", "")


def diagnose(rows: Rows, config: Config | None = None) -> list[Finding]:
    """Every finding, the serious ones first. `config`: what config.json holds; `vocab_size` is read from it."""
    found = [finding for check in CHECKS.values() if (finding := check(rows, config or {}))]
    if any(finding.name == TOO_HIGH for finding in found):
        found = [finding for finding in found if finding.name not in CONSEQUENCES]
    return sorted(found, key=lambda finding: not finding.serious)


# --- the course of the training loss: one finding at most, the most specific ------------------------------------


def learning(rows: Rows, config: Config) -> Finding | None:
    """A learning rate that is too high or too low, a loss that stands still, a loss that counting would reach."""
    steps, loss = series(rows, "loss")
    if len(loss) < MIN_ROWS:
        return None
    for check in (too_high, too_low, stands_still, above_ngram):
        if finding := check(Course.of(rows, config)):
            return finding
    return None


@dataclass(frozen=True)
class Course:
    """A training loss from its first line to its last, and what can be expected of it."""

    steps: NDArray[np.float64]
    loss: NDArray[np.float64]  # medians of three log lines: a single bad one does not count
    ratio: float  # median update ratio of the matrices, at the full learning rate; NaN when not measured
    rate: float  # the full learning rate
    gradient: float  # median gradient norm of the second half; NaN when not measured
    held_out: float  # the last evaluation; NaN without
    uniform: float  # ln V; NaN when unknown
    ngram: float  # NaN when unknown
    order: str

    @classmethod
    def of(cls, rows: Rows, config: Config) -> Course:
        steps, loss = series(rows, "loss")
        _, rates = series(rows, "learning_rate")
        _, norms = series(rows, "grad_norm")
        rate = float(rates.max()) if len(rates) else math.nan
        full = [row for row in rows if row.get("learning_rate", 0) >= 0.9 * rate]
        ratios = [series(full, f"update_ratio/{kind}")[1] for kind in ("attention", "feedforward", "matrices")]
        vocabulary = config.get("vocab_size")
        return cls(
            steps=steps,
            loss=medians(loss),
            ratio=_median(np.concatenate(ratios)),
            rate=rate,
            gradient=_median(norms[len(norms) // 2 :]),
            held_out=_last(rows, "eval_loss"),
            uniform=math.log(vocabulary) if vocabulary else math.nan,
            ngram=_last(rows, "ngram_nll"),
            order=f"{_last(rows, 'ngram_order'):.0f}-gram",
        )

    @property
    def end(self) -> float:
        """The loss of the last eighth of the run."""
        return float(np.median(self.loss[-max(2, len(self.loss) // 8) :]))

    @property
    def poor(self) -> bool:
        """Whether the loss is no place to stay: above that of counting, or near that of guessing."""
        known = self.ngram if math.isfinite(self.ngram) else 0.75 * self.uniform
        return self.end > (known if math.isfinite(known) else 0.8 * self.loss[0])

    def fall(self, share: float) -> float:
        """By how much the loss fell over the last `share` of the run; what noise makes of it is small."""
        tail = self.loss[-max(4, round(share * len(self.loss))) :]
        half = len(tail) // 2
        return float(np.median(tail[:half]) - np.median(tail[half:]))


def too_high(c: Course) -> Finding | None:
    """The loss went up and stayed up, or each step rewrites the weights and nothing is learned."""
    low = int(np.argmin(c.loss))
    rise = c.end - c.loss[low]
    rewrites = c.ratio > HIGH_RATIO and c.poor and c.fall(0.75) < 0.05 * c.end
    worse = c.end > c.uniform + 0.1 and c.fall(0.5) < 0.05 * c.end and not c.ratio < LOW_RATIO
    if not (rise > max(0.3, 0.1 * c.loss[low]) or rewrites or worse):
        return None
    low = low if rise > 0.1 else 0
    evidence = f"Loss {c.loss[low]:.3f} at step {c.steps[low]:.0f}, {c.end:.3f} at step {c.steps[-1]:.0f}"
    evidence += f" (guessing uniformly: {c.uniform:.2f})" if math.isfinite(c.uniform) else ""
    return Finding(
        TOO_HIGH,
        "The loss rose and did not come back." if rise > 0.1 else "Each step overshoots, and nothing is learned.",
        evidence + _ratio_words(c) + ".",
        f"`--train.learning_rate {c.rate / 10:.2g}`, a longer warm-up (`--train.warmup_steps 0.1`), "
        "`--train.max_grad_norm 0.5`; if the loss was too high from the start, look at the targets in the data",
        serious=True,
    )


def too_low(c: Course) -> Finding | None:
    """Updates are tiny beside the weights, and the loss has hardly moved."""
    if not (c.ratio < LOW_RATIO and c.poor):
        return None
    return Finding(
        "learning rate too low",
        "The weights hardly move, and so does the loss.",
        f"Loss {c.loss[0]:.3f} at step {c.steps[0]:.0f}, {c.end:.3f} at step {c.steps[-1]:.0f}{_ratio_words(c)}.",
        f"`--train.learning_rate {c.rate * 10:.2g}` or more",
    )


def stands_still(c: Course) -> Finding | None:
    """The loss no longer falls, at a height that a model which learns leaves behind."""
    if not (c.poor and c.fall(0.5) < 0.01 * c.end):
        return None
    references = {f"a {c.order} model reaches": c.ngram, "guessing uniformly costs": c.uniform}
    words = "".join(f"; {name} {value:.3f}" for name, value in references.items() if math.isfinite(value))
    return Finding(
        "loss stands still",
        "The loss stopped falling long before it is good.",
        f"In the second half of the run it fell by {max(0.0, c.fall(0.5)):.4f}, to {c.end:.3f}"
        f"{words}; gradient norm {c.gradient:.2g}{_ratio_words(c)}.",
        f"another learning rate (`--train.learning_rate {c.rate * 3:.2g}` and `{c.rate / 3:.2g}`), a larger "
        "`--model.hidden_size`, and a look at the data, whether the next token can be told from what comes before it",
    )


def above_ngram(c: Course) -> Finding | None:
    """The loss still falls, but the run ends where counting would have reached it."""
    reached = c.held_out if math.isfinite(c.held_out) else c.end
    if not reached > c.ngram:
        return None
    return Finding(
        "not yet better than counting",
        f"A {c.order} model of the same text is still better than this one.",
        f"Loss {reached:.3f}, {c.order} {c.ngram:.3f}; the loss is still falling.",
        f"more steps (`--train.max_steps {2 * c.steps[-1]:.0f}`) or a higher `--train.learning_rate`",
    )


def _ratio_words(c: Course) -> str:
    return f"; update / weight {c.ratio:.1g} (with Adam about 1e-3 is usual)" if math.isfinite(c.ratio) else ""


# --- everything else --------------------------------------------------------------------------------------------


def spikes(rows: Rows, config: Config) -> Finding | None:
    """Single steps whose loss stands out from those before, and from which the run recovered."""
    steps, worst = series(rows, "loss_max")
    _, loss = series(rows, "loss")
    exact = [row.get("loss_max_step", row["step"]) for row in rows if math.isfinite(row.get("loss_max", math.nan))]
    found = []
    for i in range(MIN_ROWS // 2, len(worst)):
        history = worst[max(0, i - SPIKE_HISTORY) : i]
        usual = float(np.median(history))
        spread = 1.5 * float(np.median(np.abs(history - usual)))
        excess = worst[i] - usual
        recovers = i + 3 > len(worst) or loss[i + 1 :].min() < usual + 0.25 * excess
        if excess > max(SPIKE_NATS, SPIKE_SPREADS * spread) and recovers:
            found.append((excess, i, usual))
    if not found:
        return None
    _, i, usual = max(found)
    norm = {row["step"]: row["grad_norm_max"] for row in rows if "grad_norm_max" in row}.get(int(steps[i]))
    return Finding(
        "loss spike",
        f"The loss of {'a single step' if len(found) == 1 else f'{len(found)} steps'} stands far out.",
        f"Step {exact[i]:.0f}: loss {worst[i]:.3f} where {usual:.3f} was usual"
        + (f", gradient norm up to {norm:.3g}" if norm is not None else "") + ".",
        "a look at that step's records: are they broken, or in another language or format? If the data is sound, "
        "`--train.max_grad_norm 0.5`, a longer `--train.warmup_steps`, or a lower `--train.learning_rate`",
    )  # fmt: skip


def overfitting(rows: Rows, config: Config) -> Finding | None:
    """The held-out loss has turned up while the training loss goes on falling."""
    at, held_out = series(rows, "eval_loss")
    steps, loss = series(rows, "loss")
    if len(held_out) < 3 or len(loss) < 3:
        return None
    train = np.interp(at, steps, medians(loss))
    best = int(np.argmin(held_out))
    rise = held_out[-2:].min() - held_out[best]  # twice worse than the best: once is noise
    gap, gap_then = held_out[-1] - train[-1], held_out[best] - train[best]
    falls = train[-1] <= train[best] and train[-1] <= 1.05 * loss.min()  # it does not after divergence
    if rise < max(0.02, 0.01 * held_out[best]) or gap < gap_then + 0.02 or not falls:
        return None
    return Finding(
        "over-fitting",
        "The model learns the training text by heart: on text it has not seen it gets worse.",
        f"Held-out loss {held_out[best]:.3f} at step {at[best]:.0f}, {held_out[-1]:.3f} at step {at[-1]:.0f}, "
        f"while the training loss fell from {train[best]:.3f} to {train[-1]:.3f}; the gap grew from "
        f"{gap_then:.3f} to {gap:.3f}.",
        "`--train.early_stopping_patience 3` keeps the best weights; more text helps most; then "
        "`--model.dropout 0.1`, more `--train.weight_decay`, a smaller `--model.hidden_size`",
        serious=True,
    )


def dead_units(rows: Rows, config: Config) -> Finding | None:
    """Feed-forward units that no token of a whole step used, time after time."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("dead_units/"))
    shares = {name: series(rows, name)[1] for name in names}
    late = {name: float(np.median(v[-max(3, len(v) // 3) :])) for name, v in shares.items() if len(v) >= 3}
    ill = {name.removeprefix("dead_units/"): share for name, share in late.items() if share > DEAD_SHARE}
    if not ill:
        return None
    worst = max(ill, key=ill.__getitem__)
    return Finding(
        "dead units",
        f"Many feed-forward units do nothing, in {len(ill)} of {len(late)} layers.",
        f"Worst in {worst}: {ill[worst]:.0%} of its units were used by no token of a step.",
        "a lower `--train.learning_rate` or a longer `--train.warmup_steps` (large early steps kill units); "
        "`--model.feedforward swiglu` has no region without gradient; a smaller `--model.intermediate_size`",
    )


def slow_data(rows: Rows, config: Config) -> Finding | None:
    """The device waits for its data."""
    _, shares = series(rows, "data_share")
    if len(shares) < MIN_ROWS or (share := float(np.median(shares[len(shares) // 2 :]))) < WAITING_SHARE:
        return None
    return Finding(
        "slow data",
        "A good part of each step is spent waiting for its batch.",
        f"{share:.0%} of the time since step {rows[len(rows) // 2]['step']}.",
        "data on a local disk, Parquet rather than compressed text, fewer other programs; a larger model hides it",
    )


CHECKS: dict[str, Callable[[Rows, Config], Finding | None]] = {
    "the course of the training loss": learning,
    "loss spikes": spikes,
    "over-fitting": overfitting,
    "dead units": dead_units,
    "waiting for data": slow_data,
}


def verdict(findings: Sequence[Finding]) -> str:
    """What a terminal shows at the end of a run."""
    if not findings:
        return f"diagnosis: nothing looks wrong (checked: {', '.join(CHECKS)})"
    return "\n".join(f"diagnosis: {finding}" for finding in findings)


class Diagnosis(Watcher):
    """Judges the run as it trains and tells each serious finding once.

    It reads what was logged, again whenever a tenth was added: the cost stays a small share of the logging's.
    """

    name = "diagnosis"

    def __init__(self, output_dir: Path, config: Config, tell: Callable[[str], None]) -> None:
        self.output_dir, self.config, self.tell = output_dir, config, tell
        self.told: set[str] = set()
        self.next = 0

    def after_update(self, trainer: Trainer) -> None:
        step = trainer.state.step
        if step < self.next or trainer.tracker is None or not (self.output_dir / METRICS_FILE).exists():
            return
        self.next = step + max(MIN_ROWS // 2 * trainer.config.logging_steps, step // 10)
        for finding in diagnose(read_metrics(self.output_dir), self.config):
            if finding.serious and finding.name not in self.told:
                self.told.add(finding.name)
                self.tell(f"step {step}: {finding}")


def medians(values: NDArray[np.float64], width: int = 3) -> NDArray[np.float64]:
    """The running median of `width` values, the ends repeated."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _last(rows: Rows, name: str) -> float:
    _, values = series(rows, name)
    return float(values[-1]) if len(values) else math.nan
