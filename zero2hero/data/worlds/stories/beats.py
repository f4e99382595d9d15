"""Beats: the passages that stories of every kind share. Who the hero is, meeting, thanking, the end."""

from __future__ import annotations

from zero2hero.data.worlds.stories import lexicon as lex
from zero2hero.data.worlds.stories.skeleton import Skeleton
from zero2hero.data.worlds.stories.telling import Character, Teller, article

_OPEN_PEOPLE = """
Once upon a time, there was {a_trait} [little |]{h.kind} named {h}. {h.He} lived {home}.
{h} was {a_trait} [little |]{h.kind} who lived {home}.
There once was {a_trait} {h.kind} called {h}, who lived {home}.
Once there was a [little |]{h.kind} named {h} who lived {home}. {h.He} was very {trait}.
{home} lived {a_trait} [little |]{h.kind} named {h}.
{h} lived {home}. Everyone there knew that {h} was {a_trait} {h.kind}.
This is the story of {h}, {a_trait} {h.kind} who lived {home}.
"""
_OPEN_ANIMALS = """
Once upon a time, {a_look} {h.kind} named {h} lived {home}. {h.He} was very {trait}.
{h} was {a_trait} [little |young |]{h.kind} who lived {home}.
There once was {a_trait} [little |young |]{h.kind} called {h}, who lived {home}.
{home} lived {a_trait} [little |]{h.kind} named {h}.
Long ago, {a_look} {h.kind} called {h} lived {home}. All the animals knew how {trait} {h} was.
{home} lived {a_look} {h.kind}. {h.His} name was {h}, and {h.he} was very {trait}.
"""
_WHEN = (
    "one [sunny|bright|warm|fine|mild|clear] [morning|afternoon|day]",
    "one day",
    "one [cool|quiet|lovely] morning",
    "on a [bright|sunny|warm] [Saturday|Sunday]",
    "early one morning",
)
_MEET = """
{p.intro} came by and saw {h}. "What is the matter?"
Just then, {p.intro} came along. "Why [the|such a] long face?"
{p.intro} noticed {h} and hurried over. "What happened?"
Before long, {p.intro} came around the corner. "Is something wrong?"
"What is the trouble, {h}?" It was {p.intro}.
{p.intro} stopped and looked at {h}. "Can I help you?"
Luckily, {p.intro} was not far away. "What is going on here?"
Then {p.intro} came by, whistling a tune. "{h}! What happened?"
"Hello, {h}," said a voice. It was {p.intro}. "Do you need a hand?"
"""
_THANKS = """
"Thank you[ so much||, thank you]!" [said|cried] {h}.
"How can I ever thank you?" asked {h}. "Your smile is enough," said {p}.
"I could not have done it without you," said {h}.
{h} threw {h.his} arms around {p}. "Thank you!"
"You are the best, {p}!" said {h}.
"You saved the day," {h} said. {p} [only smiled|gave a wink|laughed].
{h} thanked {p} [again and again|with all {h.his} heart|three times].
"""
_MORAL = """
{h} [had learned|learned] that {moral}.
From [that day on|then on], {h} knew that {moral}.
And {h} never forgot that {moral}.
That day, {h} found out that {moral}.
"Now I know that {moral}," {h} said.
That is how {h} learned that {moral}.
{h} thought, "It is true: {moral}."
"""
_CLOSE = """
That night, {h} fell asleep with a smile.
It had been a [very good|wonderful|long and lovely] day.
And when the stars came out, {h} was still smiling.
{h} still tells that story today.
What a day that was!
At bedtime, {h} thought about it once more and smiled.
That night, the moon shone through the leaves, and all was well.
The end of the day was [golden and still|quiet and warm].
"""
_CLOSE_TOGETHER = """
{h} and {q} [laughed|sang|talked] all the way home.
Then {h} and {q} walked home side by side.
{h} and {q} watched the sun go down together.
{h} and {q} stayed until the first star came out.
"""
_NEAR = ("parent", "grandparent", "sibling", "friend")
_TRAITS = tuple(lex.TRAITS)
GOOD = ("happy", "glad", "proud", "delighted")


def opening(t: Teller, avoid: tuple[str, ...] = ()) -> Character:
    """Bring in the hero, with a trait (none of `avoid`) and a home."""
    h = t.child("h")
    barred = avoid if not t.animals else (*avoid, *lex.HUMAN_ONLY_TRAITS)
    trait = t.pick(_TRAITS)
    while trait in barred:
        trait = t.pick(_TRAITS)
    t.note("trait", h, trait)
    home = lex.SPECIES[h.kind][1] if t.animals else t.pick(lex.HOMES)
    t.note("lives", h, home)
    t.cast.update(trait=trait, a_trait=article(trait), home=home)
    if t.animals:
        t.cast["a_look"] = article(t.pick(lex.SPECIES[h.kind][0]))
    t.say(_OPEN_ANIMALS if t.animals else _OPEN_PEOPLE)
    t.say(lex.TRAITS[trait], p=0.4)
    return h


def when(t: Teller) -> None:
    """Set `{when}` and `{When}`: a time of day in fair weather."""
    time = t.fill(t.pick(_WHEN))
    t.cast.update(when=time, When=time[0].upper() + time[1:])


def visit(t: Teller, *only: str) -> None:
    """The hero goes to a place (one of `only`, or any); call before the sentence that says so. See `scene`."""
    t.go(t.place("place", *only), t.cast["h"])


def scene(t: Teller, p: float = 0.4) -> None:
    """What is to be seen or heard at `{place}`."""
    t.say(t.cast["place"].details, p=p)


def meet(t: Teller, s: Skeleton, text: str = _MEET) -> Character:
    """The helper of the skeleton comes to where the hero is and asks what is wrong."""
    t.paragraph(0.6)
    p = t.helper(s.helper)
    here = t.where[t.cast["h"]]
    t.where[p] = here
    t.say(text)
    t.note("helps", p, t.cast["h"])
    return p


def thanks(t: Teller) -> None:
    t.say(_THANKS)


def closing(t: Teller, s: Skeleton, feelings: tuple[str, ...] = GOOD, why: str = "", partner: str = "p") -> None:
    """The hero's feeling at the end, the moral, and a last picture (with `partner`, when that one is there)."""
    h = t.cast["h"]
    t.feel(h, t.pick(feelings), why, sign=0.3)
    t.note("moral", h, s.moral)
    t.cast["moral"] = t.pick(lex.MORALS[s.moral])
    t.say(_MORAL, p=0.7)
    q = t.cast["q"] = t.cast.get(partner)
    together = q is not None and (partner == "f" or s.helper in _NEAR) and t.where[q] == t.where[h] != "home"
    t.say(_CLOSE_TOGETHER if together and t.chance(0.6) else _CLOSE, p=0.4)
