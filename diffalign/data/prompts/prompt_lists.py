"""Built-in prompts for rollouts: short, many enough that none is learnt by heart, and nobody's text but ours.

Two tasks in the manner of DDPO (Black et al. 2023, arXiv 2305.13301): the name of a common animal, where any
reward can be tried, and an animal at something that animals do not do, where the reward is whether image and
prompt agree. Both lists and all sentences were written for this package; DDPO's are others.
"""

from collections.abc import Callable, Mapping

ANIMALS = (
    "ant", "badger", "bat", "bear", "bee", "bull", "butterfly", "camel", "cat", "cow", "crab", "crow", "deer",
    "dog", "dolphin", "donkey", "duck", "eagle", "elephant", "fox", "frog", "giraffe", "goat", "hamster",
    "hare", "hedgehog", "hen", "horse", "kangaroo", "lion", "mouse", "otter", "owl", "panda", "parrot",
    "penguin", "pig", "seal", "sheep", "snail", "squirrel", "swan", "tiger", "turtle", "zebra",
)  # fmt: skip

ACTIVITIES = (
    "reading a newspaper",
    "baking bread",
    "playing the piano",
    "painting a fence",
    "rowing a boat",
    "flying a kite",
    "driving a tractor",
    "watering the flowers",
)


def animals() -> list[str]:
    """Return the 45 animals with their article: ``a cat``, ``an otter``."""
    return [f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in ANIMALS]


def activities() -> list[str]:
    """Every animal at every activity, 360 sentences: ``a cat baking bread``.

    Each stretch of 45 names every animal once, and neighbours do different things, so that the first few
    prompts are varied already.
    """
    kinds = len(ACTIVITIES)
    return [
        f"{animal} {ACTIVITIES[(place + turn) % kinds]}"
        for turn in range(kinds)
        for place, animal in enumerate(animals())
    ]


LISTS: Mapping[str, Callable[[], list[str]]] = {"animals": animals, "activities": activities}
