"""The words of the stories: names, animals, traits, places, things, foods and feelings, as plain tables.

The notation is that of `tables`; anyone can extend it: a new line is a new word in the stories.
"""

# ruff: noqa: E501  (a line of a table is one record)

from __future__ import annotations

from zero2hero.data.worlds.stories.tables import rows, words

GIRLS = words("""
    Aisha Amara Anna Bella Carmen Clara Dora Ella Emma Fatima Fiona Greta Hanna Ida Ines Julia Kate Leila Lena
    Lily Lucy Maya Mei Mia Molly Nina Nora Olivia Priya Rita Rosa Sara Sofia Tess Vera Wendy Yuki Zoe
""")
BOYS = words("""
    Adam Arthur Ben Carlos Daniel David Eli Felix Finn George Hiro Hugo Ivan Jack Jamal Kofi Leo Liam Luca Mateo
    Max Milo Noah Oliver Omar Oscar Paul Peter Ravi Sam Simon Theo Tim Toby Tom Victor Walter Yusuf
""")
ANIMAL_GIRLS = words("Bonnie Dotty Flora Hazel Juniper Kiki Minna Nutmeg Pippa Suki Tansy Willa")
ANIMAL_BOYS = words("Barnaby Chip Dusty Fergus Gus Jasper Monty Otis Pip Rollo Scout Wilbur Ziggy")
WOMEN = ("Mrs. Hill", "Mrs. Green", "Miss Park", "Mrs. Rivera", "Miss Bell", "Mrs. Novak", "Mrs. Ito", "Miss Day")
MEN = ("Mr. Brown", "Mr. Wood", "Mr. Singh", "Mr. Lopez", "Mr. King", "Mr. Abbott", "Mr. Young", "Mr. Frost")
ELDER_ANIMALS = {  # name: (what it is, gender)
    "Old Owl": ("owl", "she"),
    "Mr. Toad": ("toad", "he"),
    "Mrs. Hen": ("hen", "she"),
    "Mr. Crow": ("crow", "he"),
    "Mrs. Goose": ("goose", "she"),
    "Mr. Stork": ("stork", "he"),
    "Aunt Turtle": ("turtle", "she"),
    "Uncle Boar": ("boar", "he"),
}


# animal; what it looks like; where it lives
SPECIES = {
    name: (tuple(looks.split(", ")), home)
    for name, looks, home in rows("""
rabbit; fluffy, gray, long-eared; in a cozy burrow under a hedge
fox; red, bushy-tailed, young; in a snug den on a hillside
mouse; tiny, gray, brown; in a hole beneath an old stump
squirrel; red, quick, bushy-tailed; in a hollow oak
hedgehog; round, prickly, little; in a nest of dry leaves
bear; brown, furry, plump; in a dry cave near a waterfall
badger; striped, sturdy, young; in a tidy tunnel under the roots
otter; sleek, brown, young; in a den beside the river
beaver; plump, flat-tailed, brown; in a lodge made of sticks
raccoon; masked, gray, young; in a hollow log
mole; velvety, black, small; in a long, dark tunnel
chipmunk; striped, tiny, quick; in a crack between two rocks
""")
}

HOMES = (
    "in a small village",
    "in a big, noisy city",
    "in a yellow house at the edge of a forest",
    "in a white cottage near the sea",
    "on a farm",
    "on a quiet street",
    "in a tall brick building",
    "at the foot of a mountain",
    "on a houseboat",
    "in a cabin by a lake",
    "above a little bakery",
    "next door to a fire station",
    "beside a railway bridge",
    "in a sunny valley",
    "in a stone house with a green door",
    "at the end of a winding lane",
)

# trait; two ways in which it shows
TRAITS = {
    trait: f"{first}\n{second}"
    for trait, first, second in rows("""
curious; {h.He} asked questions from breakfast to bedtime.; {h.He} peeked into every box and behind every door.
kind; {h.He} always had a warm word for everyone.; {h.He} even said good morning to the beetles.
shy; {h.He} spoke so softly that people had to lean in.; {h.He} often hid behind the door when strangers came by.
clever; {h.He} could solve almost any riddle.; {h.He} liked puzzles more than candy.
cheerful; {h.He} hummed a tune wherever {h.he} went.; Even rainy days could not spoil {h.his} mood.
patient; {h.He} could watch a snail cross the whole path.; {h.He} never minded waiting in line.
careful; {h.He} looked twice before every jump.; {h.He} never spilled a single drop of milk.
gentle; Butterflies liked to land on {h.his} shoulder.; {h.He} carried spiders outside in a cup.
playful; {h.He} could turn anything into a game.; To {h.him}, every puddle was an ocean.
quiet; {h.He} liked to listen more than to talk.; {h.He} noticed small sounds that others missed.
busy; {h.His} pockets were full of string and plans.; {h.He} had a new project every week.
lively; {h.He} hopped instead of walking.; {h.He} could hardly sit still for a minute.
dreamy; {h.He} saw castles in the clouds.; {h.He} often forgot {h.his} lunch because {h.he} was making up stories.
polite; {h.He} never forgot to say please.; {h.He} held the door open for everyone.
silly; {h.He} wore a spoon on {h.his} nose to make people laugh.; {h.He} told jokes to the chickens.
thoughtful; {h.He} remembered every birthday in town.; {h.He} liked to think before {h.he} spoke.
honest; {h.He} told the truth even when it was hard.; Everyone trusted {h.his} word.
messy; {h.His} bed was covered with crayons, crumbs and leaves.; {h.He} could never find two matching socks.
tidy; {h.He} kept {h.his} pencils in a perfect row.; {h.His} shelves were always neat.
friendly; {h.He} waved at everyone {h.he} met.; {h.He} made a new friend almost every day.
noisy; {h.He} banged pots and sang at the top of {h.his} voice.; People heard {h.him} coming from far away.
forgetful; {h.He} once wore two different shoes to school.; {h.He} tied knots in a string to remember things.
hopeful; {h.He} was sure that tomorrow would be wonderful.; {h.He} made a wish on every star.
eager; {h.He} was up before the sun each morning.; {h.He} wanted to try everything at once.
determined; {h.He} did not like to give up.; When {h.he} started something, {h.he} finished it.
creative; {h.He} made dragons out of egg cartons.; {h.He} drew pictures on every scrap of paper.
helpful; {h.He} set the table without being asked.; {h.He} liked to carry the heavy end of things.
adventurous; {h.He} dreamed of sailing around the world.; {h.He} had climbed every tree nearby.
""")
}
HUMAN_ONLY_TRAITS = frozenset({"shy", "busy", "messy", "tidy", "forgetful", "creative", "thoughtful", "noisy"})

# worlds (h people, a animals); preposition; place; what is seen or heard there
PLACES = tuple(
    (worlds, prep, name, "\n".join(details))
    for worlds, prep, name, *details in rows("""
h; in; the park; Pigeons strutted along the paths.; A fountain splashed in the middle.; A band was playing a merry march.
h; in; the garden; Fat bees buzzed around the sunflowers.; Tomatoes hung heavy on the vines.; A sprinkler ticked round and round.
h; at; the beach; Waves tickled the sand.; Seagulls cried above the foam.; Tiny crabs hurried sideways between the rocks.
h; at; the playground; The swings creaked back and forth.; Children slid down the slide, squealing.; The seesaw went up and down.
h; on; the farm; Chickens scratched in the dust.; A tractor rumbled in the distance.; The cows chewed slowly and blinked.
h; at; the market; Sellers shouted over piles of melons and onions.; The air smelled of fresh bread and cinnamon.; Striped tents stood in long rows.
h; at; the harbor; Fishing boats rocked beside the dock.; Ropes creaked and flags fluttered.; The air smelled of salt and tar.
h; in; the town square; The clock on the tower struck ten.; Old men played chess under the trees.; A flower seller arranged her roses.
h; at; the zoo; The monkeys chattered on their ropes.; A zebra nibbled hay.; Two penguins waddled along the ice.
h; in; the schoolyard; Chalk drawings covered the ground.; Someone was skipping rope and counting aloud.; A whistle blew, and everybody cheered.
ha; in; the meadow; Daisies nodded in the breeze.; Crickets chirped in the tall grass.; Butterflies danced from clover to clover.
ha; in; the forest; Sunlight fell through the branches in golden stripes.; A woodpecker tapped on a trunk.; The path was soft with moss and needles.
ha; by; the river; The water gurgled over smooth stones.; A blue dragonfly hovered above the reeds.; Small fish flashed like silver coins.
ha; by; the pond; Frogs croaked among the lilies.; A heron stood on one leg.; The water was as still as a mirror.
ha; on; the hill; From the top you could see the whole valley.; The grass rippled like waves.; A hawk circled high above.
ha; in; the orchard; Ripe plums glowed between the leaves.; Wasps hummed over the fallen fruit.; Every branch was heavy with pears.
ha; by; the old bridge; Ivy covered the stone arch.; The planks rattled with every step.; Swallows darted in and out below.
ha; at; the lake; A rowboat bobbed near the shore.; Ducks left long trails on the water.; A cool breeze came over the ripples.
a; in; the berry patch; The bushes were full of blackberries.; Brambles curled along the ground.; Everything smelled sweet and ripe.
a; at; the willow tree; Its long branches made a green curtain.; Catkins drifted down like snow.; Bees murmured in its crown.
a; in; the glade; Mushrooms stood in a neat ring.; Ferns uncurled in the shade.; A beam of light warmed the grass.
a; by; the brook; Pebbles glittered under the clear water.; Watercress grew along the bank.; A small waterfall sang to itself.
""")
)

COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "white", "silver", "brown")

# thing; tags: l light, s small and shiny, f floats, k sinks, c may have a color; looks; what its owner did with it
THINGS = {
    noun: (frozenset(tags), tuple(looks.split(", ")), habit)
    for noun, tags, looks, habit in rows("""
kite; lc; striped, paper, long-tailed; flew it whenever the wind blew
hat; lfc; straw, floppy, pointed; wore it from morning to night
scarf; lc; woolly, soft, checkered; wrapped it twice around {h.his} neck
ribbon; lc; silk, shiny, velvet; tied it in a neat bow every morning
cape; lc; velvet, long, magic-looking; pretended to be a hero when {h.he} wore it
flag; lc; handmade, tiny, striped; waved it at every passing boat
map; l; crumpled, hand-drawn, faded; studied it for hours
feather; lfc; speckled, long, fluffy; used it to tickle {h.his} own nose
paper crown; l; golden, pointed, glittering; wore it like a real king or queen
handkerchief; lc; embroidered, lacy, spotted; kept it folded in a pocket
ball; fc; bouncy, rubber, spotted; bounced it against the wall every day
toy boat; fc; wooden, painted, little; sailed it in the bathtub
rubber ring; fc; striped, round, squeaky; floated in it all summer
wooden duck; fc; carved, painted, old; pulled it along on a string
basket; fc; woven, round, willow; collected pine cones in it
paddle; f; wooden, long, smooth; dreamed of long boat trips with it
key; sk; rusty, brass, tiny; wore it on a string
bell; sk; brass, silver, tinkling; rang it to say hello
coin; sk; golden, foreign, lucky; rubbed it for good luck
marble; skc; glass, swirly, shiny; rolled it across the floor for hours
whistle; skc; tin, shiny, loud; blew it at the start of every game
locket; sk; golden, heart-shaped, tiny; opened it to look at the picture inside
compass; sk; brass, pocket, old; always knew which way was north
button; skc; pearl, round, shiny; kept it in a matchbox
medal; sk; shiny, bronze, round; polished it every evening
brooch; sk; star-shaped, silver, old; pinned it on for special days
spoon; sk; silver, tiny, dented; ate everything with it
drum; c; tin, round, loud; beat it until the windows shook
book; c; thick, dusty, old; read it again and again
lantern; c; paper, brass, little; lit it when evening came
umbrella; c; spotted, big, striped; twirled it even when the sun shone
teddy bear; c; one-eyed, patched, fluffy; took it to bed every night
doll; ; rag, wooden, curly-haired; told it all {h.his} secrets
blanket; c; fuzzy, patchwork, warm; snuggled under it on cold nights
puppet; ; wooden, funny, long-nosed; put on shows with it
flute; ; bamboo, wooden, slender; played the same sweet song on it each evening
paintbrush; ; thin, soft, long; painted sunsets with it
notebook; c; leather, little, thick; wrote a new poem in it every day
music box; ; wooden, painted, tiny; wound it up before going to sleep
toy train; c; wooden, shiny, fast; drove it around the table legs
magnifying glass; ; round, heavy, strong; looked at ants and leaves through it
jump rope; c; long, new, braided; skipped with it all afternoon
wagon; c; wooden, little, squeaky; pulled it everywhere
cup; c; chipped, clay, flowered; drank warm milk from it
pillow; c; feather, square, soft; rested {h.his} head on it after lunch
pinecone owl; ; funny, homemade, tiny; kept it on the windowsill
""")
}

# one; many
FOODS = tuple(
    (one, many)
    for one, many in rows("""
cookie; cookies
apple; apples
pear; pears
plum; plums
muffin; muffins
pancake; pancakes
strawberry; strawberries
carrot; carrots
walnut; walnuts
cherry; cherries
bun; buns
biscuit; biscuits
peach; peaches
tart; tarts
dumpling; dumplings
chestnut; chestnuts
waffle; waffles
turnip; turnips
""")
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# feeling; how it looks from outside
FEELINGS = {
    feeling: "\n".join(signs)
    for feeling, *signs in rows("""
sad; A tear rolled down {c.his} cheek.; {c.His} lip trembled.; {c.He} sniffled quietly.
upset; {c.He} kicked a pebble.; {c.His} cheeks grew hot.; {c.He} folded {c.his} arms.
worried; {c.His} tummy felt tight.; {c.He} paced up and down.; {c.He} bit {c.his} lip.
disappointed; {c.His} shoulders drooped.; {c.He} let out a long sigh.; {c.He} stared at the ground.
angry; {c.He} stamped {c.his} foot.; {c.He} frowned like a thundercloud.; {c.His} voice shook.
scared; {c.His} knees wobbled.; {c.His} heart beat like a drum.; {c.He} held {c.his} breath.
nervous; {c.His} mouth went dry.; {c.He} swallowed hard.; Butterflies fluttered in {c.his} tummy.
lonely; Everything seemed too quiet.; {c.He} wished for someone to talk to.; {c.He} drew circles in the dust.
ashamed; {c.He} could not look up.; {c.His} ears burned.; {c.He} wanted to hide.
jealous; {c.He} tried to smile but could not.; A small, sour feeling grew inside {c.him}.; {c.He} looked away.
happy; {c.He} grinned from ear to ear.; {c.He} jumped up and down.; {c.He} clapped {c.his} {c.hands}.
glad; {c.He} smiled a big smile.; {c.His} eyes shone.; {c.He} did a little dance.
proud; {c.He} stood up very straight.; {c.He} beamed.; {c.His} chest swelled.
thankful; {c.He} had a lump in {c.his} throat.; {c.He} smiled with {c.his} whole face.; {c.His} heart felt warm.
relieved; {c.He} let out a deep breath.; The worry slid off {c.his} shoulders.; {c.He} laughed out loud.
delighted; {c.He} spun around in a circle.; {c.He} gave a squeal of joy.; {c.His} eyes sparkled.
cheerful; {c.He} whistled a tune.; {c.He} skipped instead of walking.; {c.He} laughed at nothing at all.
calm; {c.He} breathed slowly and smiled.; Everything felt right again.; {c.He} leaned back and looked at the sky.
excited; {c.He} could hardly stand still.; {c.He} bounced on {c.his} toes.; {c.His} eyes grew wide.
""")
}

GOOD_FEELINGS = frozenset(
    words("""
    happy glad proud thankful relieved delighted cheerful calm excited
""")
)
STRONG_FEELINGS = frozenset({"delighted"})  # one is not "very delighted"

# a lesson; ways to say it
MORALS = {
    key: tuple(ways)
    for key, *ways in rows("""
ask; it is all right to ask for help; asking for help is a brave thing to do; nobody has to solve everything alone
friends; good friends stand by each other; a true friend is better than any treasure; friends make hard things easier
small; even small helpers can do great things; you do not need to be big to be important; a little help can mean a lot
care; precious things need good care; it pays to look after what you love; things that matter should be kept safe
kindness; kindness always finds its way back; one good deed leads to another; a kind heart is never poor
patience; good things take time; slow and steady work is worth it; waiting can be hard but it is worth it
practice; practice makes hard things easy; every master was once a beginner; nobody is perfect the first time
mistakes; mistakes are a part of learning; a mistake can be the start of something good; it is never too late to try again
share; sharing makes everything taste better; joy grows when it is shared; there is always enough when people share
sorry; saying sorry takes courage; a friend matters more than being right; the word sorry can mend almost anything
listen; it helps to listen before getting angry; there are two sides to every story; listening is the best way to understand
gentle; gentle hands can calm the wildest heart; every living thing deserves care; being gentle is a kind of strength
courage; being brave means going on when you are afraid; courage grows a little every day; fear gets smaller when you face it
together; together we can do more than alone; many hands make light work; everything is easier side by side
truth; telling the truth is always best; an honest word is worth more than gold; the truth makes the heart light
word; a promise is worth keeping; people can count on those who keep their word; a promise is a kind of gift
guess; it is wise to look before you guess; things are not always what they seem; one should never blame without proof
fair; playing fair is better than winning; helping is a kind of winning; a prize is not the most important thing
welcome; a smile can open any door; every friend was once a stranger; a friendly word can change a whole day
home; home is where someone waits for you; the best gifts come from the heart; love is in the little things
plan; a good plan is half the work; it is smart to think ahead; clever ideas often start small
""")
}
