"""Worlds: stories that are true to their own facts, sums that add up, and floors that theory confirms."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from zero2hero.data.worlds import SPLITS, WORLDS, world
from zero2hero.data.worlds.stories import Story, lexicon, story
from zero2hero.data.worlds.stories.skeleton import PLOTS
from zero2hero.data.worlds.sums import LEVELS, Problem, add_steps, multiply_steps, problem, subtract_steps
from zero2hero.data.worlds.symbolic import Induction, MarkovChain, Palindromes
from zero2hero.errors import UserError

COUNT = 20_000
KNOWN_NAMES = {*lexicon.GIRLS, *lexicon.BOYS, *lexicon.ANIMAL_GIRLS, *lexicon.ANIMAL_BOYS}
ADULTS = re.compile(
    r"\b(?:Grandma|Grandpa|Mom|Dad|Mama|Papa|(?:Mr|Mrs)\. [A-Z]\w+|Miss [A-Z]\w+|Old Owl|Uncle \w+|Aunt \w+)"
)


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return [story(index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def some(stories: list[Story]) -> list[Story]:
    return stories[:2000] + [story(index, "validation") for index in range(1000)]


# -- the registry ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_a_pure_function_of_seed_split_and_index(name):
    first, again, other = world(name), world(name), world(name, seed=1)
    assert first.name == name
    documents = list(first.documents("train", 50))
    assert documents == [again.document(index, "train") for index in range(50)]
    assert documents[::-1] == [first.document(index, "train") for index in reversed(range(50))], "order must not matter"
    small = ("sums", "two_digit_sums", "names", "dialogues", "shapes", "digits")  # so few texts that seeds share some
    assert name in small or not set(documents) & set(other.documents("train", 50))
    assert documents != list(first.documents("validation", 50))
    assert SPLITS == ("train", "validation")


def test_documents_are_the_same_in_another_process_with_another_hash_seed():
    code = (
        "import json; from zero2hero.data.worlds import WORLDS, world;"
        "print(json.dumps({n: list(world(n, 3).documents('validation', 8)) for n in WORLDS}))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert json.loads(out) == {name: list(world(name, 3).documents("validation", 8)) for name in WORLDS}


def test_importing_worlds_imports_nothing_heavy():
    code = "import sys, zero2hero.data.worlds as w; w.world('stories').document(0); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_bad_names_splits_indices_and_sizes_are_refused_with_a_hint():
    with pytest.raises(UserError, match=r"unknown world 'storys'.*Did you mean 'stories'"):
        world("storys")
    with pytest.raises(UserError, match="unknown split 'valid'"):
        story(0, "valid")
    with pytest.raises(UserError, match="must not be negative"):
        world("sums").document(-1, "train")
    with pytest.raises(UserError, match="unknown level 6"):
        problem(0, level=6)
    with pytest.raises(UserError, match="even"):
        Induction(length=7)
    with pytest.raises(UserError, match="alphabet"):
        MarkovChain(alphabet=1)


# -- stories: variety and splits ------------------------------------------------------------------------------
def test_train_and_validation_never_share_a_plot_skeleton(stories):
    train = {s.skeleton for s in stories[:5000]}
    validation = {story(index, "validation").skeleton for index in range(5000)}
    assert not train & validation
    assert {s.family for s in train} == {s.family for s in validation} == set(PLOTS)
    assert len(PLOTS) >= 12
    every = {split: sum(len(plot.skeletons[split]) for plot in PLOTS.values()) for split in SPLITS}
    assert every["train"] + every["validation"] > 10_000
    assert every["validation"] / sum(every.values()) == pytest.approx(1 / 16, rel=0.15)


def test_stories_are_distinct_rich_in_words_and_short(stories):
    assert len({s.text for s in stories}) > 0.99 * COUNT
    vocabulary = {word for s in stories for word in re.findall(r"[a-z]+", s.text.lower())}
    assert len(vocabulary) >= 1500
    lengths = np.array([len(s.text.split()) for s in stories])
    assert lengths.min() >= 60
    assert np.quantile(lengths, 0.99) <= 220
    openings = Counter(" ".join(s.text.split()[:2]) for s in stories)
    assert openings.most_common(1)[0][1] < 0.35 * COUNT


# -- stories: the language ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "slip",
    [
        r"\b[Aa] [aeio]\w*(?<!\bone)\b(?<!one-eyed)",  # "a apple"
        r"\b[Aa]n (?!hour|honest|umbrella)[^aeio]\w*",  # "an dog"
        r"\b(\w+) \1\b",  # "the the"
        r" [.,!?]|[.,!?]{2}|  ",  # spaces and marks
        r"(?<!Mr)(?<!Mrs)[.!?] [a-z]",  # a sentence without a capital
        r"[{}\[\]|_]",  # a template that was not filled
        r"(?:^|\n\n)[a-z]",
        r"[^.!?\"](?:\n\n|$)",  # a paragraph without an end
        r"(?<![A-Za-z])(?:one) (?:cookies|apples|pears|plums|muffins)\b",
        r"\b(?:two|three|four|five|six|seven|eight|nine|ten) (?:cookie|apple|pear|plum|muffin|peach)\b",
    ],
)
def test_the_language_has_no_slips(stories, slip):
    pattern = re.compile(slip)
    found = [match.group(0) for s in stories[:5000] for match in pattern.finditer(s.text) if match.group(0) != "a one"]
    assert not found, Counter(found).most_common(5)


def test_quotation_marks_open_and_close(stories):
    for s in stories[:5000]:
        for paragraph in s.text.split("\n\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            for match in re.finditer(r'"([^"]*)"', paragraph):
                spoken, before = match.group(1), paragraph[: match.start()]
                assert spoken == spoken.strip(), paragraph
                assert spoken[0].isupper() or re.search(r'," said \w+, $', before), paragraph
                assert spoken[-1] in ".,!?", paragraph


# -- stories: truth -------------------------------------------------------------------------------------------
def test_every_name_belongs_to_the_cast_and_comes_after_its_entrance(some):
    for s in some:
        entrance = {fact.subject: fact.at for fact in s.facts if fact.relation == "is"}
        for match in re.finditer(r"\b[A-Z][a-z]+\b", s.text):
            if match.group(0) in KNOWN_NAMES:
                assert match.start() >= entrance[match.group(0)], s.text
        for match in ADULTS.finditer(s.text):
            assert match.start() >= entrance[match.group(0)], s.text
        named = [name for name in entrance if name in s.text]
        assert len(named) >= len(entrance) - (s.skeleton.family == "mystery"), "nobody is brought in for nothing"


def test_pronouns_agree_with_the_cast(some):
    one_gender = 0
    for s in some:
        genders = {fact.detail for fact in s.facts if fact.relation == "is"}
        if len(genders) == 1:
            one_gender += 1
            wrong = r"\b(he|him|his|himself)\b" if genders == {"she"} else r"\b(she|her|hers|herself)\b"
            assert not re.search(wrong, s.text, re.IGNORECASE), s.text
    assert one_gender > 300


def test_nobody_gives_what_they_do_not_hold_and_the_text_tells_it(some):
    given = 0
    for s in some:
        holder: dict[str, str | None] = {}
        for fact in s.facts:
            told = s.text[fact.at :]
            if fact.relation == "has":
                holder[fact.value] = fact.subject
            elif fact.relation == "loses":
                assert holder[fact.value] == fact.subject
                holder[fact.value] = None
                assert fact.value in told
                assert fact.detail in told
            elif fact.relation in ("finds", "makes", "wins") and fact.value in holder:
                assert holder[fact.value] is None, s.text
                holder[fact.value] = fact.subject
            elif fact.relation in ("makes", "wins"):
                holder[fact.value] = fact.subject
            elif fact.relation == "gives":
                assert holder[fact.value] == fact.subject, s.text
                holder[fact.value] = fact.detail
                passage = told[:200]
                assert fact.value in passage, s.text
                assert fact.detail in passage or fact.subject in passage, s.text
                given += 1
        for question in s.questions():
            if question.question.startswith("Who had the "):
                assert holder[question.question[12:-12]] == question.answer
    assert given > 500


def test_feelings_are_told_where_the_facts_say(some):
    for s in some:
        for fact in s.facts:
            if fact.relation == "feels":
                sentence = re.split(r"(?<=[.!])(?<!Mr.)(?<!Mrs.)\s", s.text[fact.at :], maxsplit=1)[0]
                assert fact.value in sentence, (fact, sentence)
                assert fact.subject in sentence or re.match(r"(She|He)\b", sentence), (fact, sentence)


# -- stories: questions ---------------------------------------------------------------------------------------
def test_questions_have_short_answers_that_the_text_supports(some):
    kinds = Counter()
    for s in some:
        questions = s.questions()
        assert questions == s.questions()
        assert len(questions) >= 8
        assert len({q.question for q in questions}) == len(questions)
        for q in questions:
            kinds[q.kind, q.answer if q.kind in ("yesno", "order") else ""] += 1
            assert q.question.endswith("?")
            assert "{" not in q.question
            assert q.answer in ("yes", "no") if q.kind in ("yesno", "order") else q.answer.lower() in s.text.lower()
            assert len(q.answer.split()) <= 10
    assert {kind for kind, _ in kinds} == {
        "who",
        "where",
        "what",
        "trait",
        "color",
        "feeling",
        "number",
        "yesno",
        "order",
    }
    for kind in ("yesno", "order"):
        share = kinds[kind, "yes"] / (kinds[kind, "yes"] + kinds[kind, "no"])
        assert 0.35 < share < 0.65, f"always saying yes must not pay: {kind} {share:.2f}"


def test_counts_and_orders_in_questions_are_right(some):
    counted = ordered = 0
    for s in some:
        numbers = {f.detail.split("|")[1]: lexicon.NUMBERS.index(f.value) for f in s.facts if f.relation == "number"}
        if numbers:
            counted += 1
            assert numbers["at first"] - numbers["got"] == numbers["left"] > 0
        events = [f.value for f in s.facts if f.relation == "event"]
        for q in s.questions():
            if q.kind == "order":
                first, second = next(
                    (a, b)
                    for a, b in itertools.permutations(events, 2)
                    if q.question == f"Is it true that {a} before {b}?"
                )
                assert (events.index(first) < events.index(second)) == (q.answer == "yes")
                ordered += 1
    assert counted > 50
    assert ordered > 1000


# -- sums -----------------------------------------------------------------------------------------------------
_EQUATION = re.compile(r"((?:\d+ [-+*] )+\d+) = (\d+)")


def _value(expression: str) -> int:
    """Left to right, which is all that the steps need: they never mix * with + or -."""
    first, *rest = expression.split()
    total = int(first)
    for operator, number in zip(rest[::2], rest[1::2]):
        total = {"+": total + int(number), "-": total - int(number), "*": total * int(number)}[operator]
    return total


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_every_step_of_a_sum_is_true_and_leads_to_the_answer(level):
    for index in range(600):
        made = problem(index, "train", level=level)
        equations = _EQUATION.findall(" ".join(made.steps))
        assert equations
        for left, right in equations:
            assert _value(left) == int(right), made.text
        assert int(equations[-1][1]) == made.answer >= 0
        assert made.check(made.text)
        assert level is None or made.level == level
        asked = [int(n) for n in re.findall(r"\d+", made.question)]
        if made.level <= 3:
            assert _value(re.search(r"\d+ [-+*] \d+", made.question).group(0)) == made.answer
        else:
            assert len(asked) == (2 if made.level == 4 else 3)


@pytest.mark.parametrize(("steps", "sign"), [(add_steps, "+"), (subtract_steps, "-"), (multiply_steps, "*")])
def test_the_steps_are_right_for_all_small_numbers(steps, sign):
    for a, b in itertools.product(range(0, 120, 7), range(0, 100)):
        if sign == "-" and b > a:
            continue
        for left, right in _EQUATION.findall(" ".join(steps(a, b))):
            assert _value(left) == int(right)
        assert f"{a} {sign} {b} = {_value(f'{a} {sign} {b}')}." in steps(a, b)[-1]


def test_sums_carry_by_tens_and_ones():
    assert add_steps(47, 38) == ["7 + 8 = 15, write 5 and carry 1.", "4 + 3 + 1 = 8.", "So 47 + 38 = 85."]
    assert add_steps(5, 96)[-1] == "So 5 + 96 = 101."
    assert multiply_steps(23, 7)[2] == "140 + 21 = 161."


def test_an_answer_is_checked_exactly():
    made = Problem("What is 700 + 525?", (), 1225, 2)
    assert all(map(made.check, ("The answer is 1225.", "so 1,225", "Answer is: 3. No, the answer is 1225", "= 1225.0")))
    assert not any(map(made.check, ("", "no idea", "12250", "The answer is 122.", "-1225", "1225 or 1226", "1225.5")))


def test_sums_of_the_two_splits_share_no_calculation():
    def calculations(split: str) -> set[tuple]:
        found = set()
        for index in range(4000):
            made = problem(index, split, level=1 + index % 4)
            a, op, b = re.search(r"(\d+) ([-+*]) (\d+)", _whole(made)).groups()
            found.add((op, *sorted((int(a), int(b)))))
        return found

    def _whole(made: Problem) -> str:
        """The calculation as a whole: the last "So a op b = ...", or the only step."""
        return made.steps[-1].removeprefix("So ")

    train, validation = calculations("train"), calculations("validation")
    assert not train & validation
    assert len(train) > 1000


# -- symbolic worlds ------------------------------------------------------------------------------------------
SYMBOLIC = [
    MarkovChain(seed=5, length=40, alphabet=8),
    MarkovChain(),
    Induction(length=20, alphabet=7),
    Palindromes(length=20, alphabet=7),
    Palindromes(length=21, alphabet=3),
]


@pytest.mark.parametrize("made", SYMBOLIC, ids=lambda w: f"{w.name}{w.length}")
def test_the_floor_is_the_mean_cost_of_documents_under_the_true_model(made):
    costs = np.array([-made.logprob(made.document(index, "train")) for index in range(3000)])
    error = costs.std() / math.sqrt(len(costs))
    assert costs.mean() == pytest.approx(made.total(), abs=4 * error + 1e-9)
    assert made.floor() == pytest.approx(made.total() / made.length)
    assert made.floor(include_eos=True) * (made.length + 1) == pytest.approx(made.floor() * made.length)
    assert all(len(made.document(index, "validation")) == made.length for index in range(20))


@pytest.mark.parametrize(
    "made",
    [MarkovChain(seed=1, length=5, alphabet=3), Induction(length=6, alphabet=3), Palindromes(length=5, alphabet=3)],
    ids=lambda w: w.name,
)
def test_probabilities_sum_to_one_and_the_floor_is_their_entropy(made):
    logs = np.array([made.logprob("".join(d)) for d in itertools.product(made.symbols, repeat=made.length)])
    p = np.exp(logs)
    assert p.sum() == pytest.approx(1)
    assert -(p[p > 0] * logs[p > 0]).sum() == pytest.approx(made.total())


def test_the_markov_chain_is_stationary_and_its_bigrams_match_the_matrix():
    made = MarkovChain(seed=2, length=64, alphabet=6)
    assert made.stationary @ made.transitions == pytest.approx(made.stationary)
    counts = np.zeros((6, 6))
    for index in range(1500):
        states = [made.symbols.index(symbol) for symbol in made.document(index, "train")]
        np.add.at(counts, (states[:-1], states[1:]), 1)
    assert counts / counts.sum() == pytest.approx(made.stationary[:, None] * made.transitions, abs=0.01)
    assert 0 < made.rate() < math.log(6)
    assert not np.allclose(made.transitions, MarkovChain(seed=3, length=64, alphabet=6).transitions)
