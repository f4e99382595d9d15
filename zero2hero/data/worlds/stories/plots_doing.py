"""Stories about doing: making something, learning a skill, entering a contest."""

# ruff: noqa: E501  (a line of a table is one record)

from __future__ import annotations

from zero2hero.data.worlds.stories import lexicon as lex
from zero2hero.data.worlds.stories.beats import closing, meet, opening, scene, visit, when
from zero2hero.data.worlds.stories.skeleton import Skeleton, plot
from zero2hero.data.worlds.stories.tables import rows, sections, ways
from zero2hero.data.worlds.stories.telling import Teller, Thing, article, listing

# -- making something -----------------------------------------------------------------------------------------
# what; how (b bake, w wood, c craft); verb, past; materials; the one that is missing; what can replace it
_ITEMS = {
    item: (how, verb, past, tuple(materials.split(", ")), missing, instead)
    for item, how, verb, past, materials, missing, instead in rows("""
honey cake; b; bake; baked; flour, butter, honey; honey; maple syrup
apple pie; b; bake; baked; flour, apples, sugar; sugar; honey
loaf of bread; b; bake; baked; flour, water, yeast; yeast; sour milk
pot of soup; b; cook; cooked; carrots, barley, salt; barley; rice
berry tart; b; bake; baked; flour, cream, berries; cream; cheese
birdhouse; w; build; built; boards, nails, paint; paint; beet juice
toy ship; w; build; built; wood, string, cloth; cloth; birch bark
scarecrow; w; build; built; straw, poles, cloth; straw; dry grass
puppet theater; w; build; built; boxes, rope, paint; rope; an old belt
doghouse; w; build; built; boards, nails, tar; tar; thick bark
paper dragon; c; make; made; paper, glue, string; glue; flour paste
flower crown; c; make; made; daisies, ivy, thread; thread; long grass
patchwork pillow; c; sew; sewed; cloth, thread, feathers; feathers; soft moss
clay bowl; c; make; made; clay, water, paint; paint; walnut juice
lion mask; c; make; made; cardboard, wool, glue; wool; dry straw
shell necklace; c; make; made; shells, string, beads; string; fishing line
""")
}
_TROUBLE = sections("""
b missing
    But the jar was empty. There was no {missing} in the whole house!
    "Oh no," said {h}. "We have no {missing}!"
b broke
    But {h} began to daydream and forgot the time. There was smoke, and everything was as black as coal.
    {h} was in such a hurry that it got much too hot and tasted like ashes.
b spilled
    Then {h}'s elbow bumped the bowl. Splash! Everything landed on the floor.
    {h} stirred too fast, and half of it splashed against the wall.
w missing
    But soon {h} saw that there was no {missing} left.
    Everything was ready except for one thing. There was no {missing} anywhere.
w broke
    {x.The} wobbled and creaked, and then it fell apart.
    {h} was almost done when one side cracked from top to bottom.
w spilled
    Then {h} stepped into a pot of paint, and a big blue blot spread over the finest part.
    Then {h} spilled a cup of cocoa over the finest part.
c missing
    But when {h} looked into the drawer, there was no {missing} left.
    Halfway through, the {missing} ran out.
c broke
    {h} pulled too hard, and {x.the} broke right down the middle.
    Then {h} dropped {x.the}, and it came apart.
c spilled
    Then {h} knocked over a bottle of ink. A big black blot spread over the finest part.
    A drop of red paint fell on {x.the}, and then another, and another.
""")
_MEND = ways("""
missing > borrow: neighbor grandparent friend
    "I have plenty of {missing}," said {p}, and gave {h} as much as {h.he} needed.
missing > swap: parent grandparent sibling
    "Have you ever tried {instead}?" asked {p}. {h} had not. They tried it, and it worked even better.
missing > search: sibling friend parent
    "Let us look everywhere," said {p}. They looked in every corner, and at last {h} found some {missing} in an old tin.
broke > again: parent grandparent neighbor
    "The first one is for learning," said {p}. So {h} started again, more slowly, while {p} watched.
    "I have spoiled a hundred of them," said {p} with a laugh. Then they tried again, one step at a time.
broke > four hands: friend sibling parent
    "You hold, and I count," said {p}. They began again from the start, and this time nothing went wrong.
spilled > clean up: parent sibling friend
    "That can be mended," said {p}. They cleaned up the mess together, and then {h} did that part once more.
spilled > make it better: grandparent friend neighbor
    "A mistake is just an idea that came too early," said {p}. So {h} turned it into something new, \
        and it looked [very special|better than before].
""")
_PRESENT_FOR = ("parent", "grandparent", "friend", "neighbor")


@plot(
    "making",
    [f"{item}/{who}" for item in _ITEMS for who in _PRESENT_FOR],
    _MEND.values(),
    ("mistakes", "patience", "together", "plan", "home"),
    fits=lambda s: (
        s.goal.split("/")[1] != s.helper
        and not (s.resolution == "make it better" and _ITEMS[s.goal.split("/")[0]][0] == "b")
        and not (s.moral == "mistakes" and s.obstacle == "missing")
        and not (s.moral == "patience" and s.resolution != "again")
        and not (s.moral == "plan" and s.resolution not in ("swap", "search", "four hands"))
        and not (s.moral == "together" and s.resolution == "again")
    ),
)
def making(t: Teller, s: Skeleton) -> str:
    item, who = s.goal.split("/")
    how, verb, past, materials, missing, instead = _ITEMS[item]
    h = opening(t)
    g = t.helper(who, "g")
    colored = how == "c" and "paint" not in materials and t.chance(0.4)
    x = t.own("x", Thing(item, "", t.pick(lex.COLORS) if colored and item != "lion mask" else ""), None)
    t.cast.update(verb=verb, past=past, materials=listing(materials), missing=missing, instead=instead)
    when(t)
    t.note("wants", h, t.fill("{verb} {x.a}"))
    t.say(
        """
        {when}, {h} wanted to {verb} {x.a} for {g.intro}.
        {h} wanted to give {g.intro} something special. So {when}, {h.he} decided to {verb} {x.a}.
        "I am going to {verb} {x.a} for {g}," said {h} {when}.
    """
        if who in ("parent", "grandparent")
        else """
        {when}, {h} wanted to {verb} {x.a} for {g.intro}.
        {h} wanted to give {g.intro} something special. So {when}, {h.he} decided to {verb} {x.a}.
    """
    )
    t.note("needs", x, listing(materials))
    t.say(
        """
        For this, {h} needed {materials}.
        {h.He} collected {materials} and started at once.
        On the table lay {materials}.
    """
        if s.obstacle != "missing"
        else """
        For this, {h} needed {materials}.
        "I need {materials}," {h} said to {h.himself}.
    """
    )
    if s.obstacle != "missing":
        t.say(
            """
            {h} worked for an hour and hummed a tune.
            {h} rolled up both sleeves and set to work.
            {h} worked hard all morning.
        """
            if not t.animals
            else """
            {h} worked for an hour and hummed a tune.
            {h} worked hard all morning.
        """
        )
    t.event("something went wrong")
    t.say(_TROUBLE[f"{how} {s.obstacle}"])
    t.feel(h, t.pick(("disappointed", "upset", "sad")), "something went wrong", sign=0.5)
    p = meet(t, s)
    t.say("""
        {h} pointed to the table.
        "It is all going wrong," said {h}.
        "I wanted to {verb} {x.a}," said {h}, "and now look!"
    """, p=0.7)  # fmt: skip
    t.event("{p} came to help")
    t.say(_MEND[s.obstacle, s.resolution].text)
    t.gain(h, x, "makes")
    t.say(
        """
        At last {x.the} was ready. It was the best {x} that {h} had ever {past}.
        When {h} was done, {x.the} looked wonderful.
        {h} stepped back and looked at {x.the}. It was just right.
    """
        if how != "b"
        else """
        Soon {x.the} was ready, and the whole house smelled delicious.
        At last {x.the} was done. It was warm and [golden|good].
    """
    )
    t.go("home", g)
    t.where[h] = "home"
    t.give(h, x, g)
    t.event("{h} gave {x.the} to {g}")
    t.say("""
        That evening, {h} gave {x.the} to {g}. "For me?" asked {g}. "How lovely!"
        {h} carried {x.the} to {g} and said, "This is for you!" {g} was speechless.
        "Surprise!" said {h}, and gave {x.the} to {g}. {g} laughed with joy.
    """)
    t.feel(g, t.pick(("delighted", "happy")), "{h} gave {x.the} to {g}", sign=0.3)
    t.where[p] = "away"
    closing(t, s, ("proud", "happy", "glad"), "{h} gave {x.the} to {g}")
    return f"The {item}"


# -- learning a skill -----------------------------------------------------------------------------------------
# skill; worlds; how it goes wrong; the hint; how it goes well
_SKILLS = {
    skill: (worlds, fail, hint, well)
    for skill, worlds, fail, hint, well in rows("""
ride a bicycle; h; The wheel wobbled, and {h} landed in a hedge.; Look ahead and not at your feet; {h} rode all the way around the square.
whistle; ha; Only a wet hiss came out.; Make your lips small and blow very gently; A clear, high note rang through the air.
swim; ha; {h} swallowed water and coughed.; Lie on your back first and let the water carry you; {h} glided through the water like a fish.
juggle; ha; All three balls fell on {h}'s toes.; Start with one ball, then take two; Three balls flew in a perfect circle.
play the violin; h; It sounded like a cat with a cold.; Hold the bow as lightly as a feather; A sweet melody floated out of the window.
skip stones; ha; The stones sank with a plop.; Choose a flat stone and bend your knees; The stone skipped seven times.
skate on ice; ha; {h}'s feet flew up, and down {h.he} sat.; Push to the side and not to the back; {h} drew a big figure eight on the ice.
read; ha; The letters danced about like flies.; Put one sound after the other, like steps; {h} read a whole page aloud.
knit; ha; The wool turned into one big knot.; Count each stitch out loud; {h} knitted a sock with stripes.
dance; ha; {h} stepped on everybody's toes.; Listen to the drum and forget your feet; {h} whirled around like a leaf in the wind.
paint a horse; h; It looked like a potato with legs.; Look at a real one for a long time; The horse seemed to gallop off the paper.
do a handstand; ha; {h} tipped over and rolled down the slope.; Look at one point on the ground and stretch your toes; {h} stood upside down, as straight as a candle.
row a boat; ha; The boat turned in circles.; Pull both oars at the same time; The boat went straight to the other side.
tie a sailor's knot; ha; The knot fell apart at once.; Think of a snake that goes around a tree; The knot held as firm as iron.
throw a ball far; ha; The ball dropped right in front of {h}.; Turn your whole body and not just your arm; The ball flew over the barn.
sing a high note; ha; {h}'s voice cracked, and a dog howled.; Breathe down into your belly; The note was as clear as a bell.
""")
}
_HINDRANCE = sections("""
gives up
    "I will never learn it!" said {h}.
    {h} threw everything down. "It is too hard for me."
laughed at
    Two big [boys|girls] stood by the fence and laughed.
    "Look at that!" somebody called, and others began to laugh.
hurry
    {h} wanted to know how to do it at once, but it only got worse.
    {h} tried faster and faster, and it went worse and worse.
tired
    {h} tried again and again, until {h.his} arms were as heavy as lead.
    After an hour, {h} was so tired that {h.he} had to lie down.
""")
_PRACTICE = ways("""
gives up > every day: parent grandparent neighbor sibling
    "A little every day is enough," said {p}.
    "A big tree begins as a tiny seed," said {p}. "Give it time."
gives up > together: friend sibling
    "I cannot do it, either," said {p}. "Let us learn it together!"
gives up > story: grandparent neighbor parent
    "I needed a whole year to learn that," said {p}. "I only knew that I was going to do it one day."
laughed at > ignore: sibling parent friend
    "Those who laugh have forgotten that they were beginners, too," said {p}.
    "Let them laugh," said {p}. "Laughing is easy, and you are doing something hard."
laughed at > quiet place: grandparent friend neighbor
    "Come, I know a quiet place behind the mill," said {p}. "Nobody will look at you there."
hurry > slowly: parent grandparent neighbor
    "Do it as slowly as a snail," said {p}. {h} giggled, but it helped.
    "Hurry makes a hundred knots," said {p}. "Take your time."
hurry > watch: sibling neighbor grandparent
    "Do not do anything. Only watch," said {p}, and showed how it was done, again and again.
tired > rest: parent grandparent friend
    "Even the sun takes a rest," said {p}. They had some soup and a long nap.
    "A tired horse cannot jump," said {p}. So {h} slept until the next morning.
""")


@plot(
    "skill",
    _SKILLS,
    _PRACTICE.values(),
    ("practice", "patience", "mistakes", "friends"),
    fits=lambda s: s.moral != "friends" or s.helper == "friend",
)
def skill(t: Teller, s: Skeleton) -> str:
    worlds, fail, hint, well = _SKILLS[s.goal]
    if "a" not in worlds:
        t.animals = False
    h = opening(t, avoid=("patient",))
    t.cast.update(skill=s.goal, hint=hint, days=lex.NUMBERS[3 + int(t.random() * 8)])
    t.note("wants", h, f"learn to {s.goal}")
    t.say("""
        More than anything, {h} wanted to learn to {skill}.
        {h} wanted to learn to {skill}. Everyone else seemed to know how.
        There was one thing that {h} could not do yet, and {h.he} wanted to learn to {skill}.
    """)
    when(t)
    t.event("{h} tried for the first time")
    t.say("""
        {when}, {h} tried it for the first time.
        {when}, {h} gave it a try.
        {when}, {h} took heart and began.
    """)
    t.say(fail)
    t.feel(h, t.pick(("disappointed", "upset")), "{h} tried for the first time", sign=0.3)
    t.say(_HINDRANCE[s.obstacle])
    meet(t, s)
    t.say('"I want to learn to {skill}," said {h}, "but I cannot do it."', p=0.5)
    t.event("{p} gave {h} some advice")
    t.say(_PRACTICE[s.obstacle, s.resolution].text)
    t.say(
        """
        {p} had read about it in a book. "{hint}," it said there.
        "My uncle once told me how," said {p}. "{hint}."
    """
        if s.resolution == "together"
        else """
        "And here is a hint," said {p}. "{hint}."
        "{hint}," {p} said. "That is the whole secret."
        "And one more thing," said {p}. "{hint}. Then it will work."
    """
    )
    t.note("days", h, t.cast["days"])
    t.say("""
        {h} practiced every morning, for {days} days.
        So {h} practiced for {days} days.
        For {days} days, {h} practiced and practiced.
    """)
    t.say("""
        Each day it went a little better.
        Some days were good, and some were not.
        On the second day it was hard, but not quite as hard.
    """, p=0.6)  # fmt: skip
    t.event("{h} could do it")
    t.say("""
        And then, at last, it happened.
        One morning, everything came together.
        Then came the great day.
    """, p=0.7)  # fmt: skip
    t.say(well)
    t.say("""
        "I can do it!" [cried|shouted|cheered] {h}.
        "You did it!" called {p}.
        {p} clapped. "Bravo, {h}!"
    """)
    closing(t, s, ("proud", "happy", "delighted"), "{h} could do it")
    return f"{h} Learns to {s.goal}"


# -- a contest ------------------------------------------------------------------------------------------------
# contest: places; what one does; who is first at what; what happens to the rival
_CONTESTS = {
    name: (tuple(places.split(", ")), did, glory, mishap)
    for name, places, did, glory, mishap in rows("""
running race; the park, the meadow, the hill, the farm; ran; crossed the finish line; {f} tripped over a root and hurt {f.his} knee
boat race; the lake, the river; rowed; reached the red buoy; {f}'s boat began to leak
raft race; the river, the lake; paddled; reached the bridge; {f}'s raft came apart
sack race; the park, the meadow, the farm; hopped; crossed the finish line; {f}'s sack tore open and {f.he} fell down
wagon race; the hill, the meadow; steered; rolled over the finish line; a wheel came off {f}'s wagon
treasure hunt; the forest, the orchard, the hill; searched; found the chest; {f} got stuck in a thorny bush
apple picking contest; the orchard; picked; filled the basket; {f}'s ladder fell over and left {f.him} hanging on a branch
egg race; the meadow, the park, the farm; walked; carried the egg over the line; {f} dropped the egg and began to cry
swimming race; the lake, the river; swam; touched the old post; {f} got a cramp in one leg
""")
}
_BEFORE = sections("""
boast
    "I will win, of course," said {f}. "I always win."
    {f} laughed. "Nobody can beat me," {f.he} said.
nerves
    {h} looked at all the people and did not want to go on.
    {h} had not slept all night.
last time
    The year before, {h} had come in last.
    {h} had never won anything in {h.his} life.
""")
_CONTEST = ways("""
boast > win: parent grandparent sibling
    {h} did not listen. {h.He} {did} as well as {h.he} could, {glory} first and won!
boast > help: parent grandparent sibling friend
    Halfway through, {mishap}. {h} stopped and helped {f.him}. Somebody else came in first, \
        but everybody cheered for {h}.
nerves > tie: sibling friend parent
    {h} and {f} {did} side by side, and both {glory} at the very same moment. It was a tie!
nerves > help: grandparent friend
    Halfway through, {mishap}. {h} stopped and helped {f.him}. Somebody else came in first, \
        but everybody cheered for {h}.
nerves > second: parent grandparent sibling
    {h} {did} as well as {h.he} could. {f} {glory} first, and {h} came in second. \
        {h} went over and shook {f}'s {f.hand}.
last time > win: grandparent friend sibling
    {h} had practiced for months. {h.He} {did} with all {h.his} might, {glory} first and won!
last time > help: parent friend
    Halfway through, {mishap}. {h} stopped and helped {f.him}. Somebody else came in first, \
        but everybody cheered for {h}.
last time > second: parent sibling
    {h} {did} better than ever. {f} {glory} first, and {h} came in second. "You were so good!" {h} told {f}.
""")
_MORAL_OF = {
    "win": ("practice", "courage"),
    "help": ("fair", "kindness"),
    "tie": ("friends", "fair"),
    "second": ("fair", "mistakes"),
}


@plot(
    "contest",
    _CONTESTS,
    _CONTEST.values(),
    ("practice", "courage", "fair", "kindness", "friends"),
    fits=lambda s: s.moral in _MORAL_OF[s.resolution],
)
def contest(t: Teller, s: Skeleton) -> str:
    places, did, glory, mishap = _CONTESTS[s.goal]
    h = opening(t)
    when(t)
    visit(t, *places)
    prize = t.own(
        "prize",
        Thing(t.pick(("cup", "medal", "ribbon", "wreath", "pennant")), "", t.pick(("golden", "silver", "blue", "red"))),
        None,
    )
    t.note("contest", h, s.goal)
    t.cast.update(contest=s.goal, a_contest=article(s.goal), did=did, glory=glory)
    t.say("""
        {when}, there was {a_contest} {place.at}. The prize was {prize.a}.
        {when}, everybody came to {place} for the great {contest}. The winner was going to get {prize.a}.
        "Have you heard?" somebody asked {h} {when}. "There is {a_contest} {place.at}, and the prize is {prize.a}!"
    """)
    t.say("""
        {h} wanted to take part.
        {h} put down {h.his} name at once.
        Of course, {h} was going to be there.
    """)
    f = t.child("f", "{a_kind} named {name}")
    t.go(t.cast["place"], f)
    t.cast["mishap"] = t.fill(mishap)
    t.say("{h} stood next to {f.intro}.\nThere was also {f.intro}.\nNext to {h} stood {f.intro}.")
    t.event("{h} met {f}")
    scene(t, 0.3)
    t.say(_BEFORE[s.obstacle])
    t.feel(h, "nervous", "the contest began", sign=0.6)
    p = t.helper(s.helper)
    t.go(t.cast["place"], p)
    t.note("cheers", p, h)
    t.say("""
        "Just do your best," said {p.intro}.
        {p.intro} [waved|winked] from the crowd. "I am proud of you already!"
        {p.intro} gave {h} a hug. "Have fun, that is what matters."
    """)
    t.paragraph(0.5)
    t.event("the contest began")
    t.say(
        "Then a [whistle|horn|bell] sounded.\nThree, two, one, go!\nA [whistle|horn] gave the sign, and everyone began."
    )
    t.event("{h} helped {f}" if s.resolution == "help" else "the contest was over")
    if s.resolution == "help":
        t.note("helps", h, f)
    t.note("result", h, {"win": "won", "help": "lost", "tie": "tied", "second": "second"}[s.resolution])
    t.say(_CONTEST[s.obstacle, s.resolution].text)
    if s.resolution == "win":
        t.gain(h, prize, "wins")
        t.say("{h} got {prize.the} and held it up high.\nThe crowd roared when {h} got {prize.the}.")
        t.say('"Well done, {h}," said {f}. "You were better than I was."', p=0.5 if s.obstacle != "boast" else 1.0)
    elif s.resolution == "help":
        t.say(
            '"You could have won," said {f}. "Thank you for helping me."\n"Nobody has ever done that for me," said {f}.'
        )
        t.feel(f, "thankful", "{h} helped {f}", sign=0.2)
    elif s.resolution == "tie":
        t.say('"You keep {prize.the} this week, and I keep it next week," said {h}. {f} liked that idea.')
    else:
        t.gain(f, prize, "wins")
        t.say("{f} got {prize.the} and let {h} hold it for a while.\n{f} got {prize.the} and smiled at {h}.")
    closing(t, s, ("happy", "proud", "glad", "cheerful"), "the contest was over")
    return f"The {s.goal}"
