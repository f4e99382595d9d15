"""The teller: a simulated little world, and the sentences that report what happens in it.

A plot never writes free text about who has what. It first changes the world (`give`, `lose`, `go`, `feel`),
which fails loudly when the change is impossible (one cannot give away what one does not hold), and then says
it in one of several ways. Every change is also kept as a `Fact`, with the place in the text that tells it,
so that questions about the story have exact answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from zero2hero.data.worlds.stories import lexicon as lex
from zero2hero.data.worlds.stories.tables import Template, lines, template, words

T = TypeVar("T")
_SILENT_H = ("honest", "hour")


def article(words: str) -> str:
    """`words` with a or an before it, by sound: an apple, an honest girl, a useful key."""
    vowel = words[0] in "aeiou" and not words.startswith(("one-", "use", "uni", "eu"))
    return f"{'an' if vowel or words.startswith(_SILENT_H) else 'a'} {words}"


def listing(words: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


class Fact(NamedTuple):
    """One thing that is true in the story: `relation(subject, value)`, with a detail (the place, the cause, or
    who received the thing). `at` is where in the text the passage starts that tells it."""

    relation: str
    subject: str
    value: str
    detail: str = ""
    at: int = 0


class Character:
    """Somebody in the story. `intro` is how to name them first ("her friend Mia"), `name` ever after, `a` "a girl"."""

    def __init__(self, name: str, gender: str, kind: str, intro: str = "", adult: bool = False, paws: bool = False):
        self.name, self.kind, self.adult = name, kind, adult
        self.a = article(kind)
        if gender == "she":
            self.he, self.him, self.his, self.himself, self.He, self.His = "she", "her", "her", "herself", "She", "Her"
        else:
            self.he, self.him, self.his, self.himself, self.He, self.His = "he", "him", "his", "himself", "He", "His"
        self.hand, self.hands = ("paw", "paws") if paws else ("hand", "hands")
        self.intro = intro or name
        self.Intro = self.intro[0].upper() + self.intro[1:]

    def __str__(self) -> str:
        return self.name


class Thing:
    """Something that can be held. `{x}` is the bare noun, `{x.a}` "a red kite", `{x.full}` "red kite"."""

    def __init__(self, name: str, look: str = "", color: str = "", habit: str = ""):
        self.name, self.color, self.habit = name, color, habit
        self.full = " ".join(filter(None, (look, color, name)))
        self.a, self.the, self.The = article(self.full), f"the {name}", f"The {name}"

    def __str__(self) -> str:
        return self.name


class Place(NamedTuple):
    """Somewhere to be. `{place}` is "the park", `{place.at}` "in the park"."""

    name: str
    at: str
    details: str  # lines

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return self.name


class Teller:
    """World state, the text so far and the source of chance of one story."""

    def __init__(self, rng: random.Random, animals: bool):
        self.random = rng.random
        self.animals = animals  # are the characters animals or people?
        self.cast: dict[str, Any] = {}  # role -> Character, Thing, Place or text: what templates may name
        self.facts: list[Fact] = []
        self.holder: dict[Thing, Character | None] = {}
        self.where: dict[Character, str] = {}
        self._pieces: list[str] = []
        self._length = 0
        self._names: list[str] = []
        self._break = False
        self._focus: Character | None = None  # whom a pronoun would mean
        self._felt = (-1, True)  # where the last feeling was told, and whether it was a good one
        self._pronouns = 0  # how often in a row one was used

    # -- chance ---------------------------------------------------------------------------------------------
    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def chance(self, p: float) -> bool:
        return self.random() < p

    def fill(self, text: str) -> str:
        """One template with its choices made and its names filled in."""
        return self._expand(template(text))

    def _expand(self, chosen: Template) -> str:
        rnd = self.random
        text = "".join([p if p.__class__ is str else p[int(rnd() * len(p))] for p in chosen.parts])
        return text.format_map(self.cast)

    # -- text -----------------------------------------------------------------------------------------------
    def say(self, text: str, p: float = 1.0) -> None:
        """Tell one of the lines of `text` (with probability `p`, else nothing).

        A line that begins with somebody's name begins with "he" or "she" instead when it is plain who is meant.
        """
        if p < 1.0 and self.random() >= p:
            return
        chosen = self.pick(lines(text))
        told = self._expand(chosen)
        lead: Character | None = self.cast[chosen.lead] if chosen.lead else None
        if lead is not None and lead is self._focus and not self._break and self._pronouns < 2 and self.chance(0.7):
            told = lead.He + told[len(lead.name) :]
            self._pronouns += 1
        elif chosen.lead:
            self._pronouns = 0
        self._refocus(chosen, lead)
        first = told[0] == '"'  # an opening quotation mark is followed by the letter to raise
        told = told[:first] + told[first].upper() + told[first + 1 :]
        separator = "" if not self._pieces else "\n\n" if self._break else " "
        self._break = False
        self._pieces.append(separator + told)
        self._length += len(separator) + len(told)

    def _refocus(self, chosen: Template, lead: Character | None) -> None:
        """Whom would "he" or "she" mean after this passage? Nobody, when two could be meant."""
        named = [c for role in chosen.roles if isinstance(c := self.cast[role], Character)]
        if named:
            focus = lead or named[0]
            rivals = [c for c in named if c is not focus and c.he == focus.he]
            self._focus = None if rivals or (lead is None and len(named) > 1) else focus

    def paragraph(self, p: float = 1.0) -> None:
        self._break = self._break or self.random() < p

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    # -- cast -----------------------------------------------------------------------------------------------
    def _fresh(self, names: Sequence[str]) -> str:
        """A name whose first letter nobody else has, so that no two are easily mixed up."""
        name = self.pick(names)
        while any(name[0] == other[0] for other in self._names):
            name = self.pick(names)
        self._names.append(name)
        return name

    def enter(self, role: str, character: Character) -> Character:
        self.cast[role] = character
        self.where[character] = "home"
        self.note("is", character.name, character.kind, character.he)
        return character

    def child(self, role: str, intro: str = "") -> Character:
        """A child (or a young animal) with a fresh name. `intro` may use {name}, {kind}, {his} and {h...}."""
        girl = self.chance(0.5)
        if self.animals:
            species = self.pick(tuple(s for s in lex.SPECIES if all(f.value != s for f in self.facts)))
            name = self._fresh(lex.ANIMAL_GIRLS if girl else lex.ANIMAL_BOYS)
        else:
            species = "girl" if girl else "boy"
            name = self._fresh(lex.GIRLS if girl else lex.BOYS)
        phrase = intro.format(name=name, kind=species, a_kind=article(species), **self.cast) if intro else ""
        return self.enter(role, Character(name, "she" if girl else "he", species, phrase, paws=self.animals))

    def relative(self, role: str) -> Character:
        """An aunt, uncle or cousin, who may be far away."""
        kind, name, gender = self.pick(RELATIVES)
        return self.enter(role, Character(name, gender, kind, adult=True))

    def elder(self, role: str, kind: str) -> Character:
        """A grown-up: parent, grandparent, neighbor or stranger (a worker met on the way)."""
        woman = self.chance(0.5)
        gender = "she" if woman else "he"
        if kind in ("parent", "grandparent"):
            small, grand = ("Mama", "Papa") if self.animals else ("Mom", "Dad"), ("Grandma", "Grandpa")
            name = (grand if kind == "grandparent" else small)[0 if woman else 1]
            role_name = ("grand" if kind == "grandparent" else "") + ("mother" if woman else "father")
            return self.enter(role, Character(name, gender, role_name, adult=True, paws=self.animals))
        taken = self.cast.values()
        if self.animals:
            free = [n for n in lex.ELDER_ANIMALS if all(str(c) != n for c in taken)]
            name = self.pick(free)
            species, gender = lex.ELDER_ANIMALS[name]
            phrase = name if species in name.lower() else f"{name} the {species}"
            return self.enter(role, Character(name, gender, species, phrase, adult=True))
        name = self.pick([n for n in (lex.WOMEN if woman else lex.MEN) if all(str(c) != n for c in taken)])
        if kind == "neighbor":
            return self.enter(role, Character(name, gender, "neighbor", f"{name} from next door", adult=True))
        job = self.pick(JOBS)
        return self.enter(role, Character(name, gender, job, f"{article(job)} named {name}", adult=True))

    def helper(self, kind: str, role: str = "p") -> Character:
        """The helper of the story, of the kind that its skeleton names."""
        if kind == "sibling":
            girl = self.chance(0.5)
            names = (lex.ANIMAL_GIRLS, lex.ANIMAL_BOYS) if self.animals else (lex.GIRLS, lex.BOYS)
            name, sibling = self._fresh(names[0 if girl else 1]), "sister" if girl else "brother"
            phrase = f"{self.cast['h'].his} big {sibling} {name}"
            return self.enter(role, Character(name, "she" if girl else "he", sibling, phrase, paws=self.animals))
        if kind == "friend":
            return self.child(role, "{h.his} friend {name}" + (" the {kind}" if self.animals else ""))
        return self.elder(role, kind)

    def thing(self, role: str, tag: str = "", owner: Character | None = None) -> Thing:
        """A thing from the lexicon that has `tag`, held by `owner`."""
        noun = self.pick(_BY_TAG[tag])
        tags, looks, habit = lex.THINGS[noun]
        colored = "c" in tags and self.chance(0.65)
        color = self.pick(lex.COLORS) if colored else ""
        look = "" if colored and self.chance(0.5) else self.pick(looks)
        return self.own(role, Thing(noun, look, color, habit), owner)

    def own(self, role: str, thing: Thing, owner: Character | None) -> Thing:
        self.cast[role] = thing
        self.holder[thing] = owner
        if owner is not None:
            self.note("has", owner.name, thing.name)
        if thing.color:
            self.note("color", thing.name, thing.color)
        return thing

    def place(self, role: str = "place", *only: str) -> Place:
        world = "a" if self.animals else "h"
        place = self.pick([p for p in _PLACES[world] if p.name in only] if only else _PLACES[world])
        self.cast[role] = place
        return place

    # -- what happens ---------------------------------------------------------------------------------------
    def note(self, relation: str, subject: object, value: object, detail: object = "") -> None:
        # The passage that tells this fact is the next one: one separator after what is already there.
        at = self._length + (0 if not self._pieces else 2 if self._break else 1)
        self.facts.append(Fact(relation, str(subject), str(value), str(detail), at))

    def go(self, place: Place | str, *characters: Character) -> None:
        for character in characters:
            self.where[character] = str(place)
            self.note("goes", character, place)

    def gain(self, character: Character, thing: Thing, how: str = "finds", where: str = "") -> None:
        """`character` comes to hold a thing that nobody holds."""
        assert self.holder[thing] is None, f"{character} cannot take {thing}: {self.holder[thing]} holds it"
        self.holder[thing] = character
        self.note(how, character, thing, where)

    def lose(self, character: Character, thing: Thing, where: str = "") -> None:
        assert self.holder[thing] is character, f"{character} does not hold {thing}"
        self.holder[thing] = None
        self.note("loses", character, thing, where)

    def give(self, giver: Character, thing: Thing, receiver: Character) -> None:
        assert self.holder[thing] is giver, f"{giver} does not hold {thing}"
        assert self.where[giver] == self.where[receiver], f"{giver} and {receiver} are not together"
        self.holder[thing] = receiver
        self.note("gives", giver, thing, receiver)

    def feel(self, character: Character, feeling: str, why: str = "", sign: float = 0.5) -> None:
        """`character` feels something; `why` is a clause in the past ("Mia lost the kite")."""
        self.note("feels", character, feeling, self.fill(why) if why else "")
        self.cast.update(c=character, feeling=feeling)
        before, self._felt = self._felt, (len(self._pieces), feeling in lex.GOOD_FEELINGS)
        if before == self._felt:  # somebody else's feeling of the same color has just been told
            self.say(_FEELS_TOO)
        else:
            self.say(_FEELS_STRONGLY if feeling in lex.STRONG_FEELINGS else _FEELS)
        if not character.adult:
            self.say(lex.FEELINGS[feeling], p=sign)
        self._felt = (len(self._pieces), self._felt[1])

    def event(self, clause: str) -> None:
        """Something that happened, as a clause in the past, for questions about the order of things."""
        self.note("event", "", self.fill(clause))


JOBS = words("""
    baker gardener carpenter sailor painter shepherd beekeeper tailor librarian firefighter musician doctor
    potter shoemaker fisherman cook florist farmer clockmaker mechanic
""")
RELATIVES = (
    ("aunt", "Aunt June", "she"),
    ("uncle", "Uncle Ned", "he"),
    ("cousin", "Cousin Bea", "she"),
    ("uncle", "Uncle Rob", "he"),
)
_FEELS = """
{c} felt {feeling}.
{c} was [so |very |]{feeling}.
{c} felt [very |quite ]{feeling}.
[This|That] made {c} [very |]{feeling}.
How {feeling} {c} was!
Now {c} was {feeling}.
"""
_FEELS_STRONGLY = """
{c} felt {feeling}.
{c} was {feeling}.
How {feeling} {c} was!
"""
_FEELS_TOO = """
{c} was {feeling}, too.
And {c} was {feeling}, too.
{c} felt {feeling} as well.
"""
_PLACES = {
    world: tuple(
        Place(name, f"{prep} {name}", details) for worlds, prep, name, details in lex.PLACES if world in worlds
    )
    for world in "ha"
}
_BY_TAG = {tag: tuple(n for n, (tags, _, _) in lex.THINGS.items() if not tag or tag in tags) for tag in ("", *"lsfkc")}
