"""Detectors: what is in an image, and where. A protocol, and Mask2Former behind it.

Another detector is any callable that gives ``Detection``s; rewards that count take it as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import UserError
from diffalign.rewards.preprocess import as_tensor, normalised
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo.clip import load_whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Detection:
    """One thing in an image.

    Attributes:
        label: what it is.
        score: how sure the detector is, 0 to 1.
        box: left, top, right, bottom in pixels of the image; right and bottom are just outside.
        mask: (H, W), the thing's own pixels; None for a detector of boxes.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Bool[np.ndarray, "H W"] | None = None


@runtime_checkable
class Detector(Protocol):
    """Finds things."""

    def __call__(self, image: Image.Image) -> list[Detection]:
        """Everything that it sees in an RGB image, in any order."""
        ...


@dataclass(frozen=True)
class Mask2Former:
    """Instances by Mask2Former (Cheng et al. 2022, arXiv 2112.01527), from its raw answers.

    Scale, scores and boxes are those of the pipeline that GenEval's detector ran in (mmdetection's
    ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``): the short side at 800 unless the long one would pass
    1333, zeros up to multiples of 32, as many pairs of query and class as there are queries, the likeliest,
    class probability times the mean probability inside the mask, the box around the mask.

    Attributes:
        model: a frozen Mask2FormerForUniversalSegmentation.
        labels: by class index; an empty one is never detected.
        least: detections of lower scores are not given.
    """

    model: Any
    labels: tuple[str, ...]
    least: float = 0.0
    short: int = 800
    long: int = 1333
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[Detection]:
        """Return the instances in an image, the likeliest classes first."""
        height, width = self.size(image)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = normalised(as_tensor(small)[None].to(self.model.device), self.mean, self.std)
        pixels = F.pad(pixels, (0, -width % 32, 0, -height % 32))
        answer = self.model(pixel_values=pixels)
        chances = answer.class_queries_logits[0].float().softmax(-1)[:, :-1]  # the last is nothing at all
        scores, which = chances.flatten().topk(min(len(chances), chances.numel()))
        which = which[scores > self.least]  # a score below it cannot rise: the mask's is at most 1
        queries, classes = which // len(self.labels), which % len(self.labels)
        masks = answer.masks_queries_logits[0].float()[queries]
        if not len(masks):
            return []
        masks = F.interpolate(masks[None], pixels.shape[2:], mode="bilinear")[0, :, :height, :width]
        masks = F.interpolate(masks[None], (image.height, image.width), mode="bilinear")[0]
        return self._detections(scores[: len(which)], classes, masks)

    def size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) that the network sees."""
        sides = (image.height, image.width)
        factor = min(self.short / min(sides), self.long / max(sides))
        return int(sides[0] * factor + 0.5), int(sides[1] * factor + 0.5)

    def _detections(self, scores: Tensor, classes: Tensor, masks: Tensor) -> list[Detection]:
        inside = masks > 0
        sureness = (masks.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        found = []
        rows = zip((scores * sureness).tolist(), classes.tolist(), inside.cpu().numpy(), strict=True)
        for score, number, mask in rows:
            if self.labels[number] and score > self.least and mask.any():
                found.append(Detection(self.labels[number], score, around(mask), mask))
        return found


def around(mask: Bool[np.ndarray, "H W"]) -> tuple[float, float, float, float]:
    """Return the box around a mask that is not empty."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def load_mask2former(name: str, source: str, place: Place, called: Mapping[str, str]) -> Mask2Former:
    """Return the Mask2Former in a folder or on the hub, frozen, in float32: scores are held against
    thresholds.

    ``name`` is the reward that asks; ``called`` says how it calls the checkpoint's labels (in lower case,
    without spaces), all of which the checkpoint must have one of.

    Raises:
        UserError: nothing there, the hub cannot be reached, or it is another model's, or of other classes.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    model = load_whole(name, source, replace(place, dtype="float32"), Mask2FormerForUniversalSegmentation)
    had = [str(model.config.id2label[i]) for i in sorted(model.config.id2label)]
    labels = tuple(called.get(label.lower().replace(" ", "").replace("_", ""), "") for label in had)
    lacking = sorted(set(called.values()) - set(labels))
    if lacking:
        raise UserError(
            f"reward {name!r}: {source!r} knows {len(had)} classes, such as {', '.join(had[:3])}, but not "
            f"{', '.join(lacking[:3])}; a checkpoint of COCO's 80 classes is needed"
        )
    return Mask2Former(model, labels)
