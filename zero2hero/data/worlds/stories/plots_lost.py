"""Lost and found: something dear is lost, in one of many ways, and somebody knows how to get it back."""

from __future__ import annotations

from zero2hero.data.worlds.stories.beats import closing, meet, opening, scene, thanks, visit, when
from zero2hero.data.worlds.stories.skeleton import Skeleton, plot
from zero2hero.data.worlds.stories.tables import sections, ways
from zero2hero.data.worlds.stories.telling import Teller

_WATER = ("the river", "the pond", "the lake", "the old bridge", "the brook", "the harbor")
_TAG = {"tree": "l", "bird": "s", "water": "f", "deep": "k", "hole": "s", "sleeper": "", "gone": ""}
_WHERE = sections("""
tree
    in the top of a tall oak
    among the branches of a pine tree
    high up in a chestnut tree
    on the highest branch of an elm
bird
    in a nest on a high branch
    in a nest at the top of a birch
    in a nest high above the path
water
    beside a mossy log
    far away from the bank
    between the reeds
    next to a sunken branch
deep
    at the bottom of the water
    under a flat stone
    between two slippery stones
hole
    in a narrow hole
    in a dark crack
    in a gap under a root
sleeper
    under a big sleeping dog
    under a fat snoring goat
    under a very large sleeping pig
gone
    behind a barrel
    under a heap of leaves
    between two thick roots
    on top of a fence post
    under a bench
    in a patch of nettles
""")
_LOSING = sections("""
tree
    Suddenly a gust of wind snatched {x.the} and whirled it away. It got stuck {where}.
    Then the wind blew hard. It tore {x.the} away from {h}, and a moment later it hung {where}.
    Whoosh! A strong wind carried {x.the} off. It landed {where}.
    The wind began to play with {x.the}. It tugged once, it tugged twice, and then {x.the} was {where}.
bird
    A magpie saw {x.the} glitter. It swooped down, grabbed it and dropped it {where}.
    All at once, a magpie shot past, plucked {x.the} away and hid it {where}.
    Flap, flap! A bold magpie stole {x.the} and carried it off. Soon it lay {where}.
water
    {h} leaned over to look at the fish, and {x.the} fell in with a splash. It came to rest {where}.
    A little wave tugged {x.the} away. Soon it was floating {where}.
    {h} tripped over a root, and {x.the} flew into the water. It drifted until it lay {where}.
deep
    Then {h} stumbled. {x.The} slipped away, went plop and sank. Now it lay {where}.
    Plop! {x.The} rolled over the edge and sank out of sight. It ended up {where}.
    {h} held {x.the} up to the sun, and it slid from {h.his} {h.hand}. Down it sank, until it lay {where}.
hole
    {h} tossed {x.the} into the air and missed the catch. It rolled away and vanished {where}.
    Just then, {h} sneezed so hard that {x.the} went flying. It disappeared {where}.
    {h} hopped over a log, and {x.the} fell down. It bounced twice and got stuck {where}.
sleeper
    {h} put {x.the} down for a moment and chased a butterfly. When {h.he} looked again, it was {where}.
    {h} left {x.the} in the grass and went to pick a flower. When {h.he} came back, it was {where}.
gone
    {h} played for hours. When it was time to leave, {x.the} was gone!
    After a while, {h} reached for {x.the}. It was not there anymore.
    {h} ran, hid and climbed. Only later did {h.he} see that {x.the} was missing.
""")
_IN_VAIN = sections("""
tree
    {h} jumped as high as {h.he} could, but it was no use.
    {h} shook the trunk. A few leaves came down, but {x.the} did not.
    {h} threw a stick at it and missed by a mile.
    {h} tried to climb up, but the bark was too smooth.
bird
    "Give it back!" called {h}. The bird only cackled.
    {h} flapped {h.his} arms and shouted, but the bird did not care.
    {h} could see it gleam up there, but it was much too high.
water
    {h} reached out as far as {h.he} could and nearly fell in.
    {h} tried to fish it out with a twig, but the twig snapped.
    {h} took one step into the water. It was cold and much too deep.
deep
    {h} poked around with a stick, but that only stirred up the mud.
    {h} stared into the water and saw nothing but {h.his} own face.
hole
    {h} pushed one arm in up to the shoulder, but {h.he} could not reach it.
    {h} tried to dig, but the ground was as hard as stone.
sleeper
    {h} pulled at one corner, but it would not move an inch.
    "Please get up," {h} whispered. The only answer was a snore.
    {h} clapped and coughed. The big animal did not even twitch.
gone
    {h} looked left and right, up and down, but found nothing.
    {h} crawled through the bushes and came out with empty {h.hands}.
    {h} turned over every stone, but {x.the} was nowhere.
""")
_FINDING = ways("""
tree > ladder: parent neighbor stranger
    "Wait here," said {p}. {p.He} fetched a long ladder, climbed up step by step and picked up {x.the}.
    {p} leaned a ladder against the trunk and went up, one rung at a time. Soon {p.he} had {x.the}.
tree > shoulders: parent sibling
    "Climb onto my shoulders," said {p}. Up went {h}, stretched as far as possible and pulled {x.the} free.
    {p} lifted {h} up high, and {h} wiggled {x.the} until it came loose.
tree > broom: friend sibling neighbor grandparent
    "I have an idea," said {p}, and came back with a long broom. Poke, poke, poke! {x.The} tumbled down.
    {p} tied two sticks together with string. With that long pole, {p.he} gently knocked {x.the} down.
bird > ladder: parent stranger
    "Wait here," said {p}. {p.He} fetched a long ladder, climbed up step by step and picked up {x.the}.
bird > swap: grandparent friend neighbor
    "Magpies love shiny things," said {p}, and held up some silver foil. \
        The bird flew down to get it and let {x.the} fall.
    "Let us make a trade," said {p}. {p.He} showed the bird a bright bottle cap. \
        The magpie dropped {x.the} to grab the cap, and {p} caught it.
bird > song: grandparent sibling stranger
    {p} began to sing. The magpie opened its beak to sing along, and down fell {x.the}. {p} caught it.
    {p} whistled a funny tune. The magpie bobbed up and down and kicked {x.the} right out of the nest.
water > branch: parent friend sibling
    "This will do," said {p}, and picked up a long branch. {p.He} hooked {x.the} and drew it in, bit by bit.
    {p} lay down flat on the ground and reached out with a rake. Slowly, {p.he} pulled {x.the} ashore.
water > boat: grandparent neighbor stranger
    {p} untied a small rowboat, rowed out and lifted {x.the} out of the water.
    "My boat is not far," said {p}. With a few strokes {p.he} was there and scooped up {x.the}.
water > ripples: friend grandparent sibling
    "Watch this," said {p}, and tossed pebbles behind {x.the}. \
        Each ripple pushed it closer, until {h} could grab it.
deep > net: parent neighbor stranger
    {p} had a net with a long handle. {p.He} dipped it in three times, and the third time {x.the} was in it.
deep > dive: parent sibling friend
    {p} was a good swimmer. {p.He} took a deep breath, dived down and came up with {x.the}.
    "I can hold my breath for a long time," said {p}. \
        There was a splash, then bubbles, and then {p} came up with {x.the}.
deep > wait: grandparent friend
    "Stand still," said {p}. "The mud must settle first." They waited until the water was clear. \
        Then {h} saw {x.the} gleam and picked it up.
hole > honey: grandparent neighbor friend
    {p} dipped the end of a stick in honey and pushed it down. {x.The} stuck to it, and {p} pulled it up.
hole > hook: parent stranger sibling
    {p} bent a piece of wire into a hook and tied it to a string. On the fifth try, {p} pulled out {x.the}.
hole > thin arm: friend
    "My arm is thinner than yours," said {p}. {p.He} reached in, felt around and pulled {x.the} out.
sleeper > tickle: friend sibling grandparent
    {p} tickled the big nose with a blade of grass. The sleeper sneezed and rolled over, \
        and {p} quickly picked up {x.the}.
sleeper > snack: parent neighbor stranger
    {p} held out a slice of bread and butter. One eye opened. The big animal got up to eat, \
        and {p} picked up {x.the}.
sleeper > wait: friend grandparent
    "Let it sleep," said {p}. "We can count clouds until it wakes up." They had counted forty clouds \
        when the big animal yawned and trotted away. {h} picked up {x.the} at once.
gone > retrace: parent grandparent friend sibling
    "Where did you have it last?" asked {p}. {h} thought hard. Together they walked back, step by step, \
        and {h} found {x.the} {where}.
    "Let us go back the way you came," said {p}. They looked on both sides of the path. \
        And there it was! {h} found {x.the} {where}.
gone > search: friend sibling neighbor
    "You look on this side, and I will look over there," said {p}. Before long, {p} gave a shout. \
        {x.The} lay {where}!
gone > finder: neighbor stranger
    "Is this what you are looking for?" asked {p}. "It lay {where}, so I kept it safe."
    "I found something {where}," said {p}, and held up {x.the}. "I was hoping that its owner would come."
""")
_BY_HERO = ("shoulders", "ripples", "retrace", "wait")  # here the hero gets it back with own hands
_DEAR = sections("""
favorite
    {h} had {x.a}. {h.He} {habit}.
    {h.His} favorite thing was {x.a}. {h.He} {habit}.
    Of all {h.his} things, {h} liked {x.a} best. {h.He} {habit}.
present
    For {h.his} birthday, {h} got {x.a} from {g}. {h} {habit}.
    {h} had {x.a}. It was a present from {g}, and {h} {habit}.
borrowed
    {h} had borrowed {x.a} from {g}. {h} had promised to take good care of it.
    "You may borrow it, but please bring it back," {g} had said. So {h} took {x.a} and said thank you.
needed
    {h} had {x.a}, and {h.he} was going to need it for {event}.
    {event} was only a few days away, and {h} wanted to bring {x.a} along.
""")
_AFTER = sections("""
favorite
    {h} held {x.the} tight.
    "I missed you," {h} whispered to {x.the}.
    {h} would not let go of {x.the} for the rest of the day.
present
    "{g} will be glad to hear it," said {h}.
    "I will tell {g} all about it," said {h}.
borrowed
    The next day, {h} told {g} the whole story.
    "I will never be so careless with it again," said {h}.
needed
    So {h} could take {x.the} to {event} after all.
    A few days later, at {event}, {h} showed {x.the} to everyone.
""")
_EVENTS = ("the parade", "the puppet show", "the lantern walk", "the village play", "the summer party", "the fair")


def _fits(s: Skeleton) -> bool:
    return {
        "friends": s.helper in ("friend", "sibling"),
        "patience": s.resolution in ("wait", "ripples", "hook", "net", "retrace"),
        "plan": s.resolution in ("swap", "song", "broom", "honey", "hook", "snack", "tickle", "ripples"),
    }.get(s.moral, True)


@plot("lost", _DEAR, _FINDING.values(), ("ask", "friends", "care", "patience", "plan"), fits=_fits)
def lost(t: Teller, s: Skeleton) -> str:
    h = opening(t)
    if s.goal in ("present", "borrowed"):
        t.relative("g")
    elif s.goal == "needed":
        t.cast["event"] = t.pick(_EVENTS)
    x = t.thing("x", _TAG[s.obstacle], h)
    t.cast["habit"] = t.fill(x.habit)
    t.say(_DEAR[s.goal])
    when(t)
    visit(t, *(_WATER if s.obstacle in ("water", "deep") else ()))
    t.say("""
        {when}, {h} took {x.the} and went to {place}.
        {when}, {h} [skipped|walked|wandered|hurried] to {place} with {x.the}.
        {when}, {h} was playing {place.at}. {h.He} had brought {x.the} along.
        {when}, {h} carried {x.the} to {place}.
    """)
    scene(t)
    where = t.cast["where"] = t.fill(t.pick(_WHERE[s.obstacle].splitlines()))
    t.lose(h, x, where)
    t.event("{h} lost {x.the}")
    t.say(_LOSING[s.obstacle])
    t.feel(h, t.pick(("sad", "upset", "worried")), "{h} lost {x.the}")
    t.say(_IN_VAIN[s.obstacle], p=0.8)
    p = meet(t, s)
    t.event("{p} came to help")
    t.say("""
        "I lost {x.the}," said {h}.
        "It is my {x}," said {h}. "I cannot get it back."
        {h} told {p} everything.
        {h} [sighed|sniffed] and explained what had happened.
    """)
    by_hero = s.resolution in _BY_HERO
    t.gain(h if by_hero else p, x, "finds", where)
    t.say(_FINDING[s.obstacle, s.resolution].text)
    if not by_hero:
        t.give(p, x, h)
        t.say("""
            {p} gave {x.the} back to {h}.
            With a smile, {p} handed {x.the} to {h}.
            "Here you are," said {p}, and {h} got {x.the} back.
            Then {p} gave {x.the} to {h}. It was not even scratched.
            {p} wiped the dust off {x.the} and handed it to {h}.
        """)
    t.event("{h} got {x.the} back")
    thanks(t)
    t.say(_AFTER[s.goal], p=0.7)
    closing(t, s, ("happy", "glad", "relieved", "thankful"), "{h} got {x.the} back")
    return t.fill("The Lost {x}")
