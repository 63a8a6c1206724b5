"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513) on a detector: counts, colours, positions.

**Not the official number.** Rules, thresholds and classes are GenEval's, and requirements are parsed from the
prompt (`geneval_prompts`). The detector has other weights of the same architecture, because the original runs
in mmdetection only. Compare scores of this reward with each other only.

There are two scores. ``geneval`` is the graded one that Flow-GRPO (arXiv 2505.05470) trains on: the mean over
requirements of 1 - |required - detected| / required, for counts and for colours; a relation gives 1 or 0.
Where a relation fails, Flow-GRPO's released code appends a 1 after the 0; here it appends the 0 only.
``geneval_correct`` is the benchmark's own: 1 if everything required is detected (surplus objects are allowed
unless the prompt counts), else 0.
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

THRESHOLD = 0.3  # detector score above which an object counts
COUNTING_THRESHOLD = 0.9  # the same for prompts that state a number
MOST = 16  # objects a class, at most
SLACK = 0.1  # share of both sizes that is subtracted from an offset before it counts as a relation
GREY = (0x99, 0x99, 0x99)  # background of an object whose colour is classified
COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}",
                "a photo of a {colour} object")  # fmt: skip

_CLIP = "openai/clip-vit-large-patch14"
_OTHER_NAMES = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv",
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard",
    "cellphone": "cell phone", "doughnut": "donut", "hairdryer": "hair drier",
}  # fmt: skip
LABELS = {name.replace(" ", ""): name for name in OBJECTS} | _OTHER_NAMES
"""GenEval's names of COCO's classes, by the spelling of checkpoints."""


@runtime_checkable
class Colours(Protocol):
    """Classifies the colours of objects."""

    def __call__(self, image: Image.Image, things: Sequence[Detection]) -> list[str]:
        """Return the colour of each object in an RGB image, one of ``COLOURS``."""
        ...


@dataclass(frozen=True)
class ClipColours:
    """Zero-shot colour classification by CLIP, on crops with the background removed."""

    clip: Clip
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # cache by class name

    @torch.no_grad()
    def __call__(self, image: Image.Image, things: Sequence[Detection]) -> list[str]:
        """Return the colour of each object, one of ``COLOURS``."""
        if not things:
            return []
        crops = self.clip.image_embeddings([cut_out(image, thing) for thing in things])
        texts = torch.stack([self._colour_embeddings(thing.label) for thing in things])
        return [COLOURS[i] for i in torch.einsum("nd,ncd->nc", crops, texts).argmax(1).tolist()]

    def _colour_embeddings(self, name: str) -> Tensor:
        """Return (10, D): for each colour, the normalised mean of its texts' unit embeddings."""
        if name not in self._texts:
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEXTS]
            embeddings = self.clip.text_embeddings(texts)
            self._texts[name] = unit(embeddings.view(len(COLOURS), len(COLOUR_TEXTS), -1).mean(1))
        return self._texts[name]


def cut_out(image: Image.Image, thing: Detection) -> Image.Image:
    """Return the crop of an object's box, at least one pixel, with the background outside its mask grey."""
    if thing.mask is not None:
        grey = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, grey, Image.fromarray(thing.mask))
    left, top, right, bottom = map(round, thing.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def counted(detections: Sequence[Detection], requirement: Requirement) -> dict[str, list[Detection]]:
    """Return the detections above the threshold, by class, the highest score first, at most ``MOST`` each."""
    threshold = COUNTING_THRESHOLD if requirement.tag == "counting" else THRESHOLD
    by_name: dict[str, list[Detection]] = {}
    for thing in sorted(detections, key=lambda thing: -thing.score):
        if thing.score > threshold and len(by_name.setdefault(thing.label, [])) < MOST:
            by_name[thing.label].append(thing)
    return by_name


def relations(thing: Detection, other: Detection) -> set[str]:
    """Return the relations of ``thing`` to ``other``: none, one or two of ``geneval_prompts.RELATIONS``.

    A relation holds along an axis if the offset of the centres along it, shortened by a tenth of both sizes,
    is more than half of the length of the offset.
    """
    boxes = np.array([thing.box, other.box]).reshape(2, 2, 2)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    short = np.maximum(np.abs(offset) - SLACK * sizes, 0) * np.sign(offset)
    if (np.abs(short) < 1e-3).all():
        return set()
    x, y = short / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holding in holds.items() if holding}


def graded(
    image: Image.Image,
    requirement: Requirement,
    detections: Mapping[str, Sequence[Detection]],
    colours: Colours,
) -> float:
    """Return the mean credit of the requirements, at most 1; below 0 if far too many objects are detected."""
    credits: list[float] = []
    satisfying: list[Sequence[Detection]] = []  # the objects that satisfy each clause, or none
    for clause in requirement.include:
        things = detections.get(clause.name, ())
        credits.append(_credit(clause.count, len(things)))
        satisfied = len(things) == clause.count
        if not satisfied and (clause.colour or clause.position):
            credits.append(0.0)
        if satisfied and clause.colour:
            coloured = colours(image, things).count(clause.colour)
            credits.append(_credit(clause.count, coloured))
            satisfied = coloured == clause.count
        if satisfied and clause.position:
            satisfied = _in_position(things, clause, satisfying)
            credits.append(float(satisfied))
        satisfying.append(things if satisfied else ())
    return sum(credits) / len(credits)


def correct(
    image: Image.Image,
    requirement: Requirement,
    detections: Mapping[str, Sequence[Detection]],
    colours: Colours,
) -> float:
    """Return 1 if all clauses hold and no exclusion applies, else 0.

    Each clause is checked on as many objects of its class as it requires, those of the highest scores.
    """
    satisfying: list[Sequence[Detection]] = []
    for clause in requirement.include:
        things = detections.get(clause.name, ())[: clause.count]
        if len(things) < clause.count:
            return 0.0
        if clause.colour and colours(image, things).count(clause.colour) < clause.count:
            return 0.0
        if clause.position and not _in_position(things, clause, satisfying):
            return 0.0
        satisfying.append(things)
    return float(all(len(detections.get(clause.name, ())) < clause.count for clause in requirement.exclude))


def _credit(required: int, detected: int) -> float:
    return 1 - abs(required - detected) / required


def _in_position(
    things: Sequence[Detection], clause: Clause, satisfying: Sequence[Sequence[Detection]]
) -> bool:
    """Return whether all objects have the clause's relation to all objects of its target clause."""
    assert clause.position is not None
    relation, target = clause.position
    others = satisfying[target]
    return bool(others) and all(relation in relations(thing, other) for thing in things for other in others)


@dataclass(frozen=True)
class GenEval:
    """GenEval's rules with any detector and any colour classifier."""

    detector: Detector
    colours: Colours
    score: Literal["graded", "correct"] = "graded"
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; pixels (B, 3, H, W) are rounded to 8 bits.

        Raises:
            UserError: a prompt does not follow GenEval's templates.
        """
        self.check_prompts(prompts)  # fail before the detector runs
        return in_batches(self._score, images, prompts, self.batch_size)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for a prompt that does not follow GenEval's templates."""
        for prompt in prompts:
            read_requirement(prompt)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return torch.tensor([self._one(i, p) for i, p in zip(to_pil(images), prompts, strict=True)])

    def _one(self, image: Image.Image, prompt: str) -> float:
        requirement = read_requirement(prompt)
        rule = graded if self.score == "graded" else correct
        return rule(image, requirement, counted(self.detector(image), requirement), self.colours)


def load(source: str | None, place: Place) -> GenEval:
    """Load GenEval's graded score.

    ``source`` is DETECTOR, DETECTOR@CLIP or @CLIP (folders or hub ids). The defaults are the card's
    Mask2Former and OpenAI's CLIP L/14.
    """
    return _load("geneval", source, place)


def load_correct(source: str | None, place: Place) -> GenEval:
    """Load the benchmark's own score, 0 or 1; ``source`` as for ``load``."""
    return replace(_load("geneval_correct", source, place), score="correct")


def _load(name: str, source: str | None, place: Place) -> GenEval:
    detector, _, clip = (source or "").partition("@")
    mask2former = load_mask2former(name, detector or REGISTRY[name].checkpoint, place, LABELS)
    colours = ClipColours(load_clip(name, clip or _CLIP, place))
    return GenEval(replace(mask2former, least=THRESHOLD), colours, batch_size=place.batch_size)
