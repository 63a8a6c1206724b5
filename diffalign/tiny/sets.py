"""Further preference sets, drawn on the fly: pairs, lists, likes, captions, experts, weight maps, videos.

Each set is a sequence of groups over the captions of the train split, as rows of a JSON-lines set of
`diffalign.data`. Equal seeds give equal rows, and a shorter set is a prefix of a longer one. Images of a
group share layout, style and background, so they differ only in the caption's words. Sets named `pattern_*`
are of patterned scenes.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny import motions, video_sets
from diffalign.tiny.pairs import TWO_WRONG
from diffalign.tiny.worlds import PATTERNS, SCENES, World

GROUPS = 4096  # groups of a set, unless its name states fewer
LIST = 4  # images of a ranked list
DIFFERENT = 16  # levels of 255 above which a pixel of two images counts as different
Row = dict[str, Any]


def png(image: Image.Image) -> bytes:
    """Return lossless PNG bytes, at the fastest compression level."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def misdraw(scene: Any, wrong: int, rng: np.random.Generator, world: World = SCENES) -> Any:
    """Return the scene with `wrong` words of its caption changed, at most as many as it has.

    The new caption is not equivalent to the old one either (see `World.same`).
    """
    while True:
        other, slots = scene, world.slots(scene)
        for place in rng.permutation(len(slots))[:wrong]:
            other = world.changed(
                other, slots[place], str(rng.choice(world.alternatives(other, slots[place])))
            )
        if not wrong or not world.same(world.caption(scene), world.caption(other)):
            return other


def _list(text: str, rng: np.random.Generator, world: World) -> Row:
    """Return images of one layout with 0 to 3 wrong words in random order, scored by the judge."""
    true = world.scene_of(text, rng)
    pictures = [world.render(misdraw(true, int(wrong), rng, world)) for wrong in rng.permutation(LIST)]
    scores = [world.judge(picture, text) for picture in pictures]
    return {"prompt": text, "images": [png(picture) for picture in pictures], "scores": scores}


def _pair(text: str, rng: np.random.Generator, world: World) -> Row:
    """Return a correct image and one with one or two wrong words, in random order; the first is better."""
    true = world.scene_of(text, rng)
    other = misdraw(true, 1 + int(rng.random() < TWO_WRONG), rng, world)
    place = int(rng.integers(2))
    pictures = [png(world.render(scene)) for scene in ((true, other) if place == 0 else (other, true))]
    return {"prompt": text, "images": pictures, "scores": [1.0 - place, float(place)]}


def _like(text: str, rng: np.random.Generator, world: World) -> Row:
    """Return a correct image, liked, or one with one or two wrong words, disliked, with equal probability."""
    scene, liked = world.scene_of(text, rng), bool(rng.random() < 0.5)
    if not liked:
        scene = misdraw(scene, 1 + int(rng.random() < TWO_WRONG), rng, world)
    return {"prompt": text, "image": png(world.render(scene)), "liked": liked}


def _captions(text: str, rng: np.random.Generator, world: World) -> Row:
    """Return a correct image with its caption, and a caption with one or two wrong words."""
    scene = world.scene_of(text, rng)
    wrong = world.caption(misdraw(scene, 1 + int(rng.random() < TWO_WRONG), rng, world))
    return {"prompt": text, "altered": wrong, "image": png(world.render(scene))}


def _expert(text: str, rng: np.random.Generator, world: World) -> Row:
    """Return a correct image."""
    return {"prompt": text, "image": png(world.render(world.scene_of(text, rng))), "liked": True}


def _patches(text: str, rng: np.random.Generator, world: World) -> Row:
    """Return a correct image and one with one or two wrong words, with maps: white where both agree."""
    true = world.scene_of(text, rng)
    other = misdraw(true, 1 + int(rng.random() < TWO_WRONG), rng, world)
    pictures = [world.render(scene).convert("RGB") for scene in (true, other)]
    difference = np.abs(np.subtract(*(np.asarray(picture, dtype=np.int16) for picture in pictures))).max(-1)
    agree = png(Image.fromarray(np.where(difference > DIFFERENT, 0, 255).astype(np.uint8)))
    images = [png(picture) for picture in pictures]
    return {"prompt": text, "images": images, "scores": [1.0, 0.0], "patches": [agree, agree]}


@dataclass(frozen=True)
class PreferenceSet:
    """A set: `row` draws a row for a caption, `captions_of` lists the captions of a split."""

    row: Callable[[str, np.random.Generator], Row]
    captions_of: Callable[[str], tuple[str, ...]]


def _of(world: World, draw: Callable[[str, np.random.Generator, World], Row]) -> PreferenceSet:
    return PreferenceSet(lambda text, rng: draw(text, rng, world), world.split_captions)


_IMAGES = {
    "lists": _list,
    "likes": _like,
    "captions": _captions,
    "experts": _expert,
    "patches": _patches,
}
SETS: Mapping[str, PreferenceSet] = {
    **{name: _of(SCENES, draw) for name, draw in _IMAGES.items()},
    "video_pairs": PreferenceSet(video_sets.same_motion, motions.split_captions),
    "video_takes": PreferenceSet(video_sets.two_takes, motions.split_captions),
    "pattern_pairs": _of(PATTERNS, _pair),
    **{f"pattern_{name}": _of(PATTERNS, draw) for name, draw in _IMAGES.items()},
}


def rows(name: str, count: int = GROUPS, seed: int = 0) -> Iterator[Row]:
    """Yield the first `count` rows of the set `name`; each train caption occurs once before any recurs."""
    texts = SETS[name].captions_of("train")
    for epoch in range(-(-count // len(texts))):
        order = np.random.default_rng((seed, epoch)).permutation(len(texts))
        for place in range(min(len(texts), count - epoch * len(texts))):
            yield SETS[name].row(texts[order[place]], np.random.default_rng((seed, epoch, place + 1)))
