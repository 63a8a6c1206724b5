"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513) over a detector: counts, colours, positions.

**Not the official number.** The rules, thresholds and classes are GenEval's, and the prompt says what an
image must show (`geneval_prompts`); but the detector is another training of the same kind of network, because
the original runs in mmdetection alone. Compare scores of this reward with each other only.

Two scores. ``geneval`` is the graded one that Flow-GRPO (arXiv 2505.05470) trains on: the mean over what is
required of 1 - |required - found| / required, of exact counts and of colours; a relation is 1 or 0.
Where a relation fails, its released code adds a 1 after the 0; here it is the 0 alone. ``geneval_correct``
is the benchmark's own: 1 if everything is there (more of it too, unless the prompt counts), else 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.clip import Clip, load_clip, unit
from diffalign.rewards.zoo.detectors import Detection, Detector, load_mask2former
from diffalign.rewards.zoo.geneval_prompts import COLOURS, OBJECTS, Clause, Requirement, read_requirement

THRESHOLD = 0.3  # how sure the detector must be
COUNTING_THRESHOLD = 0.9  # where the prompt counts
MOST = 16  # things of a name
SLACK = 0.1  # of both sizes, by which two things may be apart without a relation
GREY = (0x99, 0x99, 0x99)  # around an object whose colour is classified
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}",
                "a photo of a {colour} object")  # fmt: skip

_CLIP = "openai/clip-vit-large-patch14"
_OTHER_NAMES = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv",
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "cellphone": "cell phone", "doughnut": "donut", "hairdryer": "hair drier",
}  # fmt: skip
LABELS = {name.replace(" ", ""): name for name in OBJECTS} | _OTHER_NAMES
"""GenEval's names of COCO's classes, by how checkpoints spell them."""


@runtime_checkable
class Colours(Protocol):
    """Names colours."""

    def __call__(self, image: Image.Image, things: Sequence[Detection]) -> list[str]:
        """Return the colour of each of these things in an RGB image, one of ``COLOURS``."""
        ...


@dataclass(frozen=True)
class ClipColours:
    """The colour whose texts a CLIP finds nearest to a thing cut out of its surroundings."""

    clip: Clip
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # of names so far

    @torch.no_grad()
    def __call__(self, image: Image.Image, things: Sequence[Detection]) -> list[str]:
        """Return the colour of each thing, one of ``COLOURS``."""
        if not things:
            return []
        crops = self.clip.images([cut_out(image, thing) for thing in things])
        texts = torch.stack([self._of(thing.label) for thing in things])
        return [COLOURS[i] for i in torch.einsum("nd,ncd->nc", crops, texts).argmax(1).tolist()]

    def _of(self, name: str) -> Tensor:
        """(10, D): for each colour the unit mean of its texts' unit embeddings."""
        if name not in self._texts:
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
            embeddings = self.clip.texts(texts)
            self._texts[name] = unit(embeddings.view(len(COLOURS), len(COLOUR_TEXTS), -1).mean(1))
        return self._texts[name]


def cut_out(image: Image.Image, thing: Detection) -> Image.Image:
    """Return the thing's box, grey where its mask is not; at least one pixel."""
    if thing.mask is not None:
        grey = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, grey, Image.fromarray(thing.mask))
    left, top, right, bottom = map(round, thing.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def seen(detections: Sequence[Detection], requirement: Requirement) -> dict[str, list[Detection]]:
    """Return the detections that count, by name, the surest first."""
    threshold = COUNTING_THRESHOLD if requirement.tag == "counting" else THRESHOLD
    by_name: dict[str, list[Detection]] = {}
    for thing in sorted(detections, key=lambda thing: -thing.score):
        if thing.score > threshold and len(by_name.setdefault(thing.label, [])) < MOST:
            by_name[thing.label].append(thing)
    return by_name


def relations(thing: Detection, other: Detection) -> set[str]:
    """Where a thing is, seen from another one: none, one or two of ``geneval_prompts.RELATIONS``.

    The offset of the centres, shortened along each axis by a tenth of both sizes, must be more than half of
    the whole offset's length along that axis.
    """
    boxes = np.array([thing.box, other.box]).reshape(2, 2, 2)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    short = np.maximum(np.abs(offset) - SLACK * sizes, 0) * np.sign(offset)
    if (np.abs(short) < 1e-3).all():
        return set()
    x, y = short / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def graded(
    image: Image.Image, requirement: Requirement, found: Mapping[str, Sequence[Detection]], colours: Colours
) -> float:
    """Return the mean of what the clauses are worth, at most 1; below 0 where there is far too much."""
    worths: list[float] = []
    right: list[Sequence[Detection]] = []  # of each clause, the things that fulfil it, or none
    for clause in requirement.include:
        things = found.get(clause.name, ())
        worths.append(_share(clause.count, len(things)))
        fulfilled = len(things) == clause.count
        if not fulfilled and (clause.colour or clause.position):
            worths.append(0.0)
        if fulfilled and clause.colour:
            coloured = colours(image, things).count(clause.colour)
            worths.append(_share(clause.count, coloured))
            fulfilled = coloured == clause.count
        if fulfilled and clause.position:
            fulfilled = _placed(things, clause, right)
            worths.append(float(fulfilled))
        right.append(things if fulfilled else ())
    return sum(worths) / len(worths)


def correct(
    image: Image.Image, requirement: Requirement, found: Mapping[str, Sequence[Detection]], colours: Colours
) -> float:
    """1 if all clauses hold for the surest things, as many as each wants, and nothing excluded is there."""
    right: list[Sequence[Detection]] = []
    for clause in requirement.include:
        things = found.get(clause.name, ())[: clause.count]
        if len(things) < clause.count:
            return 0.0
        if clause.colour and colours(image, things).count(clause.colour) < clause.count:
            return 0.0
        if clause.position and not _placed(things, clause, right):
            return 0.0
        right.append(things)
    return float(all(len(found.get(clause.name, ())) < clause.count for clause in requirement.exclude))


def _share(required: int, found: int) -> float:
    return 1 - abs(required - found) / required


def _placed(things: Sequence[Detection], clause: Clause, right: Sequence[Sequence[Detection]]) -> bool:
    """Whether all things are where the clause wants them, seen from all that fulfil an earlier clause."""
    assert clause.position is not None
    relation, target = clause.position
    others = right[target]
    return bool(others) and all(relation in relations(thing, other) for thing in things for other in others)


@dataclass(frozen=True)
class GenEval:
    """GenEval's rules over any detector and any namer of colours."""

    detector: Detector
    colours: Colours
    score: Literal["graded", "correct"] = "graded"
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32; pixels (B, 3, H, W) are rounded to 8 bits. UserError for a prompt of another kind."""
        for prompt in prompts:  # before any work is done
            read_requirement(prompt)
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return torch.tensor([self._one(i, p) for i, p in zip(to_pil(images), prompts, strict=True)])

    def _one(self, image: Image.Image, prompt: str) -> float:
        requirement = read_requirement(prompt)
        rule = graded if self.score == "graded" else correct
        return rule(image, requirement, seen(self.detector(image), requirement), self.colours)


def load(source: str | None, place: Place) -> GenEval:
    """Return GenEval's graded score. ``source`` is DETECTOR, DETECTOR@CLIP or @CLIP, folders or hub ids; what
    is not said is the card's Mask2Former and OpenAI's CLIP L/14.
    """
    return _load("geneval", source, place)


def load_correct(source: str | None, place: Place) -> GenEval:
    """Return the same for the benchmark's own 0 or 1."""
    return replace(_load("geneval_correct", source, place), score="correct")


def _load(name: str, source: str | None, place: Place) -> GenEval:
    detector, _, clip = (source or "").partition("@")
    found = load_mask2former(name, detector or REGISTRY[name].checkpoint, place, LABELS)
    colours = ClipColours(load_clip(name, clip or _CLIP, place))
    return GenEval(replace(found, least=THRESHOLD), colours, batch_size=place.batch_size)
