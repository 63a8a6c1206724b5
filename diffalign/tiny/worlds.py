"""The embedded worlds: two of still images, as one interface, and how models of all worlds are measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny import CAPTIONS, judge, pattern_judge, patterns, scenes

Picture = Image.Image | np.ndarray
Slot = tuple[str, int]
"""A word of a caption: its kind and its place among the words of that kind."""


@dataclass(frozen=True)
class Measures:
    """How a world's models are measured.

    Attributes:
        captions: the world's captions, a key of `tiny.CAPTIONS`.
        rewards: names of rewards; the first is trained on, the others are not.
        side: pixels of a side.
        few: captions that a measurement of a few minutes takes.
    """

    captions: str
    rewards: tuple[str, ...]
    side: int
    few: int = 256

    def prompts(self, split: str, n: int | None = None) -> list[str]:
        """Return the first `n` captions of a split (all if None); errors as of `tiny.prompts`."""
        return CAPTIONS[self.captions](split, n)


@dataclass(frozen=True)
class World:
    """A world of still images.

    Attributes:
        measures: how its models are measured.
        scene_of: returns a random scene that shows a caption.
        sample: returns a random scene; its caption is of the split, if one is given.
        caption: returns a scene's caption.
        render: draws a scene, RGB.
        alter: returns the scene with one wrong word.
        slots: returns the words of a scene's caption.
        choices: returns all words for a slot of a scene.
        alternatives: returns the words for a slot other than the scene's.
        changed: returns a scene with another word in a slot.
        same: returns whether two captions are equivalent.
        split_of: returns the split of a caption.
        split_captions: returns captions of a split, in a fixed order.
        vocabulary: returns captions that hold every word, from which tokenizers are learnt.
        judge: returns the agreement of an image with a caption, in [0, 1].
        taste: returns how far an image has the style that captions do not name, in [0, 1].
        styles: words for scenes with that style and without it.
        styled: returns whether a scene has that style.
    """

    measures: Measures
    scene_of: Callable[[str, np.random.Generator], Any]
    sample: Callable[[np.random.Generator, str | None], Any]
    caption: Callable[[Any], str]
    render: Callable[[Any], Image.Image]
    alter: Callable[[Any, np.random.Generator], Any]
    slots: Callable[[Any], list[Slot]]
    choices: Callable[[Any, Slot], list[str]]
    alternatives: Callable[[Any, Slot], list[str]]
    changed: Callable[[Any, Slot, str], Any]
    same: Callable[[str, str], bool]
    split_of: Callable[[str], str]
    split_captions: Callable[[str], tuple[str, ...]]
    vocabulary: Callable[[], list[str]]
    judge: Callable[[Picture, str], float]
    taste: Callable[[Picture], float]
    styles: tuple[str, str]
    styled: Callable[[Any], bool]

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return self.measures.side


SCENES = World(
    measures=Measures("", ("judge", "taste", "tiny_clip"), scenes.SIDE),
    scene_of=scenes.scene_of,
    sample=scenes.sample_scene,
    caption=scenes.caption,
    render=scenes.render,
    alter=scenes.alter,
    slots=scenes.slots,
    choices=scenes.choices,
    alternatives=scenes.alternatives,
    changed=scenes.changed,
    same=scenes.same,
    split_of=scenes.split_of,
    split_captions=scenes.split_captions,
    vocabulary=lambda: list(scenes.captions())[::3],
    judge=judge.judge,
    taste=judge.taste,
    styles=("vivid", "washed_out"),
    styled=lambda scene: bool(scene.vivid),
)
PATTERNS = World(
    measures=Measures("patterns/", ("pattern_judge", "pattern_taste"), patterns.SIDE),
    scene_of=patterns.picture_of,
    sample=patterns.sample_picture,
    caption=patterns.caption,
    render=patterns.render,
    alter=patterns.alter,
    slots=patterns.slots,
    choices=patterns.choices,
    alternatives=patterns.alternatives,
    changed=patterns.changed,
    same=patterns.same,
    split_of=patterns.split_of,
    split_captions=patterns.split_captions,
    vocabulary=lambda: list(patterns.split_captions("train")[::4]),
    judge=pattern_judge.judge,
    taste=pattern_judge.taste,
    styles=("lit", "flat"),
    styled=lambda picture: bool(picture.lit),
)
WORLDS: Mapping[str, World] = {"sdxl": SCENES, "sd15": SCENES, "sd3": SCENES, "sdxl64": PATTERNS}
"""The world of each model of still images."""
MOTIONS = Measures("motions/", ("video_motion", "video_content"), scenes.SIDE, few=64)
MEASURES: Mapping[str, Measures] = {name: world.measures for name, world in WORLDS.items()} | {"wan": MOTIONS}
"""How each tiny model is measured."""
