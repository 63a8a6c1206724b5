"""Sets of drawn scenes beyond pairs, drawn as they are read: lists, likes, captions, experts, weight maps;
and pairs of moving shapes.

Each is an endless-looking row of groups over the captions of the train split, in the shape of a json line
that `diffalign.data` reads: the same seed gives the same rows, and a shorter set is the beginning of a longer
one. Pictures of a group share layout, style and background, so that only the words are at stake.
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

GROUPS = 4096  # of a set, unless the name gives fewer
LIST = 4  # pictures of a ranked list
DIFFERENT = 16  # levels of 255 by which a pixel of two pictures must differ to be no noise
WORDS = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": tuple(SHAPES), "relation": tuple(RELATIONS)}
Row = dict[str, Any]


def png(image: Image.Image) -> bytes:
    """PNG bytes without loss, made quickly."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def misdraw(scene: Scene, wrong: int, rng: np.random.Generator) -> Scene:
    """Return the scene with `wrong` different words of its caption changed (three of one thing, seven of
    two), so
    that the caption does not hold from the other end either.
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
    """Pictures of one layout with 0 to 3 wrong words in any order, scored by the judge."""
    true = scene_of(text, rng)
    pictures = [render(misdraw(true, int(wrong), rng)) for wrong in rng.permutation(LIST)]
    scores = [judge(picture, text) for picture in pictures]
    return {"prompt": text, "images": [png(picture) for picture in pictures], "scores": scores}


def _like(text: str, rng: np.random.Generator) -> Row:
    """Return a true picture, liked, or one with a word or two wrong, disliked; as many of the one as the
    other.
    """
    scene, liked = scene_of(text, rng), bool(rng.random() < 0.5)
    if not liked:
        scene = misdraw(scene, 1 + int(rng.random() < TWO_WRONG), rng)
    return {"prompt": text, "image": png(render(scene)), "liked": liked}


def _captions(text: str, rng: np.random.Generator) -> Row:
    """Return a true picture with its caption, and a caption with a word or two wrong."""
    scene = scene_of(text, rng)
    wrong = caption(misdraw(scene, 1 + int(rng.random() < TWO_WRONG), rng))
    return {"prompt": text, "altered": wrong, "image": png(render(scene))}


def _expert(text: str, rng: np.random.Generator) -> Row:
    """Return a true picture."""
    return {"prompt": text, "image": png(render(scene_of(text, rng))), "liked": True}


def _patches(text: str, rng: np.random.Generator) -> Row:
    """Return a true picture and one with a word or two wrong, each with a map that is white where both
    agree.
    """
    true = scene_of(text, rng)
    other = misdraw(true, 1 + int(rng.random() < TWO_WRONG), rng)
    pictures = [render(scene).convert("RGB") for scene in (true, other)]
    apart = np.abs(np.subtract(*(np.asarray(picture, dtype=np.int16) for picture in pictures))).max(-1)
    agree = png(Image.fromarray(np.where(apart > DIFFERENT, 0, 255).astype(np.uint8)))
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
    """Return the first `count` rows of the set `name`; captions of the train split, all of them once
    before any
    twice.
    """
    texts = motions.split_captions("train") if name in VIDEOS else captions_of("train")
    for epoch in range(-(-count // len(texts))):
        order = np.random.default_rng((seed, epoch)).permutation(len(texts))
        for place in range(min(len(texts), count - epoch * len(texts))):
            yield SETS[name](texts[order[place]], np.random.default_rng((seed, epoch, place + 1)))
