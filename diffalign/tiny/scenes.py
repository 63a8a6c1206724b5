"""The drawn scenes: captions, a renderer and deterministic splits of the captions.

A scene is one or two flat shapes on a uniform background, drawn at 32 x 32 pixels. Its caption names size,
colour and shape of each thing and their spatial relation, e.g. ``a large red circle to the left of a small
blue square``. A caption states neither whether the background is light or dark, nor whether the image is
vivid or washed out. Vividness is the *taste* of `diffalign.tiny.judge`, so that alignment to captions and to
taste can be measured separately.

Only numpy and Pillow are imported.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32  # pixels
SIZES = {"small": (3.6, 4.0), "large": (5.4, 5.8)}  # ranges of the radius in pixels
COLORS = {
    "red": (0.90, 0.10, 0.12),
    "yellow": (0.93, 0.85, 0.08),
    "green": (0.10, 0.70, 0.16),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.12, 0.20, 0.90),
    "pink": (0.93, 0.20, 0.80),
}
SHAPES = {
    "circle": (1.0, 1.0),
    "square": (0.886, 0.886),
    "triangle": (1.17, 1.013),
}  # half width, half height by radius
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
WORDS = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": tuple(SHAPES), "relation": tuple(RELATIONS)}
SPLITS = ("train", "validation", "test")

_GAP, _MARGIN, _SUPER = 2.5, 0.8, 8  # pixels between things, pixels to the border, supersampling
_THING = r"a (small|large) (\w+) (\w+)"
_CAPTION = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})?")


@dataclass(frozen=True)
class Thing:
    """One drawn shape, by its words."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two things, their relation, and the properties that the caption does not state.

    `layout` has eight numbers in [0, 1] that determine radii and positions, so that a scene with one changed
    word has the same layout as far as that word allows.
    """

    things: tuple[Thing, ...]
    relation: str | None
    layout: tuple[float, ...]
    dark: bool = False
    vivid: bool = True


@dataclass(frozen=True)
class Statement:
    """One statement of a caption: its kind (count, size, color, shape, relation), thing and value."""

    kind: str
    index: int
    value: str


def caption(scene: Scene) -> str:
    """Return the caption of a scene, which never states style and background."""
    return compose(scene.things, scene.relation)


def compose(things: tuple[Thing, ...], relation: str | None) -> str:
    """Return the caption of things and their relation."""
    return str(things[0]) if relation is None else f"{things[0]} {relation} {things[1]}"


def parse_things(text: str) -> tuple[tuple[Thing, ...], str | None]:
    """Return the things and the relation of a caption; ValueError if `text` is no scene caption."""
    match = _CAPTION.fullmatch(text.strip().rstrip(".").lower())
    words = match.groups() if match else ()
    named = [words[0:3], words[4:7]] if words and words[3] else [words[0:3]]
    if not words or any(w[1] not in COLORS or w[2] not in SHAPES for w in named):
        raise ValueError(
            f"{text!r} is not a scene caption; expected 'a SIZE COLOR SHAPE' or two of them with a "
            f"RELATION between; "
            f"sizes {list(SIZES)}, colours {list(COLORS)}, shapes {list(SHAPES)}, relations {list(RELATIONS)}"
        )
    return tuple(Thing(*w) for w in named), words[3]


def same(text: str, other: str) -> bool:
    """Return whether two captions are equivalent: equal, or inverse, as A above B and B below A."""
    (things, relation), (other_things, other_relation) = parse_things(text), parse_things(other)
    equal = (things, relation) == (other_things, other_relation)
    if relation is None or other_relation is None:
        return equal
    right, down = RELATIONS[relation]
    return equal or (things == other_things[::-1] and RELATIONS[other_relation] == (-right, -down))


def parse(text: str) -> tuple[Statement, ...]:
    """Return the statements of a caption: 4 for one thing, 8 for two; ValueError if it is none."""
    things, relation = parse_things(text)
    out = [Statement("count", 0, str(len(things)))]
    for i, thing in enumerate(things):
        out += [Statement(k, i, getattr(thing, k)) for k in ("size", "color", "shape")]
    return tuple(out) if relation is None else (*out, Statement("relation", 0, relation))


def _extent(thing: Thing, u: float) -> tuple[float, float, float]:
    low, high = SIZES[thing.size]
    radius = low + u * (high - low)
    width, height = SHAPES[thing.shape]
    return radius, radius * width, radius * height


def _between(low: float, high: float, u: float) -> float:
    return low + u * max(0.0, high - low)


def place(scene: Scene) -> list[tuple[float, float, float]]:
    """Return centre x, centre y and radius of each thing in pixels; nothing touches another or the border."""
    u = scene.layout
    ext = [_extent(t, u[i]) for i, t in enumerate(scene.things)]
    if scene.relation is None:
        (r, w, h) = ext[0]
        return [
            (
                _between(_MARGIN + w, SIDE - _MARGIN - w, u[2]),
                _between(_MARGIN + h, SIDE - _MARGIN - h, u[3]),
                r,
            )
        ]
    direction = RELATIONS[scene.relation]
    axis = 0 if direction[0] else 1
    order = (0, 1) if direction[axis] < 0 else (1, 0)
    along, across = 1 + axis, 2 - axis
    a, b = ext[order[0]], ext[order[1]]
    slack = SIDE - 2 * _MARGIN - _GAP - 2 * a[along] - 2 * b[along]
    cuts = sorted((u[2], u[3]))
    first = _MARGIN + a[along] + cuts[0] * slack
    second = SIDE - _MARGIN - b[along] - (1 - cuts[1]) * slack
    side_a = _between(_MARGIN + a[across], SIDE - _MARGIN - a[across], u[4])
    reach = 0.55 * (second - first)  # keeps the relation unambiguous
    low, high = max(_MARGIN + b[across], side_a - reach), min(SIDE - _MARGIN - b[across], side_a + reach)
    side_b = _between(low, high, u[5]) if low <= high else (low if side_a < low else high)
    spots = {order[0]: (first, side_a, a[0]), order[1]: (second, side_b, b[0])}
    return [(p, q, r) if axis == 0 else (q, p, r) for p, q, r in (spots[0], spots[1])]


def tone(rgb: tuple[float, float, float], vivid: bool, u: float) -> tuple[int, int, int]:
    """Return a drawn colour in [0, 255], mixed with grey if not vivid; `u` in [0, 1] is the brightness."""
    keep = 1.0 if vivid else 0.45
    values = [(keep * c + (1 - keep) * 0.5) * (0.96 + 0.08 * u) for c in rgb]
    r, g, b = (round(255 * min(1.0, v)) for v in values)
    return r, g, b


def render(scene: Scene) -> Image.Image:
    """Draw a scene: RGB, 32 x 32 pixels, anti-aliased."""
    u, k = scene.layout, _SUPER
    ground = (0.10, 0.10, 0.11) if scene.dark else (0.95, 0.95, 0.93)
    image = Image.new("RGB", (SIDE * k, SIDE * k), tone(ground, scene.vivid, u[6]))
    draw = ImageDraw.Draw(image)
    for i, (thing, (x, y, r)) in enumerate(zip(scene.things, place(scene), strict=True)):
        w, h = (r * s for s in SHAPES[thing.shape])
        box = [k * (x - w), k * (y - h), k * (x + w), k * (y + h)]
        fill = tone(COLORS[thing.color], scene.vivid, u[7] if i == 0 else 1 - u[7])
        if thing.shape == "circle":
            draw.ellipse(box, fill=fill)
        elif thing.shape == "square":
            draw.rectangle(box, fill=fill)
        else:
            draw.polygon([(k * x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
    return image.reduce(k)


def scene_of(
    text: str, rng: np.random.Generator, vivid: bool | None = None, dark: bool | None = None
) -> Scene:
    """Return a random scene that shows `text`; style and background are random unless given."""
    things, relation = parse_things(text)
    layout = tuple(float(v) for v in rng.random(8))
    flips = rng.random(2) < 0.5
    return Scene(
        things,
        relation,
        layout,
        dark=bool(flips[0]) if dark is None else dark,
        vivid=bool(flips[1]) if vivid is None else vivid,
    )


def sample_caption(rng: np.random.Generator, split: str | None = None) -> str:
    """Return a random caption, 15 % of them with one thing; with `split`, one of that split."""
    while True:
        things = tuple(
            Thing(*(str(rng.choice(list(words))) for words in (SIZES, COLORS, SHAPES))) for _ in range(2)
        )
        alone = rng.random() < 0.15
        text = compose(things[:1] if alone else things, None if alone else str(rng.choice(list(RELATIONS))))
        if split is None or split_of(text) == split:
            return text


def sample_scene(rng: np.random.Generator, split: str | None = None) -> Scene:
    """Return a random scene, its caption in `split` if that is given."""
    return scene_of(sample_caption(rng, split), rng)


def slots(scene: Scene) -> list[tuple[str, int]]:
    """Return the words of a scene's caption: kind (size, color, shape, relation) and index of the thing."""
    of_things = [(kind, i) for i in range(len(scene.things)) for kind in ("size", "color", "shape")]
    return of_things + [("relation", 0)] * (scene.relation is not None)


def choices(scene: Scene, slot: tuple[str, int]) -> list[str]:
    """Return all words for a slot of a scene."""
    return list(WORDS[slot[0]])


def alternatives(scene: Scene, slot: tuple[str, int]) -> list[str]:
    """Return the words for a slot other than the scene's."""
    kind, i = slot
    old = scene.relation if kind == "relation" else getattr(scene.things[i], kind)
    return [w for w in choices(scene, slot) if w != old]


def changed(scene: Scene, slot: tuple[str, int], word: str) -> Scene:
    """Return the scene with another word in a slot."""
    kind, i = slot
    if kind == "relation":
        return replace(scene, relation=word)
    things = list(scene.things)
    things[i] = replace(things[i], **{kind: word})
    return replace(scene, things=tuple(things))


def alter(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Scene:
    """Return the same scene with one wrong word.

    `kind` is size, color, shape or relation; None: random. ValueError for a kind that the scene lacks.
    """
    kinds = ["size", "color", "shape"] * len(scene.things) + ["relation"] * (scene.relation is not None)
    kind = str(rng.choice(kinds)) if kind is None else kind
    if kind not in kinds:
        raise ValueError(f"kind must be one of {sorted(set(kinds))} for {caption(scene)!r}, got {kind!r}")
    # one draw for the thing and one for the word; a relation has no thing
    i = 0 if kind == "relation" else int(rng.integers(len(scene.things)))
    return changed(scene, (kind, i), str(rng.choice(alternatives(scene, (kind, i)))))


def split_of(text: str) -> str:
    """Return the split of a caption, by hash: 23 % test, 13 % validation, the rest train.

    Captions of one thing are train.
    """
    things, relation = parse_things(text)
    if relation is None:
        return "train"  # only 36 captions, and training needs every word alone
    bucket = int(hashlib.sha256(compose(things, relation).encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 23 else "validation" if bucket < 36 else "train"


def captions() -> Iterator[str]:
    """Yield all captions in a fixed order: 36 of one thing and 5184 of two."""
    things = [Thing(s, c, h) for s in SIZES for c in COLORS for h in SHAPES]
    yield from (str(t) for t in things)
    yield from (compose((a, b), r) for a in things for b in things for r in RELATIONS)


@lru_cache(maxsize=4)
def split_captions(split: str) -> tuple[str, ...]:
    """Return all captions of a split in a fixed shuffled order; ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    texts = [c for c in captions() if split_of(c) == split]
    order = np.random.default_rng(len(texts)).permutation(len(texts))
    return tuple(texts[i] for i in order)
