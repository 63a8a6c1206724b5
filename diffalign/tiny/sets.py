"""Further preference sets, drawn on the fly: lists, likes, captions, experts, weight maps, video pairs.

Each set is a sequence of groups over the captions of the train split, as rows of a JSON-lines set of
`diffalign.data`. Equal seeds give equal rows, and a shorter set is a prefix of a longer one. Images of a
group share layout, style and background, so they differ only in the caption's words.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny import motions, video_sets
from diffalign.tiny.judge import judge
from diffalign.tiny.pairs import TWO_WRONG
from diffalign.tiny.scenes import COLORS, RELATIONS, SHAPES, SIZES, Scene, caption, render, same, scene_of
from diffalign.tiny.scenes import split_captions as captions_of

GROUPS = 4096  # groups of a set, unless its name states fewer
LIST = 4  # images of a ranked list
DIFFERENT = 16  # levels of 255 above which a pixel of two images counts as different
WORDS = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": tuple(SHAPES), "relation": tuple(RELATIONS)}
Row = dict[str, Any]


def png(image: Image.Image) -> bytes:
    """Return lossless PNG bytes, at the fastest compression level."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def misdraw(scene: Scene, wrong: int, rng: np.random.Generator) -> Scene:
    """Return the scene with `wrong` words of its caption changed, at most 3 for one thing and 7 for two.

    The new caption is not equivalent to the old one either (see `scenes.same`).
    """
    while True:
        other = _change(scene, wrong, rng)
        if not wrong or not same(caption(scene), caption(other)):
            return other


def _change(scene: Scene, wrong: int, rng: np.random.Generator) -> Scene:
    slots = [(kind, i) for i in range(len(scene.things)) for kind in ("size", "color", "shape")]
    slots += [("relation", 0)] * (scene.relation is not None)
    things, relation = list(scene.things), scene.relation
    for place in rng.permutation(len(slots))[:wrong]:
        kind, i = slots[place]
        old = relation if kind == "relation" else getattr(things[i], kind)
        word = str(rng.choice([w for w in WORDS[kind] if w != old]))
        if kind == "relation":
            relation = word
        else:
            things[i] = replace(things[i], **{kind: word})
    return replace(scene, things=tuple(things), relation=relation)


def _list(text: str, rng: np.random.Generator) -> Row:
    """Return images of one layout with 0 to 3 wrong words in random order, scored by the judge."""
    true = scene_of(text, rng)
    pictures = [render(misdraw(true, int(wrong), rng)) for wrong in rng.permutation(LIST)]
    scores = [judge(picture, text) for picture in pictures]
    return {"prompt": text, "images": [png(picture) for picture in pictures], "scores": scores}


def _like(text: str, rng: np.random.Generator) -> Row:
    """Return a correct image, liked, or one with one or two wrong words, disliked, with equal probability."""
    scene, liked = scene_of(text, rng), bool(rng.random() < 0.5)
    if not liked:
        scene = misdraw(scene, 1 + int(rng.random() < TWO_WRONG), rng)
    return {"prompt": text, "image": png(render(scene)), "liked": liked}


def _captions(text: str, rng: np.random.Generator) -> Row:
    """Return a correct image with its caption, and a caption with one or two wrong words."""
    scene = scene_of(text, rng)
    wrong = caption(misdraw(scene, 1 + int(rng.random() < TWO_WRONG), rng))
    return {"prompt": text, "altered": wrong, "image": png(render(scene))}


def _expert(text: str, rng: np.random.Generator) -> Row:
    """Return a correct image."""
    return {"prompt": text, "image": png(render(scene_of(text, rng))), "liked": True}


def _patches(text: str, rng: np.random.Generator) -> Row:
    """Return a correct image and one with one or two wrong words, with maps: white where both agree."""
    true = scene_of(text, rng)
    other = misdraw(true, 1 + int(rng.random() < TWO_WRONG), rng)
    pictures = [render(scene).convert("RGB") for scene in (true, other)]
    difference = np.abs(np.subtract(*(np.asarray(picture, dtype=np.int16) for picture in pictures))).max(-1)
    agree = png(Image.fromarray(np.where(difference > DIFFERENT, 0, 255).astype(np.uint8)))
    images = [png(picture) for picture in pictures]
    return {"prompt": text, "images": images, "scores": [1.0, 0.0], "patches": [agree, agree]}


SETS: Mapping[str, Callable[[str, np.random.Generator], Row]] = {
    "lists": _list,
    "likes": _like,
    "captions": _captions,
    "experts": _expert,
    "patches": _patches,
    "video_pairs": video_sets.same_motion,
    "video_takes": video_sets.two_takes,
}
VIDEOS = ("video_pairs", "video_takes")


def rows(name: str, count: int = GROUPS, seed: int = 0) -> Iterator[Row]:
    """Yield the first `count` rows of the set `name`; each train caption occurs once before any recurs."""
    texts = motions.split_captions("train") if name in VIDEOS else captions_of("train")
    for epoch in range(-(-count // len(texts))):
        order = np.random.default_rng((seed, epoch)).permutation(len(texts))
        for place in range(min(len(texts), count - epoch * len(texts))):
            yield SETS[name](texts[order[place]], np.random.default_rng((seed, epoch, place + 1)))
