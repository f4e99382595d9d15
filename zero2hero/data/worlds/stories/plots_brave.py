"""Stories of courage: an animal is rescued, a storm is weathered, a fear is faced."""

# ruff: noqa: E501  (a line of a table is one record)

from __future__ import annotations

from zero2hero.data.worlds.stories.beats import closing, meet, opening, scene, visit, when
from zero2hero.data.worlds.stories.skeleton import Skeleton, plot
from zero2hero.data.worlds.stories.tables import rows, sections, ways
from zero2hero.data.worlds.stories.telling import Character, Teller, article

# -- an animal rescued ----------------------------------------------------------------------------------------
# animal; trouble (its kind is the obstacle); places; what is heard or seen; what it is
_ANIMALS = {
    animal: (obstacle, tuple(places.split(", ")), sign, trouble)
    for animal, obstacle, places, sign, trouble in rows("""
kitten; high; the park, the orchard, the garden; a thin, high meow; {z.He} had climbed up a tall tree and could not get down
owlet; high; the forest, the orchard, the glade; a soft hoot; {z.He} clung to the tip of a bare branch and could not fly yet
duckling; deep; the park, the farm, the old bridge; a faint peeping; {z.He} had fallen down a steep hole and could not get out
hedgehog; deep; the farm, the garden, the meadow; a scratching sound; {z.He} had tumbled into a deep pit and could not get out
fawn; deep; the forest, the meadow, the hill; a rustle in the leaves; {z.He} had slipped into a ditch and could not climb out
lamb; stuck; the farm, the meadow, the hill; a weak bleat; {z.His} wool was caught on a thorny bush
puppy; stuck; the park, the playground, the market; a sad whine; {z.His} collar was caught on a fence
swan; stuck; the lake, the river, the pond; an angry hiss; {z.His} foot was tangled in an old fishing line
sparrow; hurt; the garden, the schoolyard, the orchard; a tiny chirp; {z.His} wing was hanging down
pony; hurt; the farm, the hill, the meadow; a low snort; {z.He} was limping because of a sharp stone in one hoof
turtle; dry; the beach, the lake, the river; a slow scraping; {z.He} lay on {z.his} back and could not turn over
dolphin; dry; the beach, the harbor; a strange whistle; {z.He} was stranded in a puddle that grew smaller and smaller
""")
}
_NOT_YET = sections("""
high
    {h} held out both arms, but {z.the} was afraid to jump.
    {h} called and called, but {z.the} only held on tighter.
deep
    {h} reached down, but {h.his} arms were too short.
    {h} lay flat on the ground and stretched, but it was too deep.
stuck
    {h} pulled, but that only made it worse.
    The more {z.the} struggled, the tighter it got.
hurt
    When {h} came closer, {z.the} trembled.
    {h} did not know how to touch {z.him} without hurting {z.him}.
dry
    {h} pushed with all {h.his} might, but {z.the} was too heavy.
    {h} tried to lift {z.him}, but slipped and sat down in the mud.
""")
_RESCUE = ways("""
high > ladder: parent neighbor stranger
    {p} held a ladder, and {h} climbed up slowly. {z.The} crept into {h.his} arms, and down they came together.
high > blanket: grandparent sibling friend
    {p} spread out a blanket, and they each held two corners. {z.The} closed {z.his} eyes and let go. \
        Plump! {z.He} landed softly.
high > food: grandparent neighbor
    {p} put a dish of warm milk and bread at the foot of the tree. {z.The} sniffed, came down a little, \
        then a little more, and was safe.
deep > plank: parent neighbor stranger
    {p} brought a long plank and slid it down. Step by step, {z.the} walked up into the light.
deep > basket: sibling friend grandparent
    {p} tied a basket to a rope and let it down. {h} talked in a soft voice until {z.the} got in, and they pulled.
stuck > scissors: parent grandparent neighbor
    {p} had a small pair of scissors. While {h} stroked {z.the}, {p} went snip, snip, snip, and {z.he} was free.
stuck > patience: sibling friend stranger
    "Hold {z.him} still," said {p}. {h} hummed a song, and {p} undid one knot after another until {z.the} was free.
hurt > nurse: parent grandparent neighbor stranger
    {p} cleaned the sore spot with water and put a soft bandage on it. {h} brought food and fresh straw \
        every day for {days} days.
hurt > box: sibling friend
    They made a bed of hay in a box and took turns to watch. {h} brought food and water every day for {days} days.
dry > rope: parent neighbor stranger
    {p} laid a wet cloth under {z.the}. "One, two, three, pull!" Inch by inch, they moved {z.him} to the water.
dry > bucket: sibling friend grandparent
    They dug a little canal with their {h.hands} and filled it with bucket after bucket. Then {z.the} could slide \
        into the water.
""")
_FAREWELL = sections("""
mother
    Then {mother} appeared, greeted {z.the} and led {z.him} home. It was {z.his} mother!
    Not far away, {z.his} mother was waiting. The two of them touched noses and went away together.
free
    {z.The} looked back once, as if to say thank you. Then {z.he} was gone.
    {z.The} looked around for a moment and then set off into the wide world.
    "Goodbye, little one," whispered {h}. "Take care of yourself."
visits
    From then on, {z.the} came to visit {h} almost every day.
    Even a year later, {z.the} still knew {h} and came at once when {h} called.
name
    {h} called {z.him} Button, and {z.he} followed {h} everywhere.
    {h} gave {z.him} the name Biscuit, and {z.he} slept beside the stove that night.
""")


_MOTHERS = {"duckling": "a duck", "owlet": "a big owl", "fawn": "a deer", "lamb": "a sheep", "kitten": "a cat"}


class Creature(Character):
    """An animal that does not talk: `{z}` "kitten", `{z.the}` "the kitten"."""

    def __init__(self, kind: str, gender: str):
        super().__init__(kind, gender, "animal")
        self.a, self.the, self.The = article(kind), f"the {kind}", f"The {kind}"


def _rescuable(s: Skeleton) -> bool:
    animal, farewell = s.goal.split("/")
    return (
        _ANIMALS[animal][0] == s.obstacle
        and not (farewell == "name" and animal not in ("kitten", "puppy", "hedgehog", "lamb"))
        and not (farewell == "mother" and animal not in _MOTHERS)
        and not (
            farewell == "free" and animal in ("pony", "kitten", "puppy", "lamb", "dolphin", "swan", "sparrow", "owlet")
        )
        and not (s.resolution == "food" and animal != "kitten")
    )


@plot(
    "rescue",
    [f"{animal}/{farewell}" for animal in _ANIMALS for farewell in _FAREWELL],
    _RESCUE.values(),
    ("gentle", "ask", "small", "together", "courage"),
    worlds="h",
    fits=_rescuable,
)
def rescue(t: Teller, s: Skeleton) -> str:
    animal, farewell = s.goal.split("/")
    obstacle, places, sign, trouble = _ANIMALS[animal]
    h = opening(t)
    z = t.enter("z", Creature(animal, "she" if t.chance(0.5) else "he"))
    when(t)
    visit(t, *places)
    t.go(t.cast["place"], z)
    t.cast.update(
        sign=sign,
        trouble=t.fill(trouble),
        mother=_MOTHERS.get(animal, ""),
        days=t.pick(("three", "four", "five", "six", "seven")),
    )
    t.say("""
        {when}, {h} was on the way home from {place} when {h.he} heard {sign}.
        {when}, {h} went for a walk. Not far from {place}, {h.he} heard {sign}.
        {when}, {h} heard {sign} near {place}. {h.He} stopped and listened.
    """)
    t.note("meets", h, z)
    t.event("{h} found {z.the}")
    t.say("""
        It was {z.a}! {trouble}.
        {h} looked around and saw a little {z}. {trouble}.
        It came from a young {z}. {trouble}.
    """)
    t.say("""
        "Poor thing!" said {h}.
        "Do not be afraid," {h} whispered.
        "Hold on! I will help you," called {h}.
    """, p=0.6)  # fmt: skip
    t.say(_NOT_YET[obstacle])
    t.feel(h, "worried", "{h} could not help {z.the}", sign=0.5)
    p = meet(t, s)
    t.event("{p} came to help")
    t.say("""
        {h} pointed at {z.the}. "We have to do something!"
        "Look," said {h}. "We must save {z.him}!"
        "Please help me," said {h}. "{z.The} is in trouble."
    """)
    if obstacle == "hurt":
        t.note("days", h, t.cast["days"])
    t.note("saves", h, z)
    t.event("{z.the} was safe")
    t.say(_RESCUE[obstacle, s.resolution].text)
    t.say(_FAREWELL[farewell])
    if farewell == "name":
        t.note("named", z, "Button" if "Button" in t.text else "Biscuit")
    t.where[p] = "home"
    closing(t, s, ("happy", "proud", "glad", "relieved"), "{z.the} was safe")
    return t.fill("{h} and the {z}").replace(animal, animal.title())


# -- a storm --------------------------------------------------------------------------------------------------
# weather; how it comes; how it is; how it goes
_WEATHER = {
    name: parts
    for name, *parts in rows("""
thunderstorm; Dark clouds rolled in, and the first heavy drops fell.; Lightning flashed, and thunder shook the ground.; At last the thunder moved away, and a rainbow stood over {place}.
snowstorm; The sky turned white, and thick flakes began to fall.; The snow whirled so wildly that one could not see the path.; Then the snow stopped, and the whole world sparkled.
fog; A gray fog crept over the ground and swallowed the trees.; Everything looked strange, and every sound was muffled.; Little by little, the fog lifted, and the sun came through.
windstorm; The wind grew stronger and stronger until the branches groaned.; Leaves, twigs and hats flew through the air.; In the end, the wind grew tired and lay down like a dog.
flood; It rained and rained, and the stream began to rise.; Brown water gurgled over the path and cut off the way back.; By evening the water had gone down, and the path was free again.
hail; It grew cold, and suddenly lumps of ice rattled down.; The hail drummed on everything like a thousand fingers.; Then the hail melted, and the air smelled fresh and clean.
""")
}
_ERRANDS = {
    "berries": "pick berries for a cake",
    "wood": "gather dry sticks for the fire",
    "friend": "visit a friend on the other side",
    "picnic": "have a picnic",
    "herbs": "look for herbs that are good for coughs",
    "letter": "deliver an important letter",
}
_SHELTER = ways("""
lost > lantern: parent grandparent neighbor stranger
    Then a small light swung through the gloom. It was {p.intro} with a lantern! {p} took {h} to an old mill.
lost > bell: grandparent neighbor parent
    Ding, dong! Somewhere a bell was ringing. {h} followed the sound, step by step, and there stood {p.intro} \
        in the door of a hut. "I rang it for you," said {p}.
lost > rope: sibling friend stranger
    Then {p.intro} came along with a rope. "Hold on to it," said {p}. \
        Together they found an empty hut.
alone > cave: sibling friend stranger
    "In here!" called a voice. It was {p.intro}, who sat in a dry cave and made room for {h}.
alone > barn: neighbor stranger grandparent
    A door opened in an old barn. "Come in, quick!" called {p.intro}, and gave {h} a warm blanket.
alone > hollow tree: friend sibling
    "Over here!" called {p.intro}, who had crept into a hollow tree. There was just enough room for two.
smaller one > carry: parent sibling stranger
    {h} lifted {f} up and carried {f.him}, and then {p.intro} came running and took them both to a dry shed.
smaller one > song: grandparent friend sibling
    {h} sang at the top of {h.his} voice, so that {f} would not be afraid. {p.Intro} heard the song and found them both.
""")
_AT_LAST = {
    "berries": "There were still enough berries, and the cake was delicious.",
    "wood": "In the evening, a small fire crackled merrily.",
    "friend": "And {h} visited the friend a day later.",
    "picnic": "Then they had the picnic after all, on a dry stone.",
    "herbs": "On the way back, {h} even found the herbs.",
    "letter": "And {h} delivered the letter before dark.",
}
_WAITING = """
They told riddles until it was over.
They sang every song they knew, and then they made up new ones.
{p} told stories about storms of long ago.
They shared a bit of bread and listened to the noise outside.
They counted slowly to five hundred.
They huddled close together and kept each other warm.
"""


def _weathers(s: Skeleton) -> bool:
    return not (s.obstacle == "lost" and s.goal.split("/")[0] in ("thunderstorm", "hail", "flood", "windstorm"))


@plot(
    "storm",
    [f"{weather}/{errand}" for weather in _WEATHER for errand in _ERRANDS],
    _SHELTER.values(),
    ("courage", "together", "home", "ask"),
    fits=lambda s: _weathers(s) and (s.moral != "ask" or s.resolution != "lantern"),
)
def storm(t: Teller, s: Skeleton) -> str:
    weather, errand = s.goal.split("/")
    comes, lasts, goes = _WEATHER[weather]
    h = opening(t)
    when(t)
    visit(t, "the meadow", "the forest", "the hill", "the lake", "the orchard", "the river")
    t.cast.update(errand=_ERRANDS[errand])
    t.note("wants", h, _ERRANDS[errand])
    t.say("""
        {when}, {h} set out for {place} to {errand}.
        {when}, {h} went to {place}. {h.He} wanted to {errand}.
        "I am going to {place} to {errand}," said {h} {when}, and off {h.he} went.
    """)
    scene(t)
    t.note("weather", t.cast["place"], weather)
    t.event("the bad weather came")
    t.say(comes)
    t.say(lasts)
    if s.obstacle == "smaller one":
        f = t.child("f")
        t.go(t.cast["place"], f)
        t.say("""
            Then {h} heard somebody cry. It was a small {f.kind} named {f}.
            Under a bush sat a very young {f.kind} named {f}, shaking all over.
        """)
        t.feel(f, "scared", "the bad weather came", sign=0.3)
    elif s.obstacle == "lost":
        t.say("""
            {h} turned left, then right, and no longer knew where {h.he} was.
            {h} could not find the way back.
        """)
        t.feel(h, "scared", "{h} was lost", sign=0.5)
    else:
        t.say("""
            There was nobody to be seen, and {h} had no place to hide.
            {h} was all alone and far from home.
        """)
        t.feel(h, "scared", "the bad weather came", sign=0.5)
    t.paragraph(0.5)
    p = t.helper(s.helper)
    t.go(t.cast["place"], p)
    t.note("helps", p, h)
    t.event("{h} met {p}")
    t.say(_SHELTER[s.obstacle, s.resolution].text)
    t.say(_WAITING)
    t.event("the bad weather was over")
    t.say(goes)
    t.say("""
        "We did it," said {h}.
        "That was an adventure!" said {p}.
        "Thank you for being there," said {h}.
        "I was scared, but only at first," said {h}.
    """, p=0.6)  # fmt: skip
    t.say(_AT_LAST[errand], p=0.7)
    t.where[p] = "home"
    closing(t, s, ("relieved", "happy", "calm", "thankful"), "the bad weather was over")
    return t.fill("{h} and the ") + weather.title()


# -- a fear faced ---------------------------------------------------------------------------------------------
# fear: how it shows; the test; how it ends
_FEARS = sections("""
the dark
    At night, every shadow looked like a [monster|wolf|giant].
    When the light went out, {h} pulled the blanket over {h.his} head.
deep water
    When the others jumped into the lake, {h} stayed on the bank.
    {h} never went in deeper than {h.his} ankles.
loud noises
    When a door slammed, {h} jumped and covered {h.his} ears.
    Even a popping balloon could make {h} cry.
high places
    {h} never climbed higher than the second step.
    On a bridge, {h} closed {h.his} eyes and held on to the rail.
singing in front of others
    {h} sang beautifully, but only when nobody was listening.
    As soon as anyone looked, {h} forgot every word.
big dogs
    When a big dog barked, {h} hid behind the nearest tree.
    {h} crossed the road whenever a big dog came along.
""")
_TEST = sections("""
the dark
    Then the lamp went out, and somebody had to go down to the cellar to get candles.
    Then {h} heard a small cry outside in the night. Somebody had to go and look.
deep water
    Then a little boat with a cricket in it began to drift away from the bank.
    All the others were going to swim to the little island, and {h} wanted to go, too.
loud noises
    The day of the big parade came, with drums and trumpets.
    Then the day came when everybody was going to watch the fireworks.
high places
    Then a little kite got caught on the old tower, and somebody had to climb all the stairs to get it.
    The finest view of all was at the top of the old tower, and everyone was going up.
singing in front of others
    Then the lead singer fell ill, one hour before the concert.
    Then came the day when {h} was asked to sing for the oldest lady in town.
big dogs
    Then a very big dog got stuck under a gate, right in front of {h}.
    Then {h} had to bring a basket to a house where a very big dog lived.
""")
_HOW = ways("""
step by step > small steps: parent grandparent neighbor sibling
    "You do not have to do it all at once," said {p}. "Take one small step, then one more." So that is what {h} did.
step by step > count: parent sibling friend
    "Count to ten and breathe," said {p}. {h} counted. At seven, the fear was smaller. At ten, {h} could move.
company > hold on: parent grandparent friend sibling
    "Hold my {p.hand}," said {p}. "You may squeeze it as hard as you like." {h} squeezed very hard and went ahead.
company > own fear: grandparent neighbor friend
    "I will tell you a secret," said {p}. "I am afraid of [spiders|geese|thunder]. But I sing to myself, and it helps." \
        So {h} sang and went ahead.
a token > pebble: grandparent sibling neighbor
    {p} put a smooth pebble into {h}'s {h.hand}. "This has been brave for a thousand years. It will lend you some." \
        {h} held it tight and went ahead.
a token > question: parent neighbor grandparent
    "What is the worst that can happen?" asked {p}. {h} thought about it. It was not so terrible after all. \
        "Then I will try," {h} said.
""")
_DONE = sections("""
the dark
    There was nothing to fear in the dark. A sleepy moth fluttered by, and that was all.
    The dark was soft and quiet, like a big black cat.
deep water
    The water carried {h} like a big soft bed.
loud noises
    The noise went boom, boom, boom, and soon {h}'s feet were dancing to it.
high places
    From up there, the houses looked like toys, and the wind smelled of summer.
singing in front of others
    At first {h}'s voice was thin, but then it filled the whole room, and everybody clapped.
big dogs
    The big dog wagged its tail and licked {h} from chin to forehead.
""")


@plot("fear", _FEARS, _HOW.values(), ("courage", "friends", "ask", "patience"))
def fear(t: Teller, s: Skeleton) -> str:
    h = opening(t, avoid=("adventurous", "lively", "noisy"))
    t.cast["fear"] = s.goal
    t.note("fears", h, s.goal)
    t.say("""
        There was one thing that {h} did not like: {h.he} was afraid of {fear}.
        {h} was afraid of only one thing, and that was {fear}.
        {h} had a secret. {h.He} was afraid of {fear}.
    """)
    t.say(_FEARS[s.goal])
    t.say(
        """
        "I wish I were brave," {h} often thought.
        Nobody knew about it.
        Some of the others laughed at {h.him} for it.
    """,
        p=0.6,
    )
    t.event("the day of the test came")
    t.say(_TEST[s.goal])
    t.feel(h, t.pick(("scared", "nervous")), "the day of the test came", sign=0.7)
    t.paragraph(0.6)
    p = t.helper(s.helper)
    t.say("""
        {p.intro} saw how pale {h} was and sat down beside {h.him}.
        {p.intro} was there and noticed it at once.
        "Are you afraid?" asked {p.intro}. {h} nodded.
    """)
    t.note("helps", p, h)
    t.event("{p} talked to {h}")
    t.say(_HOW[s.obstacle, s.resolution].text)
    t.event("{h} was brave")
    t.say("""
        {h.His} legs trembled, but they carried {h.him}.
        {h.His} heart went thump, thump, thump, and still {h.he} did it.
        It was hard at first. Then it was not so hard.
    """)
    t.say(_DONE[s.goal])
    t.say("""
        "I did it!" cried {h}.
        "You see?" said {p}. "You were brave all along."
        "Look at you!" said {p} with a laugh.
    """)
    closing(t, s, ("proud", "happy", "relieved", "glad"), "{h} was brave")
    return t.fill("{h} Is Brave")
