"""The pre-training corpus of the tiny image models: drawn scenes with noisy captions, as on the web.

This noise makes the base model imperfect. Words for colours, shapes, sizes and relations are wrong at the
rates of `WRONG`, and half of the images are washed out, which captions do not state. Some images are cropped
or upscaled from fewer pixels; SDXL's micro-conditioning (original size, crop corner) reflects that.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffalign.tiny.scenes import (
    COLORS,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Thing,
    compose,
    render,
    sample_scene,
)

WRONG = {"size": 0.25, "color": 0.15, "shape": 0.10, "relation": 0.15}  # probability of a random word
LOW_RESOLUTION, CUT = 0.06, 0.06  # shares of upscaled and of cropped images


@dataclass(frozen=True)
class Corpus:
    """The corpus.

    Attributes:
        pixels: (N, 32, 32, 3), uint8.
        captions: N noisy captions.
        truths: N correct captions.
        time_ids: (N, 6), SDXL's micro-conditioning.
    """

    pixels: np.ndarray
    captions: list[str]
    truths: list[str]
    time_ids: np.ndarray


def miscaption(things: tuple[Thing, ...], relation: str | None, rng: np.random.Generator) -> str:
    """Return a caption in which each word is replaced by a random one at the rates of `WRONG`."""

    def word(kind: str, value: str, words: list[str]) -> str:
        return str(rng.choice(words)) if rng.random() < WRONG[kind] else value

    named = tuple(
        Thing(
            word("size", t.size, list(SIZES)),
            word("color", t.color, list(COLORS)),
            word("shape", t.shape, list(SHAPES)),
        )
        for t in things
    )
    return compose(named, None if relation is None else word("relation", relation, list(RELATIONS)))


def degrade(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, ...]]:
    """Upscale a share of images from fewer pixels, crop a share; return the image and SDXL's six time ids."""
    chance = rng.random()
    if chance < LOW_RESOLUTION:
        few = int(rng.integers(8, 21))
        small = image.resize((few, few), Image.Resampling.BOX)
        return small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), (few, few, 0, 0, SIDE, SIDE)
    if chance < LOW_RESOLUTION + CUT:
        top, left = (int(v) for v in rng.integers(0, 9, 2))
        wide = Image.new("RGB", (SIDE + 8, SIDE + 8), image.getpixel((SIDE - 1, SIDE - 1)))
        wide.paste(image, (0, 0))
        return wide.crop((left, top, left + SIDE, top + SIDE)), (SIDE + 8, SIDE + 8, top, left, SIDE, SIDE)
    return image, (SIDE, SIDE, 0, 0, SIDE, SIDE)


def make(count: int, seed: int, clean: bool = False) -> Corpus:
    """Draw `count` scenes of the train split, half of them washed out; `clean` adds no noise."""
    rng = np.random.default_rng(seed)
    pixels, written, truths, ids = [], [], [], []
    for _ in range(count):
        scene = sample_scene(rng, "train")
        truths.append(compose(scene.things, scene.relation))
        image = render(scene)
        time_ids: tuple[int, ...] = (SIDE, SIDE, 0, 0, SIDE, SIDE)
        text = truths[-1]
        if not clean:
            image, time_ids = degrade(image, rng)
            while True:  # the noisy caption must not be a held-out one either
                text = miscaption(scene.things, scene.relation, rng)
                if is_train(text):
                    break
        pixels.append(np.asarray(image))
        written.append(text)
        ids.append(time_ids)
    return Corpus(np.stack(pixels), written, truths, np.array(ids, dtype=np.float32))


def is_train(text: str) -> bool:
    """Return whether a caption belongs to the train split."""
    from diffalign.tiny.scenes import split_of

    return split_of(text) == "train"
