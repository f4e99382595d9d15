"""Rewards: how they are named, called and checked."""

import dataclasses
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from zero2hero.align.rewards import load_rewards
from zero2hero.errors import UserError

PROMPTS, ANSWERS = ["What is 2 + 2?", "And 3 + 4?"], ["The answer is 4.", "It is 8."]


def score(*functions, **columns):
    return load_rewards(list(functions))(PROMPTS, ANSWERS, [[1], [2]], columns)


def test_a_function_gets_what_it_has_parameters_for():
    seen = {}

    def narrow(completions, answer):
        seen["narrow"] = (completions, answer)
        return [1.0, 0.0]

    def wide(prompts, completions, completion_ids, **columns):
        seen["wide"] = (prompts, completions, completion_ids, columns)
        return [0, True]

    scores = score(narrow, wide, answer=["4", "7"], level=[1, 2])
    assert seen["narrow"] == (ANSWERS, ["4", "7"])
    assert seen["wide"] == (PROMPTS, ANSWERS, [[1], [2]], {"answer": ["4", "7"], "level": [1, 2]})
    assert scores.by_function_NF.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert scores.total_N.tolist() == [1.0, 1.0]


def test_weights_and_none():
    def good(completions):
        return [1.0, None]

    def short(completions):
        return np.array([-2.0, -4.0])

    rewards = load_rewards([good, short], [1.0, 0.5])
    scores = rewards(PROMPTS, ANSWERS)
    assert scores.total_N.tolist() == [0.0, -2.0]
    assert rewards.metrics(scores.by_function_NF) == {
        "rewards/good/mean": 1.0, "rewards/good/std": 0.0,
        "rewards/short/mean": -3.0, "rewards/short/std": pytest.approx(math.sqrt(2)),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"2 reward functions \(good, short\) need as many"):
        load_rewards([good, short], [1.0])


def test_no_function_applies():
    with pytest.warns(UserWarning, match="applies to 1 of 2 samples.*And 3"):
        assert score(lambda completions: [1.0, None]).total_N.tolist() == [1.0, 0.0]


def broken(completions):
    raise RuntimeError("no such model\nsecond line")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (broken, r"reward broken raised RuntimeError: no such model \(test_rewards.py, line \d+\)$"),
        (lambda completions: [1.0], "returned 1 rewards for 2"),
        (lambda completions: [1.0, math.nan], "returned nan for completion 1"),
        (lambda completions: [math.inf, 1.0], "returned inf for completion 0"),
        (lambda completions: ["1", "2"], "returned '1' for completion 0"),
        (lambda completions: torch.ones(2, 1), r"returned \[1.0\] for completion 0"),
        (lambda completions: None, "returned None; expected a list"),
        (lambda completions: 1.0, "returned 1.0; expected a list"),
        (lambda completions, gold: [1.0, 1.0], "needs a column 'gold'.*there is prompts, completions, answer"),
    ],
)
def test_what_is_wrong_is_named(function, message):
    with pytest.raises(UserError, match=message):
        score(function, answer=["4", "7"])


async def patient(completions):
    return [1.0, 1.0]


def test_async_functions_are_refused():
    with pytest.raises(UserError, match="reward patient is an async function"):
        score(patient)


def test_by_name(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def length(completions):\n    return [float(len(c)) for c in completions]\n")
    assert score(f"{tmp_path}/mine.py:length").total_N.tolist() == [16.0, 8.0]
    assert score("number", answer=["4", "7"]).total_N.tolist() == [1.0, 0.0]
    assert score("number=solution", solution=["#### 5", "8"]).total_N.tolist() == [0.0, 1.0]
    names = load_rewards(["number", "number=solution", f"{tmp_path}/mine.py:length"]).functions
    assert list(names) == ["number", "number_", "length"]


def test_names_that_are_none(tmp_path: Path):
    (tmp_path / "mine.py").write_text("import nowhere\n")
    (tmp_path / "yours.py").write_text("def length(completions): return []\n")
    for name, message in {
        "numbr": "no reward 'numbr'. Did you mean 'number'",
        f"{tmp_path}/mine.py:length": "cannot be run: ModuleNotFoundError: No module named 'nowhere'",
        f"{tmp_path}/yours.py:lenght": "no function 'lenght'. Did you mean 'length'",
        f"{tmp_path}/none.py:length": "no such file",
        "nowhere.rewards:length": "cannot import nowhere.rewards",
        "math:lenght": "math has no function",
    }.items():
        with pytest.raises(UserError, match=message):
            load_rewards([name])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lies beside a model"):
        load_rewards([f"{tmp_path}/yours.py:length"])
    with pytest.raises(UserError, match="name what rewards"):
        load_rewards([])


def test_messages():
    talk = [[{"role": "assistant", "content": "The answer is 4."}], [{"role": "assistant", "content": "5"}]]
    scores = load_rewards("number")(PROMPTS, talk, columns={"answer": [4, "so #### 5"]})
    assert scores.total_N.tolist() == [1.0, 1.0]


def test_a_function_that_hangs():
    def patient(completions):
        while True:
            try:
                time.sleep(1)
            except Exception:
                continue

    rewards = dataclasses.replace(load_rewards([patient]), timeout=0.2)
    with pytest.raises(UserError, match=r"reward patient was stopped after 0\.2 seconds"):
        rewards(PROMPTS, ANSWERS)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
