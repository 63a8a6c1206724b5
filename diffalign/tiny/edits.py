"""Edits of drawn scenes: a source, an instruction that changes one word of it, and the target.

``make the small red circle blue`` changes a colour, ``turn the small red circle into a square`` a shape. The
target has the layout, style and background of its source, so that two properties of an edited picture can be
measured: whether it follows the instruction, and whether it preserves the rest.

Only numpy and Pillow are imported.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from diffalign.tiny.judge import Region, judge, look
from diffalign.tiny.scenes import (
    COLORS,
    SHAPES,
    Scene,
    Thing,
    caption,
    compose,
    parse_things,
    place,
    render,
    sample_scene,
    split_of,
)
from diffalign.tiny.sets import png

KINDS = ("color", "shape")  # of edits

_INSTRUCTION = re.compile(
    r"make the (small|large) (\w+) (\w+) (\w+)|turn the (small|large) (\w+) (\w+) into a (\w+)"
)
_SAME = 12  # levels of 255 up to which a pixel of source and target counts as unchanged
_NEAR = 4.0  # pixels between a thing's place and the centre of the region that shows it, at most


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


def change(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] = KINDS) -> Edit:
    """Return a random edit, of one of these kinds, of a scene whose things are all different."""
    number, kind = int(rng.integers(len(scene.things))), str(rng.choice(list(kinds)))
    thing = scene.things[number]
    words = [word for word in (COLORS if kind == "color" else SHAPES) if word != getattr(thing, kind)]
    value = str(rng.choice(words))
    things = list(scene.things)
    things[number] = replace(thing, **{kind: value})
    return Edit(scene, instruction(thing, kind, value), replace(scene, things=tuple(things)))


def sample(rng: np.random.Generator, split: str, kinds: Sequence[str] = KINDS) -> Edit:
    """Return a random edit, of one of these kinds, whose two captions belong to `split`."""
    while True:
        scene = sample_scene(rng, split)
        if len(set(scene.things)) < len(scene.things):
            continue
        edit = change(scene, rng, kinds)
        after = edit.target.things
        if len(set(after)) == len(after) and split_of(caption(edit.target)) == split:
            return edit


def mistaken(edit: Edit, rng: np.random.Generator, kinds: Sequence[str] = KINDS) -> Scene:
    """Return a wrong result of an edit: the unchanged source, another value, or another thing changed.

    Wrong changes are of one of these kinds.
    """
    while True:
        wrong = edit.source if rng.random() < 0.3 else change(edit.source, rng, kinds).target
        if wrong != edit.target:
            return wrong


def right(image: Image.Image | np.ndarray, source: str, text: str) -> float:
    """Return the fraction of the target caption's statements that hold in `image`."""
    return judge(image, edited(source, text))


def followed(image: Image.Image | np.ndarray, edit: Edit) -> float:
    """Return 1 if `image` shows the new value at the place of the edited thing, else 0."""
    number = _changed(edit)
    old, new = edit.source.things[number], edit.target.things[number]
    seen = _seen(look(image), edit.target, number)
    kind = "color" if old.color != new.color else "shape"
    return float(seen is not None and getattr(seen, kind) == getattr(new, kind))


def untouched(image: Image.Image | np.ndarray, edit: Edit) -> float:
    """Return the share of the other things that `image` shows at their places, by size, colour and shape.

    Raises:
        ValueError: the scene has no other thing.
    """
    others = [number for number in range(len(edit.source.things)) if number != _changed(edit)]
    if not others:
        raise ValueError(f"{caption(edit.source)!r} has no thing beside the edited one")
    regions = look(image)
    found = [(_seen(regions, edit.target, number), edit.source.things[number]) for number in others]
    words = [(seen and (seen.size, seen.color, seen.shape), thing) for seen, thing in found]
    return float(np.mean([was == (thing.size, thing.color, thing.shape) for was, thing in words]))


def _changed(edit: Edit) -> int:
    """Return the number of the edited thing."""
    pairs = zip(edit.source.things, edit.target.things, strict=True)
    return next(number for number, (old, new) in enumerate(pairs) if old != new)


def _seen(regions: list[Region], scene: Scene, number: int) -> Region | None:
    """Return the region nearest to the place of a scene's thing; None if none is near."""
    x, y, _ = place(scene)[number]
    away = {(r.x - x) ** 2 + (r.y - y) ** 2: r for r in regions}
    nearest = min(away, default=np.inf)
    return away[nearest] if nearest <= _NEAR**2 else None


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


def rows(
    count: int, seed: int = 0, split: str = "train", kinds: Sequence[str] = KINDS
) -> Iterator[dict[str, Any]]:
    """Yield `count` pairs as rows of a JSON-lines set: `prompt`, `source`, `chosen`, `rejected`.

    The chosen image is the target, the rejected one a wrong result.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        edit = sample(rng, split, kinds)
        yield {
            "prompt": edit.instruction,
            "source": png(render(edit.source)),
            "chosen": png(render(edit.target)),
            "rejected": png(render(mistaken(edit, rng, kinds))),
        }


def held_out(count: int, split: str, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[Edit]:
    """Return `count` edits of a split; the result is deterministic."""
    return [sample(np.random.default_rng((seed, number, 1)), split, kinds) for number in range(count)]
