"""Edits of drawn scenes: a source, an instruction that changes one word of it, and the target.

``make the small red circle blue`` changes a colour, ``turn the small red circle into a square`` a shape. The
target has the layout, style and background of its source, so that two properties of an edited picture can be
measured: whether it follows the instruction, and whether it preserves the rest.

Only numpy and Pillow are imported.
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
_SAME = 12  # levels of 255 up to which a pixel of source and target counts as unchanged


@dataclass(frozen=True)
class Edit:
    """A scene before and after an edit, and the instruction."""

    source: Scene
    instruction: str
    target: Scene


def instruction(thing: Thing, kind: str, value: str) -> str:
    """Return the instruction that changes the colour (`kind` "color") or shape of a thing to `value`."""
    if kind == "color":
        return f"make the {thing.size} {thing.color} {thing.shape} {value}"
    return f"turn the {thing.size} {thing.color} {thing.shape} into a {value}"


def edited(source: str, text: str) -> str:
    """Apply the instruction `text` to a source's caption; return the target's caption.

    Raises:
        ValueError: `text` is no instruction, or names a thing that the source does not have.
    """
    match = _INSTRUCTION.fullmatch(text.strip().rstrip(".").lower())
    words = [word for word in match.groups() if word is not None] if match else []
    kind = "color" if match and match.group(1) else "shape"
    if not words or words[3] not in (COLORS if kind == "color" else SHAPES):
        raise ValueError(
            f"{text!r} is not an instruction; expected 'make the SIZE COLOR SHAPE COLOR' or 'turn the SIZE "
            f"COLOR SHAPE into a SHAPE'; colours {list(COLORS)}, shapes {list(SHAPES)}"
        )
    (things, relation), named = parse_things(source), Thing(*words[:3])
    if named not in things:
        raise ValueError(f"{text!r} is about no thing of {source!r}")
    changed = replace(named, **{kind: words[3]})
    return compose(tuple(changed if thing == named else thing for thing in things), relation)


def change(scene: Scene, rng: np.random.Generator) -> Edit:
    """Return a random edit of a scene whose things are all different."""
    number, kind = int(rng.integers(len(scene.things))), str(rng.choice(["color", "shape"]))
    thing = scene.things[number]
    words = [word for word in (COLORS if kind == "color" else SHAPES) if word != getattr(thing, kind)]
    value = str(rng.choice(words))
    things = list(scene.things)
    things[number] = replace(thing, **{kind: value})
    return Edit(scene, instruction(thing, kind, value), replace(scene, things=tuple(things)))


def sample(rng: np.random.Generator, split: str) -> Edit:
    """Return a random edit whose two captions belong to `split`."""
    while True:
        scene = sample_scene(rng, split)
        if len(set(scene.things)) < len(scene.things):
            continue
        edit = change(scene, rng)
        after = edit.target.things
        if len(set(after)) == len(after) and split_of(caption(edit.target)) == split:
            return edit


def mistaken(edit: Edit, rng: np.random.Generator) -> Scene:
    """Return a wrong result of an edit: the unchanged source, another value, or another thing changed."""
    while True:
        wrong = edit.source if rng.random() < 0.3 else change(edit.source, rng).target
        if wrong != edit.target:
            return wrong


def right(image: Image.Image | np.ndarray, source: str, text: str) -> float:
    """Return the fraction of the target caption's statements that hold in `image`."""
    return judge(image, edited(source, text))


def kept(image: Image.Image, edit: Edit) -> float:
    """Return how well `image` preserves the unchanged part of an edit's source, at most 1.

    It is 1 minus the mean absolute difference to the source, relative to 255, over the pixels in which source
    and target agree.
    """
    before, after, drawn = (
        np.asarray(picture.convert("RGB"), dtype=np.int16)
        for picture in (render(edit.source), render(edit.target), image)
    )
    alike = np.abs(before - after).max(-1) <= _SAME
    return 1 - float(np.abs(drawn - before)[alike].mean()) / 255


def rows(count: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield `count` pairs as rows of a JSON-lines set: `prompt`, `source`, `chosen`, `rejected`.

    The chosen image is the target, the rejected one a wrong result.
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
    """Return `count` edits of a split; the result is deterministic."""
    return [sample(np.random.default_rng((seed, number, 1)), split) for number in range(count)]
