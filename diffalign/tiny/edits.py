"""Edits of drawn scenes: a source, an instruction that changes one word of it, and the target.

``make the small red circle blue`` changes a colour, ``turn the small red circle into a square`` a shape. The
target keeps layout, style and background of its source, so that a picture can be held against both: does it
show what the instruction makes of the source, and has it kept the rest?

Only numpy and Pillow are needed here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny.judge import judge
from diffalign.tiny.scenes import (
    COLORS,
    SHAPES,
    Scene,
    Thing,
    caption,
    compose,
    parse_things,
    render,
    sample_scene,
    split_of,
)
from diffalign.tiny.sets import png

_INSTRUCTION = re.compile(
    r"make the (small|large) (\w+) (\w+) (\w+)|turn the (small|large) (\w+) (\w+) into a (\w+)"
)
_SAME = 12  # levels of 255 by which a pixel of source and target may differ and count as kept


@dataclass(frozen=True)
class Edit:
    """A scene before and after, and the words that ask for it."""

    source: Scene
    instruction: str
    target: Scene


def instruction(thing: Thing, kind: str, value: str) -> str:
    """Return the words that change the colour (`kind` color) or shape of a thing."""
    if kind == "color":
        return f"make the {thing.size} {thing.color} {thing.shape} {value}"
    return f"turn the {thing.size} {thing.color} {thing.shape} into a {value}"


def edited(source: str, text: str) -> str:
    """Return the caption of the target, of a source's caption; ValueError naming an instruction that is
    none, or that is about a thing that the source has not.
    """
    match = _INSTRUCTION.fullmatch(text.strip().rstrip(".").lower())
    words = [word for word in match.groups() if word is not None] if match else []
    kind = "color" if match and match.group(1) else "shape"
    if not words or words[3] not in (COLORS if kind == "color" else SHAPES):
        raise ValueError(
            f"{text!r} is not an instruction; expected 'make the SIZE COLOR SHAPE COLOR' or 'turn the SIZE "
            f"COLOR SHAPE into a SHAPE'; colours {list(COLORS)}, shapes {list(SHAPES)}"
        )
    (things, relation), meant = parse_things(source), Thing(*words[:3])
    if meant not in things:
        raise ValueError(f"{text!r} is about no thing of {source!r}")
    changed = replace(meant, **{kind: words[3]})
    return compose(tuple(changed if thing == meant else thing for thing in things), relation)


def change(scene: Scene, rng: np.random.Generator) -> Edit:
    """Return a random edit of a scene, whose things must differ."""
    number, kind = int(rng.integers(len(scene.things))), str(rng.choice(["color", "shape"]))
    thing = scene.things[number]
    words = [word for word in (COLORS if kind == "color" else SHAPES) if word != getattr(thing, kind)]
    value = str(rng.choice(words))
    things = list(scene.things)
    things[number] = replace(thing, **{kind: value})
    return Edit(scene, instruction(thing, kind, value), replace(scene, things=tuple(things)))


def sample(rng: np.random.Generator, split: str) -> Edit:
    """Return a random edit whose two captions are of `split`."""
    while True:
        scene = sample_scene(rng, split)
        if len(set(scene.things)) < len(scene.things):
            continue
        edit = change(scene, rng)
        after = edit.target.things
        if len(set(after)) == len(after) and split_of(caption(edit.target)) == split:
            return edit


def mistaken(edit: Edit, rng: np.random.Generator) -> Scene:
    """Return a wrong result: the source as it was, another value, or another thing changed."""
    while True:
        wrong = edit.source if rng.random() < 0.3 else change(edit.source, rng).target
        if wrong != edit.target:
            return wrong


def right(image: Image.Image | np.ndarray, source: str, text: str) -> float:
    """Fraction of the statements that hold of the caption that the instruction makes of the source's."""
    return judge(image, edited(source, text))


def kept(image: Image.Image, edit: Edit) -> float:
    """Return 1 minus the mean difference, in parts of 255, where source and target look alike: 1 is a
    picture that has changed nothing but what it should.
    """
    before, after, drawn = (
        np.asarray(picture.convert("RGB"), dtype=np.int16)
        for picture in (render(edit.source), render(edit.target), image)
    )
    alike = np.abs(before - after).max(-1) <= _SAME
    return 1 - float(np.abs(drawn - before)[alike].mean()) / 255


def rows(count: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, Any]]:
    """Return `count` pairs in the shape of a json line: `prompt`, `source`, `chosen`, `rejected`; the chosen
    picture is the target, the rejected one a wrong result.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        edit = sample(rng, split)
        yield {
            "prompt": edit.instruction,
            "source": png(render(edit.source)),
            "chosen": png(render(edit.target)),
            "rejected": png(render(mistaken(edit, rng))),
        }


def held_out(count: int, split: str, seed: int = 0) -> list[Edit]:
    """Return `count` edits of a split, the same ones at each call."""
    return [sample(np.random.default_rng((seed, number, 1)), split) for number in range(count)]
