"""The patterned scenes, a second and harder world of images: captions, a renderer, splits of the captions.

A scene is one to three shapes on a background, drawn at 64 x 64 pixels. Its caption names the fill, colour
and shape of each, one or two spatial relations, and the background, e.g. ``a striped red circle to the left
of a solid blue bar and above a hollow green diamond on a grey background``. A caption states neither the
sizes nor whether the background is flat or *lit*, brighter at the top than at the bottom. The light is the
*taste* of `diffalign.tiny.pattern_judge`.

Only numpy and Pillow are imported.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from diffalign.tiny.scenes import RELATIONS, SPLITS

SIDE = 64  # pixels
RADIUS = (8.5, 10.0)  # range in pixels
FILLS = ("solid", "striped", "hollow")
COLORS = {
    "red": (0.90, 0.10, 0.10),
    "orange": (0.95, 0.52, 0.05),
    "yellow": (0.93, 0.90, 0.08),
    "green": (0.10, 0.72, 0.14),
    "cyan": (0.08, 0.82, 0.86),
    "blue": (0.12, 0.25, 0.92),
    "purple": (0.52, 0.12, 0.90),
    "pink": (0.95, 0.20, 0.72),
}
SHAPES = {
    "circle": (1.0, 1.0),
    "square": (0.9, 0.9),
    "triangle": (1.3, 1.15),
    "diamond": (1.22, 1.22),
    "bar": (1.3, 0.7),
}  # half width, half height by radius
GROUNDS = {"white": 0.90, "grey": 0.50, "black": 0.12}  # mean brightness
LIGHT = 0.20  # brightness of a lit background at the top minus that at the bottom
LINE, PERIOD = 2.6, 7.0  # width of an outline, and of a stripe and its gap, in pixels
SHARES = (0.10, 0.55, 0.35)  # of captions with one, two and three shapes
SIZES_OF_SPLITS = {"train": 6144, "validation": 1024, "test": 2048}  # captions that `split_captions` lists

_GAP, _MARGIN, _SUPER = 3.0, 2.0, 4  # pixels between shapes, pixels to the border, supersampling
_FIGURE = r"a (\w+) (\w+) (\w+)"
_RELATION = "|".join(RELATIONS)
_CAPTION = re.compile(
    rf"{_FIGURE}(?: ({_RELATION}) {_FIGURE}(?: and ({_RELATION}) {_FIGURE})?)? on a (\w+) background"
)


@dataclass(frozen=True)
class Figure:
    """One drawn shape, by its words."""

    fill: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.fill} {self.color} {self.shape}"


@dataclass(frozen=True)
class Picture:
    """One to three shapes, the relations of the first to the others, and what the caption does not state.

    Two relations have different axes. `layout` has eight numbers in [0, 1] that determine radii and
    positions, so that a picture with one changed word has the same layout as far as that word allows.
    """

    figures: tuple[Figure, ...]
    relations: tuple[str, ...]
    ground: str
    layout: tuple[float, ...]
    lit: bool = False


Slot = tuple[str, int]  # kind of a word (fill, color, shape, relation, ground), and its place
_COLORS, _SHAPES, _GROUNDS = tuple(COLORS), tuple(SHAPES), tuple(GROUNDS)
_WORDS = {"fill": FILLS, "color": _COLORS, "shape": _SHAPES, "ground": _GROUNDS}


def caption(picture: Picture) -> str:
    """Return the caption of a picture, which never states sizes and light."""
    first, *others = picture.figures
    rest = " and".join(f" {r} {f}" for r, f in zip(picture.relations, others, strict=True))
    return f"{first}{rest} on a {picture.ground} background"


def parse(text: str) -> Picture:
    """Return a picture that shows a caption, with an empty layout.

    Raises:
        ValueError: `text` is no caption of a patterned scene.
    """
    match = _CAPTION.fullmatch(text.strip().rstrip(".").lower())
    words = match.groups() if match else ()
    figures = tuple(Figure(*words[i : i + 3]) for i in (0, 4, 8) if words and words[i])
    relations = tuple(words[i] for i in (3, 7) if words and words[i])
    known = all(f.fill in FILLS and f.color in COLORS and f.shape in SHAPES for f in figures)
    if not words or not known or words[11] not in GROUNDS or len({*map(axis_of, relations)}) < len(relations):
        raise ValueError(
            f"{text!r} is not the caption of a patterned scene; expected 'a FILL COLOR SHAPE on a GROUND "
            "background', with up to two of 'RELATION a FILL COLOR SHAPE' joined by 'and' after the first "
            f"shape, one of each axis; fills {list(FILLS)}, colours {list(COLORS)}, shapes {list(SHAPES)}, "
            f"relations {list(RELATIONS)}, backgrounds {list(GROUNDS)}"
        )
    return Picture(figures, relations, words[11], ())


def axis_of(relation: str) -> int:
    """Return 0 for a horizontal relation, 1 for a vertical one."""
    return 0 if RELATIONS[relation][0] else 1


def slots(picture: Picture) -> list[Slot]:
    """Return the places of the words of a caption."""
    of_figures = [(kind, i) for i in range(len(picture.figures)) for kind in ("fill", "color", "shape")]
    return [*of_figures, *(("relation", i) for i in range(len(picture.relations))), ("ground", 0)]


def word_of(picture: Picture, slot: Slot) -> str:
    """Return the word in a slot."""
    kind, i = slot
    if kind == "relation":
        return picture.relations[i]
    return picture.ground if kind == "ground" else str(getattr(picture.figures[i], kind))


def choices(picture: Picture, slot: Slot) -> list[str]:
    """Return all words for a slot; of two relations each keeps its axis."""
    if slot[0] != "relation":
        return list(_WORDS[slot[0]])
    bound, axis = len(picture.relations) > 1, axis_of(word_of(picture, slot))
    return [r for r in RELATIONS if not bound or axis_of(r) == axis]


def alternatives(picture: Picture, slot: Slot) -> list[str]:
    """Return the words for a slot other than the picture's."""
    return [word for word in choices(picture, slot) if word != word_of(picture, slot)]


def changed(picture: Picture, slot: Slot, word: str) -> Picture:
    """Return the picture with another word in a slot."""
    kind, i = slot
    if kind == "ground":
        return replace(picture, ground=word)
    if kind == "relation":
        relations = (*picture.relations[:i], word, *picture.relations[i + 1 :])
        return replace(picture, relations=relations)
    figures = list(picture.figures)
    figures[i] = replace(figures[i], **{kind: word})
    return replace(picture, figures=tuple(figures))


def place(picture: Picture) -> list[tuple[float, float, float]]:
    """Return centre x, centre y and radius of each shape in pixels; none touches another or the border."""
    u = picture.layout
    radii = [RADIUS[0] + v * (RADIUS[1] - RADIUS[0]) for v in u[: len(picture.figures)]]
    halves = [[r * s for s in SHAPES[f.shape]] for f, r in zip(picture.figures, radii, strict=True)]
    centres = [[0.0, 0.0] for _ in halves]
    low = [[_MARGIN + h for h in both] for both in halves]  # the least centre of each shape on each axis
    # by axis: the related shape, and the side of it on which the first lies
    related = {axis_of(r): (i, RELATIONS[r][axis_of(r)]) for i, r in enumerate(picture.relations, start=1)}
    for axis in (0, 1):
        if axis not in related:
            least = low[0][axis]
            centres[0][axis] = least + u[3 + axis] * (SIDE - 2 * least)
            continue
        i, side = related[axis]
        before, after = (0, i) if side < 0 else (i, 0)
        slack = SIDE - 2 * (low[before][axis] + low[after][axis]) + 2 * _MARGIN - _GAP
        first, second = sorted((u[3 + axis], u[5 + axis]))
        centres[before][axis] = low[before][axis] + first * slack
        centres[after][axis] = SIDE - low[after][axis] - (1 - second) * slack
    for axis, (i, _) in related.items():
        across = 1 - axis
        reach = 0.4 * abs(centres[0][axis] - centres[i][axis])  # keeps the relation unambiguous
        # of two related shapes neither moves towards the other
        shift = 2 * u[7] - 1 if across not in related else related[across][1] * u[7]
        limits = low[i][across], SIDE - low[i][across]
        centres[i][across] = float(np.clip(centres[0][across] + shift * reach, *limits))
    return [(x, y, r) for (x, y), r in zip(centres, radii, strict=True)]


def _mask(shape: str, x: float, y: float, r: float, inset: float = 0.0) -> Image.Image:
    """Return the supersampled mask of a shape, of which a border of `inset` pixels is taken off."""
    k = _SUPER
    mask = Image.new("L", (SIDE * k, SIDE * k), 0)
    draw = ImageDraw.Draw(mask)
    wide, high = (r * s for s in SHAPES[shape])
    if shape in ("circle", "square", "bar"):
        box = [k * (x - wide + inset), k * (y - high + inset), k * (x + wide - inset), k * (y + high - inset)]
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=255)
        return mask
    corners = [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)]  # around the centre of the inscribed circle
    centre, inner = y, wide * high / float(np.hypot(wide, high))
    if shape == "triangle":
        slope = float(np.hypot(wide, 2 * high))
        inner = 2 * wide * high / (wide + slope)
        centre = y + high - inner
        corners = [(0.0, (-high - (centre - y)) / high), *((s, inner / high) for s in (1.0, -1.0))]
    shrink = max(0.0, 1 - inset / inner)
    points = [(k * (x + a * wide * shrink), k * (centre + b * high * shrink)) for a, b in corners]
    draw.polygon(points, fill=255)
    return mask


def _fill(figure: Figure, x: float, y: float, r: float) -> Image.Image:
    """Return the supersampled mask of what is painted of a shape."""
    mask = _mask(figure.shape, x, y, r)
    if figure.fill == "solid":
        return mask
    inside = np.array(_mask(figure.shape, x, y, r, LINE)) > 0
    if figure.fill == "striped":
        across = (np.arange(SIDE * _SUPER) + 0.5) / _SUPER - x
        inside &= (across + PERIOD / 4) % PERIOD >= PERIOD / 2  # a stripe in the middle
    return Image.fromarray(np.where(inside, 0, np.asarray(mask)).astype(np.uint8))


def render(picture: Picture) -> Image.Image:
    """Draw a picture: RGB, 64 x 64 pixels, anti-aliased."""
    height = (np.arange(SIDE) + 0.5) / SIDE
    bright = GROUNDS[picture.ground] + (LIGHT if picture.lit else 0.0) * (0.5 - height)
    levels = np.round(255 * bright.clip(0, 1)).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(levels[:, None, None], (SIDE, SIDE, 3)).copy())
    for figure, (x, y, r) in zip(picture.figures, place(picture), strict=True):
        color = tuple(round(255 * c) for c in COLORS[figure.color])
        image.paste(color, (0, 0), _fill(figure, x, y, r).reduce(_SUPER))
    return image


def picture_of(text: str, rng: np.random.Generator, lit: bool | None = None) -> Picture:
    """Return a random picture that shows `text`; its light is random unless given."""
    layout = tuple(float(v) for v in rng.random(8))
    chance = bool(rng.random() < 0.5)
    return replace(parse(text), layout=layout, lit=chance if lit is None else lit)


def sample_caption(rng: np.random.Generator, split: str | None = None) -> str:
    """Return a random caption; with `split`, one of that split."""

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]  # faster than `rng.choice`

    while True:
        count = 1 + int(np.searchsorted(np.cumsum(SHARES), rng.random()))
        figures = tuple(Figure(pick(FILLS), pick(_COLORS), pick(_SHAPES)) for _ in range(count))
        axes = (0, 1) if rng.random() < 0.5 else (1, 0)
        relations = tuple(pick([r for r in RELATIONS if axis_of(r) == axis]) for axis in axes[: count - 1])
        text = caption(Picture(figures, relations, pick(_GROUNDS), ()))
        if split is None or split_of(text) == split:
            return text


def sample_picture(rng: np.random.Generator, split: str | None = None) -> Picture:
    """Return a random picture, its caption in `split` if that is given."""
    return picture_of(sample_caption(rng, split), rng)


def alter(picture: Picture, rng: np.random.Generator) -> Picture:
    """Return the same picture with one wrong word, whose caption is not equivalent to the old one."""
    while True:
        every = slots(picture)
        slot = every[int(rng.integers(len(every)))]
        other = changed(picture, slot, str(rng.choice(alternatives(picture, slot))))
        if not same(caption(picture), caption(other)):
            return other


def _meaning(text: str) -> str:
    """Return a text that equivalent captions share, as those of A above B and of B below A do."""
    picture = parse(text)
    first, *others = (str(f) for f in picture.figures)
    facts = []
    for relation, other in zip(picture.relations, others, strict=True):
        axis = axis_of(relation)
        pair = (first, other) if RELATIONS[relation][axis] < 0 else (other, first)
        facts.append(f"{axis} {pair[0]} {pair[1]}")
    shapes = [first] if not others else []
    return "; ".join([*shapes, *sorted(facts), picture.ground])


def same(text: str, other: str) -> bool:
    """Return whether two captions are equivalent."""
    return _meaning(text) == _meaning(other)


@lru_cache(maxsize=1 << 16)
def split_of(text: str) -> str:
    """Return the split of a caption, by a hash of its meaning: 20 % test, 10 % validation, the rest train.

    Captions of one shape are train.
    """
    if not parse(text).relations:
        return "train"  # only 360 captions, and training needs every word alone
    bucket = int(hashlib.sha256(_meaning(text).encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 20 else "validation" if bucket < 30 else "train"


@lru_cache(maxsize=4)
def split_captions(split: str) -> tuple[str, ...]:
    """Return `SIZES_OF_SPLITS` distinct captions of a split in a fixed random order.

    A split has millions. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    rng = np.random.default_rng(SPLITS.index(split))
    texts: dict[str, None] = {}
    while len(texts) < SIZES_OF_SPLITS[split]:
        texts[sample_caption(rng, split)] = None
    return tuple(texts)
