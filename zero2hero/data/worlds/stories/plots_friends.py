"""Stories between friends: a quarrel is mended, food is shared, a newcomer is welcomed, a promise is kept."""

# ruff: noqa: E501  (a line of a table is one record)

from __future__ import annotations

from zero2hero.data.worlds.stories import lexicon as lex
from zero2hero.data.worlds.stories.beats import GOOD, closing, opening, scene, visit, when
from zero2hero.data.worlds.stories.skeleton import Skeleton, plot
from zero2hero.data.worlds.stories.tables import sections, ways
from zero2hero.data.worlds.stories.telling import Teller

# -- a quarrel mended -----------------------------------------------------------------------------------------
_QUARREL = sections("""
turn
    Both of them wanted to play with {x.a} that lay on the wall. "I saw it first!" said {h}. "No, I did!" said {f}.
    They found {x.a} in the grass. {h} pulled on one side and {f} pulled on the other. "Mine!" they both shouted.
rules
    They played [tag|marbles|hide-and-seek]. "You cheated!" said {h}. "I did not!" said {f}. "You made up that rule!"
    They raced to the gate and got there side by side. "I won!" cried {h}. "No, I won!" cried {f}.
captain
    They built a ship out of old boxes. "I am the captain," said {h}. "You were the captain last time," said {f}.
    They made a fort. {h} wanted to rule the fort, but so did {f}. "There can be only one ruler!" they said.
late
    {h} waited and waited, but {f} came an hour late. "You forgot me!" said {h}.
    "You said you would hurry," {h} said when {f} came at last. "I sat here alone for an hour!"
broken
    {f} bumped into the sand castle that {h} had built. It fell to pieces. "You ruined it!" cried {h}.
    {h} had made a tower of stones. {f} ran past, and the tower crashed down. "Look what you did!" cried {h}.
laughed
    {h} sang a new song. {f} began to giggle. "Do not laugh at me!" cried {h}.
    {h} showed {f} a picture of a horse. {f} laughed out loud. "That is not funny!" said {h}.
""")
_BOTH = ("turn", "rules", "captain")  # both are to blame; otherwise the friend has an explanation
_PARTING = sections("""
walks off
    {h} turned around and [walked|stomped] off without another word. {h.He} sat down in a corner, all alone.
    "I do not want to play with you anymore!" said {h}, and ran away.
silence
    They sat back to back and did not say a word. The minutes crept by.
    {h} would not look at {f}, and {f} would not look at {h}. It was a long and boring silence.
harsh words
    "You are not my friend anymore!" {h} shouted. Then it was very quiet.
    "Then go away!" shouted {h}. The words flew out like arrows and could not be caught again.
""")
_PEACE = ways("""
both > turns: parent grandparent sibling neighbor
    "Why not take turns?" asked {p}. "First one, then the other." {h} and {f} looked at each other and nodded.
    {p} took a coin out of a pocket. "Heads, {h} goes first. Tails, {f} goes first. Then you change." That was fair.
both > new game: grandparent sibling neighbor parent
    "I know a game that nobody can win alone," said {p}. It took two players to do it, and soon both were laughing.
    "Can the two of you get this ball up the hill without using {h.hands}?" asked {p}. \
        They had to work as one, and it was fun.
both > look back: grandparent parent neighbor
    "Tomorrow, will you remember what it was about?" asked {p}. {h} thought for a while. "No," {h.he} said softly. \
        "But I will remember {f}."
    "I once lost a good friend over a silly thing," said {p}. "I am still sorry." {h} swallowed and went to find {f}.
friend > listen: parent grandparent neighbor sibling
    "Did you ask {f} why?" said {p}. {h} shook {h.his} head. So {h} went and asked, and this time {h.he} listened. \
        "{reason}," said {f}.
    "There is always another side," said {p}. So {h} took a deep breath and let {f} explain. "{reason}," said {f}.
friend > gift: grandparent parent sibling
    "Look over there," said {p}. {f} was standing by the gate with a [daisy chain|bunch of clover|shiny acorn]. \
        "{reason}," said {f}. "This is for you."
friend > mend: parent neighbor sibling
    "Anger is heavy to carry," said {p}. "Put it down for a minute and talk." So they talked. "{reason}," said {f}. \
        "Let me make it up to you."
""")
_REASON = {
    "late": (
        "I found a baby bird and had to bring it home",
        "My little brother fell down and I helped him",
        "I lost my way in the fog",
    ),
    "broken": ("I tripped over my own feet", "I did not see it because the sun was in my eyes", "It was an accident"),
    "laughed": (
        "I was laughing because it made me so happy",
        "A ladybug was walking on my nose and it tickled",
        "I only laughed because I liked it",
    ),
}


def _peaceful(s: Skeleton) -> bool:
    return (s.goal.split("/")[0] in _BOTH) == (s.obstacle == "both") and (s.moral != "fair" or s.obstacle == "both")


@plot(
    "quarrel",
    [f"{cause}/{parting}" for cause in _QUARREL for parting in _PARTING],
    _PEACE.values(),
    ("sorry", "listen", "friends", "fair"),
    fits=_peaceful,
)
def quarrel(t: Teller, s: Skeleton) -> str:
    cause, parting = s.goal.split("/")
    h = opening(t, avoid=("shy", "quiet", "patient", "gentle"))
    f = t.child("f", "{h.his} best friend {name}" + (" the {kind}" if t.animals else ""))
    when(t)
    visit(t)
    t.go(t.cast["place"], f)
    t.say(
        """
        {when}, {h} was waiting for {f.intro} {place.at}. They wanted to play together.
        {when}, {h} was going to meet {f.intro} {place.at}. {h} was there first.
    """
        if cause == "late"
        else """
        {when}, {h} met {f.intro} {place.at}.
        {when}, {h} and {f.intro} were playing {place.at}.
        {when}, {h} and {f.intro} went to {place} together.
    """
    )
    scene(t, 0.4)
    if cause == "turn":
        t.thing("x")
    t.event("{h} and {f} had a quarrel")
    t.say(_QUARREL[cause])
    t.say(_PARTING[parting])
    t.feel(f, t.pick(("sad", "upset", "lonely")), "{f} and {h} had a quarrel", sign=0.3)
    t.feel(h, t.pick(("angry", "upset")), "{h} and {f} had a quarrel", sign=0.5)
    t.paragraph(0.6)
    t.helper(s.helper)
    t.go(t.cast["place"], t.cast["p"])
    t.say("""
        {p.intro} had seen it all and sat down next to {h}.
        After a while, {p.intro} came by. "Where is {f}?" {h} only shrugged.
        {p.intro} came along and heard the whole story from {h}.
    """)
    t.note("helps", t.cast["p"], h)
    t.event("{p} talked to {h}")
    t.cast["reason"] = t.pick(_REASON[cause]) if cause in _REASON else ""
    t.say(_PEACE[s.obstacle, s.resolution].text)
    t.note("sorry", h, f)
    t.event("{h} said sorry to {f}")
    t.say("""
        "I am sorry, {f}," said {h}. "[I am sorry, too|Me, too]," said {f}.
        "I was wrong to be so angry. I am sorry," {h} said to {f}. They shook {h.hands}.
        {h} gave {f} a hug. "I am sorry that I was so loud," said {h}. "Friends?" "Friends," said {f}.
        "Sorry," said {h}. "Can we start again?" {f} smiled. "Yes, please!"
    """)
    t.say("""
        Soon they were playing again as if nothing had happened.
        They played until the sun was low.
        They never fought about it again.
        The two of them laughed about it for a long time.
    """, p=0.6)  # fmt: skip
    closing(t, s, ("happy", "relieved", "glad", "calm"), "{h} and {f} were friends again", partner="f")
    return t.fill("{h} and {f} Make Up")


# -- sharing --------------------------------------------------------------------------------------------------
_HUNGRY = sections("""
forgot
    {f} had left {f.his} lunch at home.
    "I forgot my lunch," said {f}, and {f.his} tummy growled.
    {f} looked into an empty bag. All the food was still on the kitchen table.
stolen
    {f} had nothing left. A greedy gull had snatched {f.his} sandwich.
    "A goat ate my lunch," said {f}. "It even ate the paper."
dropped
    {f} had dropped {f.his} lunch in a puddle.
    {f} had tripped, and all {f.his} food had rolled into the mud.
long way
    {f} had come a long way and had not eaten since breakfast.
    {f} had walked for hours over the hills and was very hungry.
""")
_HESITATE = sections("""
greedy
    {h} wanted to keep {all} {many}. {h} hid them behind {h.his} back.
    {h} looked at the {many}. {h.He} did not want to give any of them away.
saved
    {h} had wanted to save the {many} for later. {h} did not know what to do.
    "These are for tonight," thought {h}. But {f} looked so hungry.
few
    {h} counted the {many} once more. There were not many, and {h.he} was hungry, too.
    "If I share them, I will have less," thought {h}.
""")
_NUDGE = ways("""
greedy > remembers: parent grandparent friend
    Then {h} thought of {p.intro}, who had once shared a warm coat with {h.him} in the rain.
    Then {h} remembered what {p.intro} always said: "Food tastes better with company."
greedy > ashamed: sibling friend grandparent
    Then {h} thought of {p.intro}, who always gave {h.him} the biggest piece. {h.His} cheeks grew warm.
saved > remembers: parent grandparent sibling
    Then {h} remembered the words of {p.intro}: "A full heart is better than a full bag."
    {h} thought of {p.intro}. "What would {p} do here?" The answer was easy.
few > remembers: parent grandparent
    Then {h} thought of {p.intro}, who could make one pot of soup enough for the whole street.
few > same hunger: sibling friend
    Then {h} remembered the day when {h.he} had been hungry, and {p.intro} had shared a [pie|melon|pot of soup] with {h.him}.
""")
_RETURN = sections("""
drink
    "I have something, too," said {f}, and took out a bottle of [lemonade|apple juice|cold tea]. They drank it together.
game
    After the meal, {f} taught {h} a new game with [pebbles|sticks|acorns].
    "Now I have enough strength to fly!" said {f}, and they played airplanes.
story
    {f} thanked {h} with a story about a [whale who was afraid of water|dragon who could not roar|king with no socks].
later
    The next day, {f} came back with a whole basket of [grapes|blueberries|warm rolls] and shared them with {h}.
""")


@plot(
    "sharing",
    [f"{why}/{back}" for why in _HUNGRY for back in _RETURN],
    _NUDGE.values(),
    ("share", "kindness", "together"),
    fits=lambda s: s.goal != "stolen/later",
)
def sharing(t: Teller, s: Skeleton) -> str:
    why, back = s.goal.split("/")
    h = opening(t, avoid=("kind", "helpful", "thoughtful"))
    f = t.child("f", "{a_kind} named {name}" if t.chance(0.5) else "{h.his} friend {name}")
    one, many = t.pick(lex.FOODS)
    total = 3 + int(t.random() * 8)
    given = 1 + int(t.random() * (total // 2))
    say = lambda n, noun: f"{lex.NUMBERS[n]} {one if n == 1 else noun}"  # noqa: E731
    t.cast.update(
        many=many,
        all=f"all {lex.NUMBERS[total]}",
        total=say(total, many),
        given=say(given, many),
        left=say(total - given, many),
    )
    when(t)
    visit(t)
    t.go(t.cast["place"], f)
    t.note("number", h, lex.NUMBERS[total], f"{many}|at first")
    t.say("""
        {when}, {h} packed {total} and went to {place}.
        {when}, {h} was {place.at} with a bag. There were {total} in it.
        {when}, {h} carried {total} to {place} in a little [basket|box|tin].
    """)
    scene(t)
    t.say("""
        There {h} met {f.intro}.
        {f.intro} came and sat down beside {h}.
        After a while, {f.intro} came along and said hello to {h}.
    """)
    t.say(_HUNGRY[why])
    if why != "long way":
        t.feel(f, t.pick(("sad", "disappointed")), "{f} had no food", sign=0.4)
    t.say(_HESITATE[s.obstacle])
    t.paragraph(0.5)
    t.helper(s.helper)
    t.say(_NUDGE[s.obstacle, s.resolution].text)
    t.note("number", f, lex.NUMBERS[given], f"{many}|got")
    t.note("shares", h, many, f)
    t.event("{h} shared the {many} with {f}")
    t.say("""
        "Here, take some," said {h}, and gave {f} {given}.
        {h} gave {given} to {f}. "Enjoy your meal!"
        "We can share," said {h}. {h.He} put {given} into {f}'s {f.hands}.
    """)
    t.note("number", h, lex.NUMBERS[total - given], f"{many}|left")
    t.say("""
        Now {h} had {left} left.
        That left {left} for {h}.
    """)
    t.say("""
        They ate [slowly|happily|in the shade] and talked about everything under the sun.
        {f} chewed and smiled. "These are the best {many} in the world!"
        They munched and giggled until only crumbs remained.
    """, p=0.7)  # fmt: skip
    t.event("{f} gave something back")
    t.say(_RETURN[back])
    closing(t, s, ("happy", "glad", "cheerful", "proud"), "{h} shared the {many}")
    return t.fill(f"{{h}} Shares the {many.title()}")


# -- a newcomer -----------------------------------------------------------------------------------------------
_NEWCOMER = sections("""
language
    {f} came from a faraway land and knew only a few words. Nobody understood {f.him}.
    {f} spoke a language that nobody here had ever heard.
shy
    {f} was so shy that {f.he} only whispered.
    {f} stood behind a tree and did not dare to come out.
odd
    {f} wore a very strange [coat|hat|cloak], and some of the others laughed at it.
    {f} did everything in a different way, and the others stared.
homesick
    {f} missed {f.his} old home and did not want to play.
    {f} kept looking down the road that led back to {f.his} old home.
""")
_WELCOME = ways("""
first try fails > drawing: parent grandparent neighbor sibling
    "Pictures speak every language," said {p}. So {h} drew a [sun|house|boat] in the sand. \
        {f} drew a [moon|tree|fish] next to it.
first try fails > music: parent grandparent sibling
    "Try a song," said {p}. {h} began to hum. After a while, {f} hummed along and tapped the beat.
first try fails > snack: parent grandparent neighbor
    "Everybody likes plums," said {p}, and gave {h} two of them. {h} held one out to {f}. {f} took it and smiled.
too shy > game: sibling friend parent
    "Just roll the ball," said {p}. So {h} rolled a ball to {f}. {f} rolled it back. Soon they were both running after it.
too shy > question: parent grandparent neighbor
    "Ask for help with something," said {p}. So {h} asked {f} how to tie a good knot. {f} knew seven of them!
others tease > stand up: parent sibling friend
    "Do what you know is right," said {p}. So {h} walked over, stood beside {f} and said, "We are playing together."
    "One friend is enough to change everything," said {p}. {h} nodded and took {f} by the {f.hand} in front of everybody.
""")
_TRY = sections("""
first try fails
    {h} said hello, but {f} only looked at the ground.
    "Do you want to play?" asked {h}. {f} shook {f.his} head and turned away.
too shy
    {h} wanted to say hello, but no word came out. {h.He} did not know how to begin.
    {h} walked past {f} three times without saying a thing.
others tease
    "Do not play with that one," the others told {h}. {h} did not like that at all.
    The others began to whisper. {h} heard it and felt a knot inside.
""")
_SKILL = sections("""
skips stones
    {f} could make a stone skip nine times.
    {f} knew how to fold a bird out of a leaf.
tells stories
    {f} knew the most wonderful stories about [mountains|deserts|islands] far away.
    {f} could tell the time by looking at the shadows.
funny
    {f} could make the funniest faces that {h} had ever seen.
    {f} could walk on {f.his} {f.hands} and quack at the same time.
""")


@plot(
    "newcomer",
    [f"{why}/{skill}" for why in _NEWCOMER for skill in _SKILL],
    _WELCOME.values(),
    ("welcome", "kindness", "courage"),
    fits=lambda s: not (s.obstacle == "others tease" and s.goal.startswith("homesick")),
)
def newcomer(t: Teller, s: Skeleton) -> str:
    why, skill = s.goal.split("/")
    h = opening(t, avoid=("noisy",) if s.obstacle != "too shy" else ("noisy", "friendly", "lively"))
    when(t)
    visit(t)
    f = t.child("f")
    t.go(t.cast["place"], f)
    t.say("""
        {when}, {h} saw somebody new {place.at}. It was {f.a} named {f}.
        {when}, {f.a} named {f} stood all alone {place.at}. {h} had never seen {f.him} before.
        {when}, {h} was playing {place.at} when a new {f.kind} came by. {f.His} name was {f}.
    """)
    t.say(_NEWCOMER[why])
    t.feel(f, "lonely", "{f} was new", sign=0.4)
    t.event("{h} saw {f} for the first time")
    t.say(_TRY[s.obstacle])
    t.paragraph(0.5)
    t.helper(s.helper)
    t.go(t.cast["place"], t.cast["p"])
    t.say("""
        {h} went to {p.intro} and asked what to do.
        {p.intro} was nearby, so {h} asked for advice.
        {p.intro} had been watching and [waved|called] {h} over.
    """)
    t.note("helps", t.cast["p"], h)
    t.event("{p} gave {h} some advice")
    t.say(_WELCOME[s.obstacle, s.resolution].text)
    t.event("{h} and {f} became friends")
    t.say(_SKILL[skill])
    t.say("""
        "Can you teach me that?" asked {h}. {f} beamed and nodded.
        {h} clapped. "You are amazing, {f}!"
        Before long, the others came to watch, and they all played together.
    """)
    t.feel(f, t.pick(("happy", "glad", "cheerful")), "{f} had a friend", sign=0.2)
    closing(t, s, GOOD, "{h} had a new friend")
    return t.fill("A New Friend for {h}")


# -- a promise ------------------------------------------------------------------------------------------------
_PROMISE = {  # what was promised; what happens when it is forgotten; how it is put right
    "water the flowers": ("The flowers hung their heads", "gave them water, and slowly they stood up again"),
    "feed the chickens": (
        "The chickens cackled with hunger",
        "filled their bowl to the brim, and they pecked it empty",
    ),
    "shut the garden gate": ("The goat had walked in and was eating the beans", "led it out and planted new beans"),
    "bring in the washing": ("The clean shirts lay in the mud", "washed them all again and hung them up to dry"),
    "stir the soup": ("The soup was black at the bottom", "scrubbed the pot and peeled carrots for a new soup"),
    "carry in the firewood": ("The wood was wet, and the stove stayed cold", "carried it in and spread it out to dry"),
    "look after the eggs": ("The nest was as cold as a stone", "wrapped the eggs in warm wool until the hen came back"),
}
_TEMPT = sections("""
a game
    But then {f.intro} came by. "Come and play with me!" said {f}.
    But just then {f.intro} called over the fence, "We need one more player!"
a show
    But then {f.intro} came running. "There are [jugglers|musicians|acrobats] at the bridge! Come and see!" said {f}.
a nap
    But the day was warm and the hay was soft. {h} only wanted to rest for a moment, and {f.intro} lay down, too.
a discovery
    But then {f.intro} whispered, "I have found a secret path." That sounded exciting.
""")
_OUTCOME = ways("""
kept > says no: parent grandparent neighbor
    {h} wanted to go so much. But {h.he} had given {h.his} word. "First I have to {task}," said {h}.
    {h} bit {h.his} lip and shook {h.his} head. "I promised {p} to {task}," {h.he} said. "Go ahead without me."
kept > both together: parent grandparent neighbor
    "I promised to {task}," said {h}. "Then I will help you," said {f}. With four {h.hands} it was done in no time.
    "Wait! I have to {task} first," said {h}. "Let us do it together," said {f}, and so they did.
forgotten > confess: parent grandparent neighbor
    {h} went along and forgot all about it. When {h.he} came back, it was late. {trouble}! \
        "It was my fault," {h} told {p}. Then {h.he} {repair}.
    {h} said yes and did not think of the promise again until evening. {trouble}! {h} wanted to hide. \
        But {h.he} went to {p} and told the truth. Then {h.he} {repair}.
forgotten > remember in time: parent grandparent neighbor
    {h} went along. Halfway down the road, {h.he} stopped. "Oh no, I promised to {task}!" {h.He} ran back \
        as fast as the wind and was just in time.
""")


def _keeps(s: Skeleton) -> bool:
    return not (s.goal.endswith("a nap") and s.obstacle == "kept") and (s.moral != "truth" or s.resolution == "confess")


@plot(
    "promise",
    [f"{task}/{tempt}" for task in _PROMISE for tempt in _TEMPT],
    _OUTCOME.values(),
    ("word", "truth"),
    fits=_keeps,
)
def promise(t: Teller, s: Skeleton) -> str:
    task, tempt = s.goal.split("/")
    h = opening(t, avoid=("forgetful", "careful"))
    p = t.helper(s.helper)
    trouble, repair = _PROMISE[task]
    t.cast.update(task=task, trouble=trouble, repair=repair)
    when(t)
    t.note("promises", h, task, p)
    t.event("{h} made a promise to {p}")
    t.say("""
        {when}, {p.intro} had to go to town. "Can you {task} for me?" {p.he} asked. "I promise," said {h}.
        {when}, {p.intro} asked {h} to {task}. "You can count on me," said {h}. "I promise."
        "Please do not forget to {task}," {p.intro} said {when}. {h} nodded. "I promise!"
    """)
    t.child("f", "{h.his} friend {name}")
    t.say(_TEMPT[tempt])
    if tempt != "a nap":
        t.feel(h, "excited", sign=0.3)
    t.paragraph(0.4)
    if s.obstacle == "forgotten":
        t.event("{h} went off with {f}" if tempt != "a nap" else "{h} fell asleep")
    t.note("keeps" if s.resolution != "confess" else "forgets", h, task, p)
    t.say(_OUTCOME[s.obstacle, s.resolution].text)
    t.event("{p} came back" if s.resolution != "confess" else "{h} told the truth")
    if s.resolution == "confess":
        t.say("""
            {p} was quiet for a moment. "Thank you for telling me," {p.he} said.
            "I am not angry," said {p}. "It was brave of you to say so."
            {p} sighed, and then {p.he} smiled. "Next time you will remember."
        """)
    else:
        t.say("""
            When {p} came back, {p.he} gave {h} a [warm smile|big hug]. "I knew that I could count on you."
            "Well done!" said {p} that evening. "You kept your word."
            That evening, {p} looked around and nodded. "You did just what you promised."
        """)
    if s.resolution == "says no":
        t.say("""
            Later, {f} came back to show {h} everything, and they had fun after all.
            And there was still time to play with {f}.
        """)
    closing(t, s, ("proud", "glad", "happy") if s.resolution != "confess" else ("relieved", "calm", "thankful"))
    return t.fill("{h} Keeps a Promise" if s.resolution != "confess" else "{h} Forgets a Promise")
