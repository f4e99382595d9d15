"""Questions about a story, made from its facts, each with one short and exact answer.

An answer is a word or phrase that stands in the story, or yes, no or a number. A question is asked only when
the facts leave no doubt: "Who helped Mia?" not if two did, "Where did Mia go?" not if she went to two places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from zero2hero.data.worlds.stories import lexicon as lex
from zero2hero.data.worlds.stories.telling import Fact


class Question(NamedTuple):
    """`kind`: who, where, what, trait, color, feeling, number, yesno or order."""

    question: str
    answer: str
    kind: str


def holders(facts: Sequence[Fact]) -> dict[str, str]:
    """{thing: who holds it at the end}, from the facts alone; a thing that was lost and never found is left out."""
    held: dict[str, str] = {}
    for fact in facts:
        if fact.relation in ("has", "finds", "makes", "wins"):
            held[fact.value] = fact.subject
        elif fact.relation == "gives":
            held[fact.value] = fact.detail
        elif fact.relation == "loses":
            held.pop(fact.value, None)
    return held


def questions_of(facts: Sequence[Fact], text: str) -> list[Question]:
    """Every question that the facts settle and whose answer stands in the text, the same ones every time."""
    low = text.lower()
    asked: dict[str, Question] = {}
    doubtful = set()
    for question in _all(facts, low):
        known = asked.setdefault(question.question, question)
        if known.answer != question.answer:
            doubtful.add(question.question)
    return [
        q
        for q in asked.values()
        if q.question not in doubtful and (q.kind in ("yesno", "order") or q.answer.lower() in low)
    ]


def _all(facts: Sequence[Fact], low: str) -> Iterator[Question]:
    hero, kind = facts[0].subject, facts[0].value
    yield Question("Who is the story about?", hero, "who")
    he = {f.subject: f.detail for f in facts if f.relation == "is"}
    for fact in facts:
        yield from _about(fact, he)
    places = {f.value for f in facts if f.relation == "goes" and f.subject == hero and f.value != "home"}
    if len(places) == 1:
        yield Question(f"Where did {hero} go?", places.pop(), "where")
    feelings = [f for f in facts if f.relation == "feels" and f.subject == hero]
    if feelings:
        yield Question(f"How did {hero} feel at the end?", feelings[-1].value, "feeling")
    for thing, holder in holders(facts).items():
        if f"the {thing}" in low and any(f.relation in ("gives", "finds", "wins") and f.value == thing for f in facts):
            yield Question(f"Who had the {thing} at the end?", holder, "who")
    for fact in facts:
        if fact.relation == "color" and f"{fact.value} {fact.subject}" in low:
            yield from _colors(fact, len(low))
        elif fact.relation == "lives" and kind not in lex.SPECIES:
            other = lex.HOMES[(lex.HOMES.index(fact.value) + 1 + len(low) % (len(lex.HOMES) - 1)) % len(lex.HOMES)]
            yield Question(f"Did {hero} live {fact.value}?", "yes", "yesno")
            yield Question(f"Did {hero} live {other}?", "no", "yesno")
    yield from _order([f.value for f in facts if f.relation == "event"])


def _about(fact: Fact, he: dict[str, str]) -> Iterator[Question]:
    """The questions that one fact answers by itself."""
    relation, subject, value, detail, _ = fact
    ask = _ASK.get(relation)
    if ask is not None:
        for template, answer, kind in ask:
            filled = template.format(s=subject, v=value, d=detail)
            yield Question(filled, answer.format(s=subject, v=value, d=detail), kind)
    elif relation == "is" and value in lex.SPECIES:
        yield Question(f"What kind of animal was {subject}?", value, "what")
    elif relation == "feels" and detail:
        alone = detail.startswith(f"{subject} ") and not detail.startswith(f"{subject} and ")
        cause = he[subject] + detail[len(subject) :] if alone else detail
        yield Question(f"How did {subject} feel when {cause}?", value, "feeling")
    elif relation == "number":
        many, when = detail.split("|")
        how = {
            "at first": f"did {subject} have at first",
            "got": f"did {subject} get",
            "left": f"did {subject} have left",
        }
        yield Question(f"How many {many} {how[when]}?", value, "number")
    elif relation == "result":
        yield Question(f"Did {subject} win?", "yes" if value == "won" else "no", "yesno")


# relation: (question, answer, kind); {s} the subject, {v} the value, {d} the detail of the fact
_ASK: dict[str, tuple[tuple[str, str, str], ...]] = {
    "trait": (("What was {s} like?", "{v}", "trait"),),
    "lives": (("Where did {s} live?", "{v}", "where"),),
    "loses": (("What did {s} lose?", "the {v}", "what"), ("Where did the {v} end up?", "{d}", "where")),
    "from": (("From whom did the {s} come?", "{v}", "who"),),
    "gives": (("Who gave the {v} to {d}?", "{s}", "who"), ("What did {s} give to {d}?", "the {v}", "what")),
    "makes": (("What did {s} make?", "the {v}", "what"),),
    "wins": (("Who got the {v}?", "{s}", "who"),),
    "helps": (("Who helped {v}?", "{s}", "who"),),
    "wants": (("What did {s} want to do?", "{v}", "what"),),
    "wishes": (("What did {s} wish for?", "{v}", "what"),),
    "fears": (("What was {s} afraid of?", "{v}", "what"),),
    "promises": (("What did {s} promise to do?", "{v}", "what"), ("To whom did {s} make a promise?", "{d}", "who")),
    "keeps": (("Did {s} keep the promise?", "yes", "yesno"),),
    "forgets": (("Did {s} keep the promise?", "no", "yesno"),),
    "shares": (("With whom did {s} share the {v}?", "{d}", "who"),),
    "suspects": (("Whom did {s} suspect at first?", "{v}", "who"),),
    "sorry": (("To whom did {s} say sorry?", "{v}", "who"),),
    "culprit": (("Who was behind the mystery?", "{s}", "who"), ("Where was the culprit hiding?", "{d}", "where")),
    "days": (("For how many days did it go on?", "{v}", "number"),),
    "saves": (("Which animal did {s} save?", "{v}", "what"),),
    "named": (("What was the {s} called?", "{v}", "what"),),
    "contest": (("What did {s} take part in?", "{v}", "what"),),
    "cheers": (("Who cheered for {v}?", "{s}", "who"),),
}


def _colors(fact: Fact, salt: int) -> Iterator[Question]:
    others = [c for c in lex.COLORS if c != fact.value]
    yield Question(f"What color was the {fact.subject}?", fact.value, "color")
    yield Question(f"Was the {fact.subject} {fact.value}?", "yes", "yesno")
    yield Question(f"Was the {fact.subject} {others[salt % len(others)]}?", "no", "yesno")


def _order(events: Sequence[str]) -> Iterator[Question]:
    """Is it true that one thing happened before another? In pairs, right way round and wrong way round."""
    for i, (first, second) in enumerate(itertools.pairwise(events)):
        if i % 2 == 0:
            yield Question(f"Is it true that {first} before {second}?", "yes", "order")
        else:
            yield Question(f"Is it true that {second} before {first}?", "no", "order")
