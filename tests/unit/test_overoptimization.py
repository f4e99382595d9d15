"""A proxy that is optimized for too long goes on rising while the truth falls, and the report shows it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from zero2hero.align.overoptimization import SMALL, best_of_n, demonstrate, taste
from zero2hero.align.rewards import load_rewards

pytestmark = pytest.mark.usefixtures("one_thread")


def test_taste_is_best_in_measure():
    assert taste(["aaaaddddd"]) == [2.0]
    assert taste(["aaaaddddd", "aad", "a" * 15]) == sorted(taste(["aad", "aaaaddddd", "a" * 15]))[::-1]


def test_best_of_n_equals_drawing_it():
    rng = np.random.default_rng(0)
    texts = [["".join(rng.choice(list("abcdefgh"), 15)) for _ in range(16)] for _ in range(8)]
    proxy = load_rewards(
        [lambda completions: [float(text.count("a")) + 1e-3 * text.count("b") for text in completions]]
    )
    points = best_of_n(texts, proxy, {"proxy": (0.0, 1.0), "gold": (0.0, 1.0)})
    assert [point["n"] for point in points] == [1, 2, 4, 8, 16]
    assert points[0]["kl"] == 0.0
    assert points[0]["gold"] == pytest.approx(np.mean([taste(some) for some in texts]))
    best = [max(some, key=lambda text: text.count("a") + 1e-3 * text.count("b")) for some in texts]
    assert points[-1]["proxy"] == pytest.approx(np.mean([t.count("a") + 1e-3 * t.count("b") for t in best]))
    four = [rng.choice(16, 4, replace=False) for _ in range(4000)]
    drawn = [max(texts[k % 8][i].count("a") for i in some) for k, some in enumerate(four)]
    assert points[2]["proxy"] == pytest.approx(np.mean(drawn), abs=0.1)


@pytest.mark.slow
def test_a_proxy_rises_while_the_truth_falls(tmp_path):
    found = demonstrate(tmp_path, SMALL)
    rl, peak = found["rl"], found["peak"]
    last = {name: np.mean([point[name] for point in rl[-3:]]) for name in ("kl", "proxy", "gold")}
    assert peak["gold"] > rl[0]["gold"] + 0.3
    assert 0.5 < peak["kl"] < 0.7 * last["kl"]
    assert last["proxy"] > peak["proxy"] + 0.1
    assert last["gold"] < peak["gold"] - 0.5
    assert json.loads((tmp_path / "policy" / "overoptimization.json").read_text()) == found
    report = (tmp_path / "policy" / "report.html").read_text()
    assert "Over-optimization" in report
    assert (tmp_path / "policy" / "plots" / "overoptimization.png").stat().st_size > 20_000
