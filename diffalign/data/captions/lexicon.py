"""Words that can replace each other in a caption, by what the replacement changes.

Four principles of text preference data (arXiv 2509.25771): content (what is there), attribute (what it is
like), spatial (where), contextual (setting, weather, action). Members of a group have the same part of speech
and number, so that a replacement keeps the grammar.
"""

from dataclasses import dataclass
from typing import Literal

Principle = Literal["content", "attribute", "spatial", "contextual"]


@dataclass(frozen=True)
class Group:
    """Words that exclude each other.

    Attributes:
        principle: what the replacement changes.
        words: each may replace each other.
        plural: they are nouns, whose plurals are replaced as well.
        modifier: they count only before another word, or after "of": as nouns ("a glass", "an orange") they
            have another meaning.
        gendered: they are not replaced beside a pronoun that would no longer fit.
    """

    principle: Principle
    words: tuple[str, ...]
    plural: bool = False
    modifier: bool = False
    gendered: bool = False


def _nouns(words: str, principle: Principle = "content", gendered: bool = False) -> Group:
    return Group(principle, tuple(words.split()), plural=True, gendered=gendered)


def _words(principle: Principle, words: str, modifier: bool = False) -> Group:
    return Group(principle, tuple(word.strip() for word in words.split(",")), modifier=modifier)


COLOURS = "red, yellow, green, blue, cyan, pink, purple, brown, black, white, orange, turquoise"
GREY = ("gray", "grey")

ENGLISH: tuple[Group, ...] = (
    _nouns("cat dog horse cow rabbit fox wolf bear lion tiger elephant zebra giraffe monkey pig goat camel"),
    _nouns("kitten puppy lamb foal cub"),
    _nouns("owl eagle parrot penguin duck swan crow flamingo peacock seagull"),
    _nouns("whale dolphin shark turtle octopus seal crab"),
    _nouns("butterfly bee spider ladybug dragonfly ant"),
    _nouns("dragon unicorn phoenix griffin"),
    _nouns("man woman boy girl", gendered=True),
    _nouns("king queen prince princess", gendered=True),
    _nouns("knight wizard pirate astronaut soldier samurai monk cowboy robot chef"),
    _nouns("car bus truck train bicycle motorcycle tractor scooter van"),
    _nouns("boat ship canoe submarine yacht"),
    _nouns("airplane helicopter rocket balloon spaceship"),
    _nouns("chair table sofa bed desk bench stool wardrobe"),
    _nouns("apple banana pear lemon strawberry pineapple peach melon mango"),
    _nouns("carrot potato tomato onion pumpkin cucumber"),
    _nouns("pizza cake pie sandwich burger salad pancake"),
    _words("content", "coffee, tea, wine, beer, milk, juice, lemonade"),
    _nouns("tulip daisy sunflower lily orchid"),
    _nouns("house castle church barn temple lighthouse skyscraper cottage cathedral windmill"),
    _nouns("hat helmet crown cap turban"),
    _nouns("coat jacket shirt sweater cape"),
    _nouns("guitar violin piano flute trumpet cello accordion"),
    _nouns("sword axe spear shield hammer"),
    _nouns("cup bowl plate bottle vase jar mug teapot"),
    _nouns("clock mirror candle lantern"),
    _nouns("book newspaper laptop camera umbrella suitcase"),
    _nouns("circle square triangle pentagon"),
    _nouns("cube sphere cone cylinder pyramid"),
    _words("attribute", COLOURS + ", gray"),
    _words("attribute", "two, three, four, five, six, seven, eight, nine, ten"),
    _words("attribute", "small, large"),
    _words("attribute", "tiny, huge"),
    _words("attribute", "little, big"),
    _words("attribute", "miniature, giant"),
    _words("attribute", "tall, short"),
    _words("attribute", "wide, narrow"),
    _words("attribute", "thick, thin"),
    _words("attribute", "young, old"),
    _words("attribute", "modern, ancient"),
    _words("attribute", "clean, dirty"),
    _words("attribute", "wet, dry"),
    _words("attribute", "empty, full"),
    _words("attribute", "smooth, rough, fluffy, spiky"),
    _words("attribute", "striped, spotted, checkered, plain"),
    _words("attribute", "round, rectangular, triangular"),
    _words("attribute", "happy, sad, angry, surprised"),
    _words("attribute", "bright, dark"),
    _words("attribute", "wooden, metallic, golden, crystalline"),
    _words(
        "attribute", "wood, metal, glass, plastic, stone, marble, leather, ceramic, concrete, steel", True
    ),
    _words("spatial", "to the left of, to the right of, above, below"),
    _words("spatial", "on the left, on the right"),
    _words("spatial", "in front of, behind"),
    _words("spatial", "on top of, underneath"),
    _words("spatial", "under, over, beside"),
    _words("spatial", "next to, far away from"),
    _words("spatial", "near, far from"),
    _words("spatial", "inside, outside"),
    _words("spatial", "at the top of, at the bottom of"),
    _words("spatial", "in the foreground, in the background"),
    _words("spatial", "indoors, outdoors"),
    _nouns("forest desert beach jungle meadow swamp", "contextual"),
    _nouns("mountain hill volcano canyon", "contextual"),
    _nouns("lake river ocean pond waterfall", "contextual"),
    _nouns("kitchen bedroom bathroom library garage classroom", "contextual"),
    _nouns("park garden farm market stadium", "contextual"),
    _nouns("sunset sunrise", "contextual"),
    _words("contextual", "day, night"),
    _words("contextual", "daytime, nighttime"),
    _words("contextual", "morning, evening"),
    _words("contextual", "summer, winter, autumn"),
    _words("contextual", "sunny, rainy, snowy, foggy, stormy"),
    _words("contextual", "snow, rain, fog"),
    _words("contextual", "sitting, standing, kneeling"),
    _words("contextual", "walking, running, jumping, dancing"),
    _words("contextual", "smiling, crying, laughing, frowning"),
    _words("contextual", "sleeping, eating, playing"),
)

PLURALS = {
    "wolf": "wolves", "man": "men", "woman": "women", "bus": "buses", "octopus": "octopuses",
    "phoenix": "phoenixes",
}  # fmt: skip
"""Plurals that follow no rule."""


def plural_of(noun: str) -> str:
    """Return the plural of an English noun of the groups."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh", "tomato", "potato", "mango")) else f"{noun}s"
