"""The curves of a run: functions from its metrics to a matplotlib figure, one per picture.

`FIGURES` names them all; a stage with curves of its own adds a function there. matplotlib is imported late,
without a window system and without its global state (`Figure`, not pyplot).

Losses are in nats per token, unless the record names other units. Two dashed lines say what they mean: ln V is the
loss of guessing all tokens with equal probability, the n-gram line that of counting on the same text. Colours are those
of Okabe & Ito (2008), told apart by people with any colour vision; a line is labelled where it ends, not in a legend.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zero2hero.progress import human_count
from zero2hero.train.tracking import Units, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Draw = Callable[["Rows", Mapping[str, Any], "Theme"], "Figure | None"]
Floats = NDArray[np.float64]

FONTS = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")  # first one found
LABEL_GAP = 0.062  # between the centres of two labels, of the height of the axes


@dataclass(frozen=True)
class Theme:
    background: str
    ink: str  # text
    quiet: str  # reference lines, axes
    grid: str
    train: str
    evaluation: str
    ngram: str


LIGHT = Theme("#ffffff", "#1f2430", "#6b7280", "#e5e7eb", train="#0072b2", evaluation="#d55e00", ngram="#00805c")
DARK = Theme("#171a21", "#e4e7ec", "#8d96a5", "#2b303a", train="#56b4e9", evaluation="#e69f00", ngram="#2fc79b")


def loss_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """Training and evaluation loss over tokens (images, pairs) seen, the learning rate below; None without any loss."""
    train_steps, train = series(rows, "loss")
    eval_steps, evaluation = series(rows, "eval_loss")
    rate_steps, rate = series(rows, "learning_rate")
    if not len(train) and not len(evaluation):
        return None
    from matplotlib.figure import Figure

    units = Units.of(rows)
    items_per_step = _items_per_step(rows, units)
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    heights = [6, 1] if len(rate) else [1]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    axes, bottom = panels[0], panels[-1]
    labels: list[tuple[float, str, str]] = []  # (loss, text, colour), at the right edge

    for loss, text in _references(rows, config, max([*train[:1], *evaluation[:1]])):
        colour = theme.ngram if "gram" in text else theme.quiet
        axes.axhline(loss, color=colour, linewidth=1.2, linestyle=(0, (5, 4)))
        labels.append((loss, text, colour))
    if len(train):
        smooth = smoothed(train)
        axes.plot(train_steps * items_per_step, train, color=theme.train, alpha=0.3, linewidth=0.8)
        axes.plot(train_steps * items_per_step, smooth, color=theme.train, linewidth=2)
        labels.append((float(smooth[-1]), f"training  {smooth[-1]:#.4g}", theme.train))
    if len(evaluation):
        eval_x = eval_steps * items_per_step
        axes.plot(eval_x, evaluation, color=theme.evaluation, linewidth=1, alpha=0.5)
        axes.plot(eval_x, evaluation, "o", color=theme.evaluation, markeredgecolor=theme.background, clip_on=False)
        labels.append((float(evaluation[-1]), f"held out  {evaluation[-1]:#.4g}", theme.evaluation))

    last = max([*train_steps, *eval_steps, 1]) * items_per_step
    axes.set_xlim(0, last)
    _scale_loss(axes, train, [*evaluation, *(loss for loss, _, _ in labels)])
    _label_ends(axes, labels)
    _title(axes, f"Loss, {units.of_loss}", theme)
    if len(rate):
        bottom.plot(rate_steps * items_per_step, rate, color=theme.quiet, linewidth=1.4)
        _title(bottom, "Learning rate", theme)
        bottom.set_ylim(bottom=0)
        bottom.locator_params(axis="y", nbins=2)
        bottom.yaxis.set_major_formatter("{x:g}")
    bottom.set_xlabel(f"{units.item}s seen" if items_per_step != 1 else "steps")
    bottom.locator_params(axis="x", integer=True)
    bottom.xaxis.set_major_formatter(lambda value, _: human_count(value))
    for panel in panels:
        _dress(panel, theme)
    if items_per_step != 1:
        steps = axes.secondary_xaxis(
            "top", functions=(lambda items: items / items_per_step, lambda steps: steps * items_per_step)
        )
        steps.set_xlabel("steps", color=theme.quiet, fontsize=9)
        steps.tick_params(colors=theme.quiet, labelsize=9, length=3)
        steps.spines["top"].set_visible(False)
    return figure


def gradient_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """The largest gradient norm between two log lines, before clipping."""
    curves = {"": series(rows, "grad_norm_max")}
    return small_figure("Gradient norm", curves, (theme.train,), theme)


def update_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """Size of the updates over size of the weights, for each kind of matrix; dashed: what is usual with Adam."""
    kinds = ("attention", "feedforward", "embeddings", "head", "matrices")
    curves = {kind: series(rows, f"update_ratio/{kind}") for kind in kinds}
    colours = (theme.train, theme.evaluation, theme.ngram, theme.quiet, theme.ink)
    return small_figure("Update / weight", curves, colours, theme, line=1e-3)


def gap_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """Training against held-out loss: where they part, the model learns by heart."""
    curves = {"training": series(rows, "loss"), "held out": series(rows, "eval_loss")}
    steps, loss = curves["training"]
    curves["training"] = (steps, smoothed(loss))
    return small_figure("Training and held-out loss", curves, (theme.train, theme.evaluation), theme)


def scores_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """How much of what is held out the model gets right."""
    curves = {name: series(rows, f"eval_{name}") for name in ("exact_match", "accuracy")}
    curves |= {"preferred as people do": series(rows, "eval_rewards/accuracies")}
    curves |= {"win rate": series(rows, "eval_win_rate")}
    shown = {name.replace("_", " "): (steps, values) for name, (steps, values) in curves.items()}
    colours = (theme.evaluation, theme.train, theme.evaluation, theme.ngram)
    return small_figure("Held-out answers that are right", shown, colours, theme, shares=True)


def rewards_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """What the policy's log-probabilities say of held-out answers: how far those that people prefer are ahead."""
    curves = {name: series(rows, f"eval_rewards/{name}") for name in ("chosen", "rejected", "margins")}
    colours = (theme.train, theme.evaluation, theme.ngram)
    return small_figure("Rewards of held-out answers", curves, colours, theme, linear=True)


def distance_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """How far the policy has gone from what it was, in nats for each answer."""
    return small_figure("KL to the reference", {"": series(rows, "eval_kl")}, (theme.train,), theme, linear=True)


def reward_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """What a policy earns with its samples, and with its answers to held-out prompts."""
    curves = {"sampled": series(rows, "reward"), "held out": series(rows, "eval_reward")}
    steps, reward = curves["sampled"]
    curves["sampled"] = (steps, smoothed(reward))
    return small_figure("Reward", curves, (theme.train, theme.evaluation), theme, linear=True)


def entropy_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """How undecided a policy is at each token, and how far it has gone from its reference."""
    curves = {"entropy": series(rows, "entropy"), "KL": series(rows, "kl")}
    if not len(curves["entropy"][0]):
        return None
    return small_figure("Entropy and KL, nats per token", curves, (theme.train, theme.ngram), theme, linear=True)


def length_figure(rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """Tokens of the completions that a policy samples."""
    curves = {name: series(rows, f"completions/{name}_length") for name in ("mean", "max")}
    return small_figure("Length of completions, tokens", curves, (theme.train, theme.quiet), theme, linear=True)


def attempts_figure(found: Mapping[str, Any], rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """pass@k and maj@k over k, before and after, of what evaluate/pass_at_k.py found."""

    def curve(when: str, what: str) -> tuple[Floats, Floats]:
        shares = found[when][what]
        return np.array([float(k) for k in shares]), np.array(list(shares.values()))

    curves = {f"{name}@k {when}": curve(when, f"{name}_at") for when in ("before", "after") for name in ("pass", "maj")}
    colours = (theme.train, theme.ngram, theme.evaluation, theme.ink)
    return small_figure("Problems that k samples solve", curves, colours, theme, shares=True, over="k")


def reliability_figure(found: Mapping[str, Any], rows: Rows, config: Mapping[str, Any], theme: Theme) -> Figure | None:
    """How often a reward model is right where it is how sure (align/reward.py); dashed: as it should be."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    axes = figure.subplots()
    sure, right, count = np.array(found["calibration"], dtype=float).T
    axes.plot([0.5, 1], [0.5, 1], color=theme.quiet, linewidth=1, linestyle=(0, (5, 4)))
    axes.plot(sure, right, color=theme.train, linewidth=1, alpha=0.5)
    axes.scatter(sure, right, s=12 + 150 * count / count.sum(), color=theme.train, clip_on=False, zorder=3)
    axes.set(xlim=(0.5, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("how sure it is")
    _title(axes, "Held-out pairs that it orders rightly", theme)
    _dress(axes, theme)
    return figure


def overoptimization_figure(
    found: Mapping[str, Any], rows: Rows, config: Mapping[str, Any], theme: Theme
) -> Figure | None:
    """A proxy's reward and the true one over the square root of KL, as in Gao et al. 2022 (arXiv 2210.10760).

    `found` is what align/overoptimization.py writes. Solid: the policy that learned; dashed: best of n samples.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    axes = figure.subplots()
    labels: list[tuple[float, str, str]] = []
    for name, words, colour in (("proxy", "the proxy", theme.train), ("gold", "the truth", theme.evaluation)):
        kl = np.array([max(0.0, point["kl"]) for point in found["rl"]])
        reward, order = np.array([point[name] for point in found["rl"]]), np.argsort(kl)
        axes.plot(np.sqrt(kl), reward, ".", color=colour, alpha=0.4, markersize=5)
        axes.plot(np.sqrt(kl)[order], smoothed(reward[order], 0.04), color=colour, linewidth=2.2)
        labels.append((float(smoothed(reward[order], 0.04)[-1]), words, colour))
        best = found["best_of_n"]
        axes.plot([math.sqrt(p["kl"]) for p in best], [p[name] for p in best], color=colour, linestyle=(0, (3, 2)))
    peak = math.sqrt(max(0.0, found["peak"]["kl"]))
    axes.axvline(peak, color=theme.quiet, linewidth=1, linestyle=(0, (5, 4)))
    axes.axhline(0, color=theme.quiet, linewidth=0.8)
    top = max(p["kl"] for p in found["rl"])
    axes.set_xlim(0, math.sqrt(top))
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 1e9) if top < 12 * step)
    ticks = [0, *(step * k for k in (0.25, 1, 2, 4, 6, 8, 10, 12, 16) if step * k <= top)]
    axes.set_xticks([math.sqrt(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("KL from the reference, nats per completion (square root scale)")
    axes.annotate(
        f"the truth is best at {found['peak']['kl']:.1f} nats", (peak, 0.02), xycoords=("data", "axes fraction"),
        xytext=(6, 0), textcoords="offset points", color=theme.quiet, fontsize=9,
    )  # fmt: skip
    _label_ends(axes, labels)
    _title(axes, "Reward, in standard deviations of the reference's samples  (dashed: best of n)", theme)
    _dress(axes, theme)
    return figure


def small_figure(
    title: str,
    curves: Mapping[str, tuple[Floats, Floats]],
    colours: Sequence[str],
    theme: Theme,
    line: float | None = None,
    shares: bool = False,
    over: str = "steps",
    linear: bool = False,
) -> Figure | None:
    """Curves over steps, for a third of the page, labelled at their ends; `line` is dashed.

    The axis is logarithmic, but for `shares` and where it is to be `linear`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    axes = figure.subplots()
    labels: list[tuple[float, str, str]] = []
    for (name, (steps, values)), colour in zip(curves.items(), colours):
        steps, values = (steps, values) if shares or linear else (steps[values > 0], values[values > 0])
        if len(values):
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="." if len(values) < 3 else None)
            labels.append((float(values[-1]), name, colour))
    if not labels:
        return None
    if line:
        axes.axhline(line, color=theme.quiet, linewidth=1, linestyle=(0, (5, 4)))
    if shares:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter("{x:.0%}")
    elif not linear:
        axes.set_yscale("log")
        _log_ticks(axes)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True, nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlabel(over)
    _label_ends(axes, labels, gap=0.1)
    _title(axes, title, theme)
    _dress(axes, theme)
    return figure


# file name in plots/ (without .png) -> function of (metrics, config.json, theme)
FIGURES: dict[str, Draw] = {"loss": loss_figure}
SCORES: dict[str, Draw] = {
    "reward": reward_figure,
    "entropy_and_kl": entropy_figure,
    "completion_length": length_figure,
    "scores": scores_figure,
    "rewards": rewards_figure,
    "kl": distance_figure,
}
HEALTH: dict[str, Draw] = {
    "gradient_norm": gradient_figure,
    "update_ratio": update_figure,
    "held_out_gap": gap_figure,
}


def draw(
    rows: Rows,
    config: Mapping[str, Any],
    theme: Theme = LIGHT,
    figures: Mapping[str, Draw] | None = None,
) -> dict[str, bytes]:
    """Each of `figures` (by default `FIGURES`) that these metrics allow, as PNG.

    Raises `ImportError` when matplotlib is missing.
    """
    import matplotlib
    from matplotlib import font_manager

    found = set(font_manager.fontManager.get_font_names())
    style: Any = {
        "font.family": [name for name in FONTS if name in found][:1] or ["sans-serif"],
        "font.size": 10,
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "text.color": theme.ink,
        "axes.labelcolor": theme.quiet,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
    }
    images = {}
    with matplotlib.rc_context(style):
        for name, function in (FIGURES if figures is None else figures).items():
            figure = function(rows, config, theme)
            if figure is not None:
                stream = io.BytesIO()
                figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
                images[name] = stream.getvalue()
    return images


def smoothed(values: Floats, share: float = 0.02) -> Floats:
    """A moving average over `share` of the points to either side, over fewer near the start.

    The window is never wider to the left than to the right while it grows, so the steep first descent
    keeps its shape and the curve does not lag behind.
    """
    at = np.arange(len(values))
    reach = np.minimum(at, math.ceil(share * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = at - reach, np.minimum(at + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _items_per_step(rows: Rows, units: Units) -> float:
    """The scale of the x axis; 1 (the axis shows steps) when tokens, or what else there is, were not counted."""
    steps, items = series(rows, units.seen)
    return float(items[-1] / steps[-1]) if len(steps) and steps[-1] > 0 and items[-1] > 0 else 1.0


def _references(rows: Rows, config: Mapping[str, Any], first: float) -> list[tuple[float, str]]:
    """(loss, label) of the dashed lines. A run that starts far below ln V (`first`) is spared that line."""
    lines = []
    vocabulary = config.get("vocab_size")
    if vocabulary and first > 0.5 * math.log(vocabulary):
        lines.append((math.log(vocabulary), f"uniform guess  ln {vocabulary} = {math.log(vocabulary):.2f}"))
    _, ngram = series(rows, "ngram_nll")
    if len(ngram):
        _, order = series(rows, "ngram_order")
        name = f"{order[-1]:.0f}-gram" if len(order) else "n-gram"
        lines.append((float(ngram[-1]), f"{name}, same text  {ngram[-1]:#.4g}"))
    return lines


def _scale_loss(axes: Axes, train: Floats, must_show: Sequence[float]) -> None:
    """A logarithmic loss axis, for the slow end matters as much as the fast start.

    All that must be shown is, and the training loss but for a few spikes. Where losses are not positive (an
    objective may be negative) the axis is linear.
    """
    shown = np.array([*must_show, *(np.percentile(train, [0.5, 99]) if len(train) else [])])
    low, high = float(shown.min()), float(shown.max())
    if low > 0:
        axes.set_yscale("log")
        low, high = low / (high / low + 0.1) ** 0.05, high * (high / low + 0.1) ** 0.04
    else:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6
    axes.set_ylim(low, high)
    _log_ticks(axes)


def _log_ticks(axes: Axes) -> None:
    """Ticks at round numbers, also where a logarithmic axis spans less than a power of ten."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    marks = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 12 * low else (1, 2, 5)
    ticks = [tick for power in range(-9, 9) for mark in marks if low <= (tick := mark * 10.0**power) <= high]
    logarithmic = axes.get_yscale() == "log"
    if logarithmic and high > 300 * low:
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
    else:
        axes.yaxis.set_major_locator(FixedLocator(ticks) if logarithmic and len(ticks) >= 4 else MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.4g}")


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = LABEL_GAP) -> None:
    """Write each (height, text, colour) to the right of the axes, moved up where it would overlap another."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    floor = -math.inf
    for value, text, colour in sorted(labels):
        floor = max(to_fraction.transform((0, value))[1], floor + gap)
        axes.annotate(
            text,
            (1, floor),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _title(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=theme.ink)


def _dress(axes: Axes, theme: Theme) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.quiet)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
