"""Stories about others: a chain of trades, a surprise, a mystery, a kind deed on the way."""

# ruff: noqa: E501  (a line of a table is one record)

from __future__ import annotations

from zero2hero.data.worlds.stories import lexicon as lex
from zero2hero.data.worlds.stories.beats import closing, opening, scene, visit, when
from zero2hero.data.worlds.stories.skeleton import Skeleton, plot
from zero2hero.data.worlds.stories.tables import rows, sections, ways
from zero2hero.data.worlds.stories.telling import Teller, Thing, article

# -- a chain of trades ----------------------------------------------------------------------------------------
_NEEDS = {  # what somebody needs, and why
    noun: why
    for noun, why in rows("""
rope; "My goat runs away every day. I need a rope."
lantern; "My cellar is as dark as night. I need a lantern."
basket; "I have so many mushrooms and nothing to carry them in. I need a basket."
blanket; "My bed is cold at night. I need a blanket."
bucket; "My boat leaks. I need a bucket."
bell; "I always lose my sheep in the fog. I need a bell."
broom; "My floor is covered with leaves. I need a broom."
hat; "The sun burns my nose. I need a hat."
kettle; "I would love a hot cup of tea. I need a kettle."
ladder; "The best cherries hang at the very top. I need a ladder."
pillow; "My chair is as hard as a rock. I need a pillow."
umbrella; "I get wet every time it rains. I need an umbrella."
spade; "I want to plant a tree. I need a spade."
drum; "I want to march in the parade. I need a drum."
mirror; "I never know if my hair is straight. I need a mirror."
candle; "My granddaughter has a birthday. I need a candle for the cake."
""")
}
_WISHES = ("kite", "flute", "music box", "telescope", "toy boat", "book of maps", "wooden horse", "violin", "puppet")
_TRADES = ways("""
one trade > keeps it: neighbor stranger
    {h} ran home with {x.the} and did not put it down all day.
    {h} held {x.the} tight. It was even better than in {h.his} dreams.
one trade > gives it away: neighbor stranger
    On the way home, {h} met {f.intro}, who had no toys at all. {h} thought for a while.
    On the way home, {h} met {f.intro}, who was ill and could not go out to play. {h} thought for a while.
two trades > keeps it: neighbor stranger
    "Who would have thought that one old thing could turn into this?" said {h}.
""")


@plot(
    "trade",
    [f"{wish}/{need}" for wish in _WISHES for need in _NEEDS],
    _TRADES.values(),
    ("plan", "patience", "kindness", "share"),
    fits=lambda s: (
        (s.moral in ("kindness", "share")) == (s.resolution == "gives it away")
        and not (s.moral == "patience" and s.obstacle == "one trade")
    ),
)
def trade(t: Teller, s: Skeleton) -> str:
    h = opening(t)
    when(t)
    visit(t)
    wish, need = s.goal.split("/")
    steps = 2 if s.obstacle == "two trades" else 1
    other = t.pick([noun for noun in _NEEDS if noun != need])
    things = []
    for noun in [other, need][-steps:]:
        color = (
            t.pick(lex.COLORS) if noun in ("blanket", "bucket", "hat", "kettle", "pillow", "umbrella", "drum") else ""
        )
        things.append(Thing(noun, "", color))
    p = t.helper(s.helper)
    t.go(t.cast["place"], p)
    x = t.own("x", Thing(wish), p)
    t.note("wishes", h, x)
    t.say("""
        {when}, {h} met {p.intro} {place.at}. {p} had {x.a}, and {h} wanted it more than anything.
        {when}, {h} saw {x.a} {place.at}. It belonged to {p.intro}. {h} wished for it with all {h.his} heart.
    """)
    scene(t, 0.3)
    t.note("needs", p, things[-1])
    t.say("""
        "May I have it?" asked {h}. {p} thought about it. {need} Then I will trade with you," said {p}.
        "Would you trade it for something?" asked {h}. {p} nodded. {need} Bring me one, and {x.the} is yours," said {p}.
    """.replace("{need}", _NEEDS[things[-1].name][:-1]))  # fmt: skip
    if steps == 2:
        t.own("n", things[1], None)
        q = t.elder("k", "stranger")
        t.holder[things[1]] = q
        t.own("m", things[0], h)
        t.note("has", q, things[1])
        t.say("""
            {h} had no {n}. But {h.he} did have {m.a} at home, so {h.he} went to get it.
            {h} did not have {article_n}, only {m.a}. {h.He} took it along and set out.
        """.replace("{article_n}", article(things[1].name)))  # fmt: skip
        t.paragraph(0.5)
        t.go("the road", h, q)
        t.note("needs", q, things[0])
        t.say("""
            On the road stood {k.intro} with {n.a}. {need} said {k}. "Here is one!" cried {h}.
            Soon {h} met {k.intro}, who carried {n.a} and sighed. {need} said {k}. "I can help you," said {h}.
        """.replace("{need}", _NEEDS[things[0].name][:-2] + ',"'))  # fmt: skip
        t.give(h, things[0], q)
        t.give(q, things[1], h)
        t.event("{h} traded with {k}")
        t.say("""
            So {h} gave {m.the} to {k} and got {n.the} for it.
            {h} handed {m.the} to {k}, and {k} gave {h} {n.the}. Both were pleased.
        """)
        t.go(t.cast["place"], h)
        t.say("""
            {h} hurried back to {p}.
            Then {h} ran all the way back to {place}.
        """)
    else:
        t.own("n", things[0], h)
        t.say("""
            {h} remembered {n.a} that lay in a corner at home. Nobody used it anymore. {h.He} ran to get it.
            "I have one!" said {h}. At home, under the bed, there was {n.a}. {h.He} was back in no time.
        """)
        t.paragraph(0.5)
    t.give(h, t.cast["n"], p)
    t.give(p, x, h)
    t.event("{h} traded with {p}")
    t.say("""
        {h} gave {n.the} to {p}. "That is just what I need!" said {p}, and gave {x.the} to {h}.
        "Here it is," said {h}. {p} took {n.the} with a smile and handed {x.the} to {h}.
    """)
    if s.resolution == "gives it away":
        f = t.child("f", "{a_kind} named {name}")
        t.go("the road", h, f)
        t.say(_TRADES[s.obstacle, s.resolution].text)
        t.give(h, x, f)
        t.event("{h} gave {x.the} to {f}")
        t.say("""
            Then {h} gave {x.the} to {f}. "For me?" {f} whispered.
            "It is yours," said {h}, and gave {x.the} to {f}. {f} could not believe it.
        """)
        t.feel(f, "happy", "{h} gave {x.the} to {f}", sign=0.4)
    else:
        t.say(_TRADES[s.obstacle, s.resolution].text)
    t.where[p] = "away"
    closing(t, s, ("happy", "glad", "proud", "cheerful"), "{h} traded with {p}" if s.resolution == "keeps it" else "")
    return t.fill("{h} and the {x}")


# -- a surprise -----------------------------------------------------------------------------------------------
_OCCASIONS = {
    "birthday": "It was almost {g}'s birthday.",
    "get well": "{g} had been ill, but now {g.he} was getting better.",
    "welcome": "{g} had been away for a long time and was coming home.",
    "thank you": "{g} always helped everyone, and nobody ever thanked {g.him}.",
    "cheer up": "{g} had been sad for days, and nobody knew why.",
}
_PLANS = sections("""
garland
    "I will hang paper [stars|flowers|birds] all over the room," thought {h}.
song
    "I will write a song and sing it at the door," thought {h}.
breakfast
    "I will make breakfast with [pancakes|rolls|warm milk] and bring it on a tray," thought {h}.
play
    "I will put on a play with [a dragon|a pirate|a clown] in it," thought {h}.
lights
    "I will put a hundred little lights around the house," thought {h}.
album
    "I will paste all our happiest days into an album," thought {h}.
""")
_NEARLY = ways("""
nearly found out > hide: sibling friend parent
    Then the door creaked. {g} was coming! "Quick, under the bed with it!" whispered {p}. They were as quiet as mice \
        until {g} had gone.
nearly found out > story: sibling grandparent friend
    "What are you two whispering about?" asked {g}. "About [cheese|frogs|socks]," {p} said quickly. {h} nearly giggled.
too much > four hands: friend neighbor sibling
    But there was so much to do, and time was running out. "I will take half of it," said {p}. So they got done in time.
too much > everyone: neighbor parent grandparent
    But it was too much for two. So {p} went from door to door, and soon the whole street was helping.
goes wrong > new idea: grandparent sibling friend
    But at the last moment, [the lights went out|a shelf came crashing down|the cat jumped into the middle of it]. \
        "Then we hug {g} first and fix it together after that," said {p}. It was a good idea.
goes wrong > in time: parent neighbor friend
    But at the last moment, [the lights went out|a shelf came crashing down|the cat jumped into the middle of it]. \
        "We still have an hour," said {p}. They worked like two whirlwinds and put it right.
""")
_REVEAL = """
Then the door opened. "Surprise!" they shouted. {g} stood there with an open mouth.
When {g} came in, they jumped up and called, "Surprise!" {g} laughed and cried at the same time.
"Close your eyes," said {h}, and led {g} into the room. "Now open them!" {g} gasped.
{g} looked around and put both {g.hands} to {g.his} cheeks. "You did all this for me?"
"""


@plot(
    "surprise",
    [f"{occasion}/{plan}" for occasion in _OCCASIONS for plan in _PLANS],
    _NEARLY.values(),
    ("home", "together", "kindness", "plan"),
    fits=lambda s: not (s.goal.startswith("welcome") and s.obstacle == "nearly found out"),
)
def surprise(t: Teller, s: Skeleton) -> str:
    occasion, plan = s.goal.split("/")
    h = opening(t, avoid=("noisy",))
    g = t.helper("parent" if s.helper == "grandparent" else "grandparent", "g")
    t.note("occasion", g, occasion)
    t.say(_OCCASIONS[occasion])
    t.note("wants", h, t.fill("surprise {g}"))
    t.say("""
        {h} wanted to surprise {g}.
        "I want to surprise {g}," said {h}.
        So {h} decided to surprise {g}.
    """)
    t.say(_PLANS[plan])
    p = t.helper(s.helper)
    t.note("helps", p, h)
    t.event("{h} made a plan with {p}")
    t.say("""
        {h} told only {p.intro} about it. "I will help you," said {p}.
        {h} needed help and asked {p.intro}. "Of course!" said {p}.
        {p.intro} promised to help and to keep the secret.
    """)
    t.say("""
        They worked in secret, with the curtains closed.
        They met in the attic, where nobody could hear them.
        For two evenings, they planned and whispered and tried things out.
        They tiptoed about and put a finger to their lips.
    """)
    t.paragraph(0.5)
    t.event("something almost went wrong")
    t.say(_NEARLY[s.obstacle, s.resolution].text)
    t.feel(h, t.pick(("nervous", "excited")), "something almost went wrong", sign=0.5)
    t.event("{g} saw the surprise")
    t.say(_REVEAL)
    t.feel(g, t.pick(("happy", "delighted", "thankful")), "{g} saw the surprise")
    t.say("""
        They all [ate|sang|danced] together until late.
        "This is the best day of my whole life," said {g}.
        "How did you keep such a secret?" asked {g}. {h} and {p} only winked.
        {g} hugged {h} so hard that {h} squeaked.
    """)
    closing(t, s, ("happy", "proud", "glad"), "{g} saw the surprise")
    return t.fill("A Surprise for {g}")


# -- a mystery ------------------------------------------------------------------------------------------------
# what is strange; first clue; who did it; what it was doing there; where it is found
_MYSTERIES = {
    key: (strange, clue, culprit, why, where)
    for key, strange, clue, culprit, why, where in rows("""
socks; Every morning, one sock was missing from the line.; On the ground lay a tuft of gray fur.; a raccoon; wanted a soft bed for its babies; in the woodshed
cookies; Somebody had nibbled at the cookies on the plate.; A trail of crumbs led to the wall.; a field mouse; was hungry after the long winter; behind the stove
noise; Every night there was a scratching sound under the roof.; A few soft feathers lay on the stairs.; a young owl; was practicing how to fly; in the attic
holes; Each day there was a new hole in the lawn.; Next to each hole lay half an acorn.; a squirrel; had forgotten where its acorns were; behind the compost heap
milk; The bowl of milk at the back door was always empty.; There were tiny wet prints on the steps.; a hedgehog; was thirsty from the dry summer; under the porch
light; A strange green light glowed in the barn after dark.; It blinked on and off, three times in a row.; a firefly; had lost its way to the meadow; in the hayloft
music; Late at night, the piano played a few notes all by itself.; There was a long white hair on the keys.; the neighbor's cat; liked to walk where it was warm; inside the piano
spoons; One shiny spoon after the other vanished from the kitchen.; A black and white feather lay on the windowsill.; a magpie; was decorating its nest; in the pear tree
berries; The berry bushes were empty, although nobody had picked them.; Purple footprints crossed the path.; a young badger; had a very sweet tooth; in the ditch
slippers; The left slipper was never where it had been the night before.; The heel had little tooth marks.; the puppy; missed everyone when they were out; under the stairs
""")
}
_SUSPECT = sections("""
wrong suspect
    "I am sure it was {f}," said {h}. But {f} shook {f.his} head. "I did not do it! I was asleep."
    At first, {h} thought that {f} was playing a trick. "No, it was not me," said {f}, a little hurt.
ghost
    "Maybe it is a ghost," whispered {f}. {h} got goose bumps.
    "I think the house is haunted," said {f}. Both of them shivered.
no idea
    {h} and {f} asked everybody, but nobody knew anything.
    {h} and {f} wrote down everything they knew. It was not much.
""")
_SOLVE = ways("""
wrong suspect > watch: parent sibling grandparent
    "Look before you blame," said {p}. So that night they [hid behind the curtain|sat in the dark] and waited.
wrong suspect > flour: grandparent parent neighbor
    "Let us ask the floor," said {p}, and sprinkled flour on it. In the morning, there was a line of little tracks.
ghost > lamp: parent sibling neighbor
    "Ghosts do not like lamps," said {p}, and lit one. They crept along, step by step, holding on to each other.
ghost > listen: grandparent neighbor parent
    "Close your eyes and listen," said {p}. They listened for a long time, until they knew where to look.
no idea > follow: sibling neighbor grandparent
    "A good detective starts with the smallest thing," said {p}. So they followed the trail, inch by inch.
no idea > bait: parent sibling neighbor
    "Then let it come to us," said {p}. They put out a little dish of food and waited without a sound.
""")


@plot(
    "mystery",
    _MYSTERIES,
    _SOLVE.values(),
    ("guess", "courage", "patience", "kindness"),
    worlds="h",
    fits=lambda s: (
        (s.moral == "guess") == (s.obstacle == "wrong suspect")
        and (s.moral != "courage" or s.obstacle == "ghost")
        and (s.moral != "patience" or s.resolution in ("listen", "bait", "follow"))
        and (s.obstacle != "ghost" or s.goal in ("noise", "light", "music", "spoons", "socks", "slippers"))
    ),
)
def mystery(t: Teller, s: Skeleton) -> str:
    strange, clue, culprit, why, where = _MYSTERIES[s.goal]
    h = opening(t)
    t.relative("g")
    t.cast.update(culprit=culprit, why=why, where=where, Where=where[0].upper() + where[1:])
    t.say("""
        {h} was spending a week on an old farm, where something strange was going on.
        One summer, {h} stayed with {g} in an old country house. Something odd was happening there.
        {h} was visiting {g} in the country. There was a riddle there that nobody could solve.
    """)
    t.event("something strange happened")
    t.say(strange)
    t.say("""
        "Who could that be?" wondered {h}.
        "I will find out!" said {h}, and put on a detective hat.
        {h} got a magnifying glass and began to search.
    """)
    f = t.child("f", "{h.his} friend {name}")
    t.say("{h} told {f.intro} about it.\n{h} asked {f.intro} to help.")
    t.event("they found a clue")
    t.say("They looked around carefully.\nThey got down on their knees and searched.", p=0.6)
    t.say(clue)
    if s.obstacle == "wrong suspect":
        t.note("suspects", h, f)
    t.say(_SUSPECT[s.obstacle])
    t.feel(h, {"ghost": "scared", "no idea": "disappointed", "wrong suspect": "ashamed"}[s.obstacle], sign=0.5)
    t.paragraph(0.5)
    p = t.helper(s.helper)
    t.note("helps", p, h)
    t.event("{p} gave them advice")
    t.say(
        "They asked {p.intro} for advice.\n{p.intro} heard about it and came to see.\nIn the end, they went to {p.intro}."
    )
    t.say(_SOLVE[s.obstacle, s.resolution].text)
    t.note("culprit", culprit, s.goal, where)
    t.event("they found out who it was")
    t.say("""
        And there, {where}, sat {culprit}! It {why}.
        Then they saw it. {Where}, two bright eyes looked at them. It was {culprit}! It {why}.
        "Look, {where}!" called {h}. It was {culprit}! It {why}.
    """)
    t.say("""
        {h} had to laugh. "So it was you!"
        Everybody laughed until their sides hurt.
        "Mystery solved!" said {f}.
    """)
    if s.obstacle == "wrong suspect":
        t.note("sorry", h, f)
        t.say('"I am sorry that I blamed you," {h} said to {f}. "Never mind," said {f}.')
    if s.moral == "kindness":
        t.say(
            "{h} brought it something better, and from then on there was peace.\nThey helped it, and soon it was their friend."
        )
    closing(t, s, ("relieved", "proud", "happy", "glad"), "they found out who it was")
    return f"The Mystery of the {s.goal}"


# -- a kind deed on the way -----------------------------------------------------------------------------------
_GOING_TO = {
    "the fair": "There was going to be a carousel, candy apples and a brass band.",
    "the circus": "A tightrope walker and nine white horses were going to be there.",
    "the puppet show": "Everyone said that it was the funniest show in the world.",
    "the boat trip": "The boat was going to leave at noon, and not a minute later.",
    "the birthday party": "There was going to be a treasure hunt and a cake with three layers.",
    "the concert": "A famous singer was going to sing there for one evening only.",
}
_SHOWS = ("the circus", "the puppet show", "the boat trip", "the concert")
_IN_NEED = sections("""
apples
    A bag had torn open, and dozens of apples were rolling down the road.
cart
    A cart was stuck in the mud and would not move.
goats
    A gate had broken, and eleven goats were running in all directions.
laundry
    The wind had blown all the clean laundry into the trees.
glasses
    {k} was crawling through the grass, looking for a pair of glasses.
firewood
    A huge pile of firewood had to be carried inside before dark.
letters
    A gust of wind had scattered a whole bag of letters.
well
    The bucket had fallen into the well, rope and all.
""")
_DEED = {
    "apples": "picked up every apple and tied the bag with a string",
    "cart": "put flat stones under the wheel and pushed until it came free",
    "goats": "chased the goats back, one by one, and tied up the gate",
    "laundry": "climbed up and down until the last sock was in the basket",
    "glasses": "found the glasses under a dandelion and wiped them clean",
    "firewood": "carried log after log until the last one was inside",
    "letters": "ran after the letters until all of them were back in the bag",
    "well": "fished out the bucket with a long hook",
}
_REWARD = ways("""
late > ride: neighbor stranger
    "Hop on!" said {k}. "My donkey is as fast as the wind." And so {h} got to {goal} just in time.
late > shortcut: neighbor stranger grandparent
    "I know a shortcut," said {k}. "Through the hazel bushes and over the wall." {h} arrived before everyone else.
missed > own party: neighbor stranger
    It was too late for {goal}. But {k} said, "Then we will have our own party!" \
        and took out [a fiddle|an accordion|a guitar] and a plum pie.
missed > second chance: grandparent stranger neighbor
    It was too late for {goal}. But the next morning, {k} stood at the door with two tickets. \
        "They do it all again today!"
in a hurry > everyone waited: stranger neighbor grandparent
    {h} ran and ran. When {h.he} got there, nothing had begun yet. Everybody had been waiting for {k}!
in a hurry > best seat: neighbor grandparent
    When they got to {goal} together, all the seats were taken. But {k} had kept two in the first row.
""")
_DOUBT = sections("""
late
    "If I stop now, I will be late," thought {h}. But only for a second.
    {h} looked at the clock on the tower. There was not much time.
missed
    {h} knew what it meant to stop here. But {h.he} could not just walk by.
    Far away, the bells were already ringing. {h} stopped all the same.
in a hurry
    Everybody else hurried past. {h} was in a hurry, too, but {h.he} stopped.
    "Somebody else will help," one might have thought. {h} did not think so.
""")


@plot(
    "kindness",
    [f"{goal}/{need}" for goal in _GOING_TO for need in _IN_NEED],
    _REWARD.values(),
    ("kindness", "together"),
    fits=lambda s: s.resolution not in ("second chance", "best seat") or s.goal.split("/")[0] in _SHOWS,
)
def kindness(t: Teller, s: Skeleton) -> str:
    goal, need = s.goal.split("/")
    h = opening(t)
    t.cast.update(goal=goal, deed=_DEED[need])
    when(t)
    t.note("wants", h, f"go to {goal}")
    t.event("{h} set out")
    t.say("""
        {when}, {h} wanted to go to {goal}.
        {h} had waited for weeks to go to {goal}. {When}, it was time.
        "Today I will go to {goal}!" said {h} {when}.
    """)
    t.say(_GOING_TO[goal], p=0.7)
    t.say(
        "{h} put on [a clean scarf|the best hat] and set out.\n{h} ran down the road, singing.\n{h} set out with a light heart.",
        p=0.7,
    )
    k = t.elder("k", s.helper)
    t.go("the road", h, k)
    t.event("{h} met {k}")
    t.say("""
        Halfway there, {h} met {k.intro}.
        By the side of the road stood {k.intro}, sighing.
        At the crossroads, {h} saw {k.intro}.
    """)
    t.say(_IN_NEED[need])
    t.feel(k, t.pick(("upset", "worried", "sad")))
    t.say(_DOUBT[s.obstacle])
    t.paragraph(0.5)
    t.note("helps", h, k)
    t.event("{h} helped {k}")
    t.say("""
        "Let me help you," said {h}. {h.He} {deed}.
        {h} did not think twice. {h.He} {deed}.
        {h} smiled at {k} and {deed}.
    """)
    t.say("""
        {k} shook {h}'s {h.hand}. "What a kind heart you have."
        "Bless you," said {k}. "Not everyone would have stopped."
        "How can I thank you?" asked {k}. "There is no need," said {h}.
    """)
    t.say(_REWARD[s.obstacle, s.resolution].text)
    t.event("{k} did something kind for {h}")
    t.say("""
        They laughed and clapped until their {h.hands} hurt.
        It was even better than {h} had hoped.
        {h} had never had so much fun.
    """)
    closing(t, s, ("happy", "delighted", "glad", "cheerful"), "{k} did something kind for {h}", partner="k")
    return t.fill("{h} on the Way to ") + goal
