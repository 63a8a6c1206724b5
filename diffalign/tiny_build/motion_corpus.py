"""The pre-training corpus of the tiny video model: clips with defects and noisy captions."""

from dataclasses import dataclass

import numpy as np

from diffalign.tiny.motions import (
    DIRECTIONS,
    SPEEDS,
    Mover,
    caption,
    compose,
    corpus_clip,
    fits,
    parse,
    render,
    split_captions,
    split_of,
)
from diffalign.tiny.scenes import COLORS, SHAPES

WRONG = {"color": 0.10, "shape": 0.08, "direction": 0.08, "speed": 0.15}  # probability of a random word
ALONE = 0.3  # share of clips with one thing


@dataclass(frozen=True)
class Clips:
    """The corpus.

    Attributes:
        frames: (N, 17, 32, 32, 3), uint8.
        captions: N noisy captions.
        truths: N correct captions.
    """

    frames: np.ndarray
    captions: list[str]
    truths: list[str]


def miscaption(movers: tuple[Mover, ...], rng: np.random.Generator) -> str:
    """Return a caption of the train split with words replaced by random ones at the rates of `WRONG`."""

    def word(kind: str, value: str, words: list[str]) -> str:
        return str(rng.choice(words)) if rng.random() < WRONG[kind] else value

    while True:
        named = tuple(
            Mover(
                word("color", m.color, list(COLORS)),
                word("shape", m.shape, list(SHAPES)),
                word("direction", m.direction, list(DIRECTIONS)),
                word("speed", m.speed, list(SPEEDS)),
            )
            for m in movers
        )
        if fits(named) and split_of(compose(named)) == "train":
            return compose(named)


def make(count: int, seed: int, clean: bool = False) -> Clips:
    """Draw `count` clips of the train split; `clean` adds no defects and no noise."""
    rng = np.random.default_rng(seed)
    all_texts = split_captions("train")
    alone = [t for t in all_texts if " and " not in t]
    frames, written, truths = [], [], []
    for _ in range(count):
        text = str(rng.choice(alone if rng.random() < ALONE else all_texts))
        clip = corpus_clip(text, rng)
        if clean:
            clip = type(clip)(clip.movers, clip.layout, clip.dark)
        frames.append(render(clip))
        truths.append(caption(clip))
        written.append(text if clean else miscaption(parse(text), rng))
    return Clips(np.stack(frames), written, truths)
