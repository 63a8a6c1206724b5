"""Built-in prompts for rollouts: short, original, and numerous enough to prevent memorisation.

Two tasks in the manner of DDPO (Black et al. 2023, arXiv 2305.13301): the name of a common animal, for any
reward, and an animal at a human activity, for rewards of image-text alignment. Both lists and all sentences
were written for this package and differ from DDPO's.
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
    """Return every animal at every activity, 360 sentences: ``a cat baking bread``.

    Each block of 45 names every animal once, and neighbours have different activities, so that any first few
    prompts vary.
    """
    kinds = len(ACTIVITIES)
    return [
        f"{animal} {ACTIVITIES[(place + turn) % kinds]}"
        for turn in range(kinds)
        for place, animal in enumerate(animals())
    ]


LISTS: Mapping[str, Callable[[], list[str]]] = {"animals": animals, "activities": activities}
