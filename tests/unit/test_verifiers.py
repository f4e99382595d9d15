"""Verifiers: what counts as the answer, and that hostile text neither fools nor stops them."""

import gzip
import json
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zero2hero.align import verifiers
from zero2hero.align.verifiers import choice, code_in, number, number_in, regex, think, unit_tests, verifier
from zero2hero.errors import UserError


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("7 + 8 = 15. So 47 + 38 = 85.\nThe answer is 85.", "85"),
        ("She earns 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("so \\boxed{42}", "42"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("\\boxed{-\\dfrac{3}{4}}", "-3/4"),
        ("The answer is 1. No, the answer is 2. It had 3 steps.", "2"),
        ("The answer is: $1,234.50.", "1234.5"),
        ("The answer is **-5**", "-5"),
        ("The answer is \u22125", "-5"),
        ("the answer is x = 7", "7"),
        ("Answer: \\(3\\)", "3"),
        ("The answer is 3/4 of it", "3/4"),
        ("#### .5", "1/2"),
        ("#### 50%", "50"),
        ("12 apples and 13 pears", "13"),
        ("from 5-3 to 8", "8"),
        ("The answer is 1/0", None),
        ("The answer is 007", "7"),
        ("no number", None),
        ("", None),
        ("version 1.2.3", None),
        ("1,2345", None),
        ("x86", None),
        ("The answer is \u0668\u0665", None),  # other digits
        ("1" * 50, None),
    ],
)
def test_number_in(written, value):
    assert number_in(written) == (None if value is None else Fraction(value))


def test_number():
    talk = [{"role": "assistant", "content": "<think>5 or 6?</think> 6"}]
    assert number(["5", talk, "It is 1,000.0"], ["#### 5", 6, "1000"]) == [1.0, 1.0, 1.0]
    assert number(["5", "five"], ["no number here", "5"]) == [None, 0.0]
    assert number(["<think>5", "<think>5</think>", "<think>4</think> 5", "5</think>"], ["5"] * 4) == [0, 0, 1, 0]


def test_number_on_gsm8k(shared_data):
    """Each solution of GSM8K gives its own answer, as its authors extract it."""
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    stated = [answer.rpartition("#### ")[2].replace(",", "") for answer in answers]
    assert number(answers, stated) == [1.0] * len(rows)
    assert sum(number(answers, stated[1:] + stated[:1])) < 0.05 * len(rows)


STATED = ["the answer is ", "####", "\\boxed{", "<think>", "</think>", "\\frac{", "}{"]
pieces = st.sampled_from([*STATED, "1", ",", ".", "-", "/", "$", " ", "(", "```", "A"])


@given(st.lists(pieces | st.text(max_size=3), max_size=40).map("".join))
def test_any_text_is_judged(written):
    assert number([written], ["85"])[0] in (0.0, 1.0)
    assert choice([written], ["B"])[0] in (0.0, 1.0)
    assert think([written])[0] in (0.0, 1.0)
    assert isinstance(code_in(written), str)


@pytest.mark.parametrize(
    "piece", [*STATED, "1", "1,", "1,000", "- ", "1/", "\\frac{1}{", " ", "\n", "$", "A", "*", "```\n"]
)
def test_time_is_linear(piece):
    written, start = piece * (1_000_000 // len(piece)), time.perf_counter()
    number([written], ["1"]), choice([written], ["B"]), think([written]), code_in(written)
    assert time.perf_counter() - start < 5


def test_choice():
    answers = [
        "The answer is (B).",
        "B",
        "(B) because",
        "B. Paris",
        "Answer: B",
        "\\boxed{\\text{B}}",
        "b)",
        "A Bee",
        "C",
    ]
    assert choice(answers, ["B"] * 9) == [1] * 7 + [0] * 2
    assert choice(["A", "<think>A</think> The answer is C", "D"], [0, "(C)", "?"]) == [1.0, 1.0, None]
    assert choice(["The answer is a bee"], ["A"]) == [0.0]


def test_think():
    good = "<think>7 + 8 = 15</think>\nThe answer is 15."
    bad = ["15", "<think>7</think>", "<think> </think> 15", "<think>7", "7</think> 15", good + good, "So: " + good,
           "</think>7<think> 15", "<think><think>7</think> 15", "<think>7</think></think> 15"]  # fmt: skip
    assert think([good, "\n" + good, *bad]) == [1.0, 1.0] + [0.0] * len(bad)


def test_regex_and_its_limit(monkeypatch):
    monkeypatch.setattr(verifiers, "REGEX_SECONDS", 0.5)
    texts = ["aaab", "b", "a" * 40 + "!", "ab", "it's a \u2603 \x00 b\nab"]
    with pytest.warns(UserWarning, match=r"\(a\+\)\+b\$' ends in a timeout on 'aaaa"):
        assert verifier("regex", r"(a+)+b$")(texts) == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert regex(["yes", "no"], ["^y", "^y"]) == [1.0, 0.0]
    assert regex([], []) == []
    with pytest.raises(UserError, match=r"is no regular expression: .*unterminated"):
        verifier("regex", "(a")(["a"])


def test_unit_tests():
    with pytest.raises(UserError, match="--allow_code_execution"):
        verifier("unit_tests")
    checked = verifier("unit_tests", allow_code_execution=True)
    good = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    bad = good.replace("a + b", "a - b")
    answers = [good, bad, "def add(a, b): return a + b", "<think>"]
    assert checked(answers, tests=["assert add(1, 2) == 3"] * 4) == [1, 0, 1, 0]
    assert unit_tests([good], [["assert add(1, 1) == 2", "assert add(1, 2) == 3"]]) == [1.0]


def test_samples_without_the_column_are_not_judged():
    assert verifier("number")(["1", "2", "3"], answer=["1", None, "4"]) == [1.0, None, 0.0]
    assert verifier("regex")(["1", "2"], pattern=[None, "2"]) == [None, 1.0]


def test_a_column_is_missing():
    with pytest.raises(UserError, match="no column 'gold' to compare with; there is prompts, answer"):
        verifier("number", "gold")(["1"], prompts=["?"], answer=["1"])


def test_humaneval(shared_data):
    """Every reference solution passes its tests, and none that does nothing."""
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:40]
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    assert unit_tests([row["prompt"] + row["canonical_solution"] for row in rows], tests) == [1.0] * len(rows)
    assert unit_tests([row["prompt"] + "    return None" for row in rows], tests) == [0.0] * len(rows)
