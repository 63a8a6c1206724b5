"""The pre-training corpus of the tiny image models: drawn scenes with noisy captions, as on the web.

This noise makes the base model imperfect. Words for colours, shapes, sizes and relations are wrong at the
rates of `WRONG`, and half of the images are washed out, which captions do not state. Some images are cropped
or upscaled from fewer pixels; SDXL's micro-conditioning (original size, crop corner) reflects that.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny.worlds import SCENES, World

# probabilities of a random word
WRONG = {"size": 0.25, "color": 0.15, "shape": 0.10, "relation": 0.15, "fill": 0.10, "ground": 0.05}
LOW_RESOLUTION, CUT = 0.06, 0.06  # shares of upscaled and of cropped images


@dataclass(frozen=True)
class Corpus:
    """The corpus.

    Attributes:
        pixels: (N, H, H, 3), uint8.
        captions: N noisy captions.
        truths: N correct captions.
        time_ids: (N, 6), SDXL's micro-conditioning.
    """

    pixels: np.ndarray
    captions: list[str]
    truths: list[str]
    time_ids: np.ndarray


def miscaption(scene: Any, rng: np.random.Generator, world: World = SCENES) -> str:
    """Return a caption in which each word is replaced by a random one at the rates of `WRONG`."""
    for slot in world.slots(scene):
        if rng.random() < WRONG[slot[0]]:
            scene = world.changed(scene, slot, str(rng.choice(world.choices(scene, slot))))
    return world.caption(scene)


def degrade(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, ...]]:
    """Upscale a share of images from fewer pixels, crop a share; return the image and SDXL's six time ids."""
    chance, side = rng.random(), image.width
    if chance < LOW_RESOLUTION:
        few = int(rng.integers(side // 4, side * 5 // 8 + 1))
        small = image.resize((few, few), Image.Resampling.BOX)
        return small.resize((side, side), Image.Resampling.BILINEAR), (few, few, 0, 0, side, side)
    if chance < LOW_RESOLUTION + CUT:
        more = side // 4
        top, left = (int(v) for v in rng.integers(0, more + 1, 2))
        wide = Image.new("RGB", (side + more, side + more), image.getpixel((side - 1, side - 1)))
        wide.paste(image, (0, 0))
        return wide.crop((left, top, left + side, top + side)), (
            side + more,
            side + more,
            top,
            left,
            side,
            side,
        )
    return image, (side, side, 0, 0, side, side)


def make(count: int, seed: int, clean: bool = False, world: World = SCENES) -> Corpus:
    """Draw `count` scenes of the train split, half of them with the world's style; `clean` adds no noise."""
    rng = np.random.default_rng(seed)
    pixels, written, truths, ids = [], [], [], []
    for _ in range(count):
        scene = world.sample(rng, "train")
        truths.append(world.caption(scene))
        image = world.render(scene)
        time_ids: tuple[int, ...] = (world.side, world.side, 0, 0, world.side, world.side)
        text = truths[-1]
        if not clean:
            image, time_ids = degrade(image, rng)
            while True:  # the noisy caption must not be a held-out one either
                text = miscaption(scene, rng, world)
                if world.split_of(text) == "train":
                    break
        pixels.append(np.asarray(image))
        written.append(text)
        ids.append(time_ids)
    return Corpus(np.stack(pixels), written, truths, np.array(ids, dtype=np.float32))
