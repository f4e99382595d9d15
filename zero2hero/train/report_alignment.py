"""What the report shows of alignment: reward models, many attempts at a problem, completions with what they earned, and
where a proxy and the truth part. Each section is a function of the run, None where the run has nothing of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

from zero2hero.train import plots
from zero2hero.train.report_parts import Run, Section, escape, pictures, read_mapping, shorten, table_of


def attempts(run: Run) -> Section | None:
    """Of a model that learned to reason: what many attempts at each problem come to, before and after.

    attempts.json holds "verdict", "table" (rows of name, before, after), "before" and "after" (evaluate/pass_at_k.py).
    """
    found = read_mapping(run.path / "attempts.json", json.loads)
    if not found:
        return None
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(before)}</td><td>{escape(after)}</td></tr>'
        for name, before, after in found["table"]
    )
    head = "<thead><tr><th></th><th>before</th><th>after</th></tr></thead>"
    words = f'<p>{escape(found["verdict"])}</p><div class="tables"><table>{head}<tbody>{rows}</tbody></table></div>'
    with contextlib.suppress(ImportError):
        words += (
            f'<div class="small">{pictures(run, {"attempts": functools.partial(plots.attempts_figure, found)})}</div>'
        )
    return Section("Many attempts, before and after", words)


def preferences(run: Run) -> Section | None:
    """Of a reward model: how well it tells which answer people preferred, and whether length is all it sees.

    reward.json holds what `measured` of align/reward.py found of the held-out pairs.
    """
    found = read_mapping(run.path / "reward.json", json.loads)
    if not found:
        return None
    shown = {
        "held-out pairs": f"{found['pairs']}",
        "right, with 95 % interval": f"{found['accuracy']:.1%} ({found['accuracy_low']:.1%} to "
        f"{found['accuracy_high']:.1%})",
        "right where the shorter was preferred": f"{found['accuracy_shorter']:.1%} of {found['pairs_shorter']}"
        if "accuracy_shorter" in found
        else "there is no such pair",
        "correlation of score and length": f"{found['length_correlation']:+.2f}",
        "calibration error": f"{found['calibration_error']:.1%}",
        "rewards, from ... to": f"{found['min_reward']:.3g} to {found['max_reward']:.3g}, {found['mean_reward']:.3g} "
        "on average",
    }
    words = f'<div class="tables">{table_of("", shown)}</div>'
    with contextlib.suppress(ImportError):
        figure = functools.partial(plots.reliability_figure, found)
        words += f'<div class="small">{pictures(run, {"reliability": figure})}</div>'
    return Section("What its scores are worth", words)


def completions(run: Run) -> Section | None:
    """Some answers of a policy that learns from its own, with what they earned: those shown first and last."""
    recorded = [(row["step"], row["completions"]) for row in run.rows if row.get("completions")]
    if not recorded:
        return None

    def table(step: int, shown: list[dict[str, Any]]) -> str:
        names = list(shown[0]["rewards"]) if len(shown[0]["rewards"]) > 1 else []
        heads = "".join(f"<th>{escape(head)}</th>" for head in ("prompt", "completion", "reward", *names, "advantage"))
        rows = "".join(f"<tr>{''.join(cells(s, names))}</tr>" for s in shown)
        return f"<table><caption>step {step}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"

    def cells(s: dict[str, Any], names: list[str]) -> list[str]:
        texts = [f'<td dir="auto">{escape(shorten(s[name]))}</td>' for name in ("prompt", "completion")]
        numbers = [s["reward"], *(s["rewards"][name] for name in names), s["advantage"]]
        return texts + [f"<td>{'' if number is None else format(number, 'g')}</td>" for number in numbers]

    shown = [recorded[0], recorded[-1]] if len(recorded) > 1 else recorded
    return Section("Completions and their rewards", "".join(table(*each) for each in shown))


def overoptimization(run: Run) -> Section | None:
    """Where a proxy and what was meant by it part; overoptimization.json is written by align/overoptimization.py."""
    found = read_mapping(run.path / "overoptimization.json", json.loads)
    if not found:
        return None
    peak, last = found["peak"], found["rl"][-1]
    words = (
        f"<p>The policy earned the reward of a proxy, a model of {found['votes']} votes. The true reward rose with it "
        f"to {peak['gold']:.2f} standard deviations at {peak['kl']:.1f} nats of KL, and then fell to "
        f"{last['gold']:.2f} at {last['kl']:.1f} nats, while the proxy went on from {peak['proxy']:.2f} to "
        f"{last['proxy']:.2f}.</p>"
    )
    with contextlib.suppress(ImportError):
        draw = functools.partial(plots.overoptimization_figure, found)
        words += pictures(run, {"overoptimization": draw})
    return Section("Over-optimization", words)
