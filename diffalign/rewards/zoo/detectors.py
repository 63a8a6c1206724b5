"""Object detectors: the protocol, and an implementation by Mask2Former.

Any callable that maps an RGB image to ``Detection``s can replace it in the rewards that count objects.
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
from diffalign.rewards.zoo.clip import load_pretrained

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Attributes:
        label: class name.
        score: confidence of the detector, in [0, 1].
        box: left, top, right, bottom in pixels of the image; right and bottom are exclusive.
        mask: (H, W), true for the object's pixels; None for a detector of boxes.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Bool[np.ndarray, "H W"] | None = None


@runtime_checkable
class Detector(Protocol):
    """Detects objects in an image."""

    def __call__(self, image: Image.Image) -> list[Detection]:
        """Return all detections in an RGB image, in any order."""
        ...


@dataclass(frozen=True)
class Mask2Former:
    """Instance detection with Mask2Former (Cheng et al. 2022, arXiv 2112.01527).

    Resizing, scores and boxes follow GenEval's detection pipeline (mmdetection's
    ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``):

    * the short side becomes 800 pixels unless the long one would exceed 1333; padding to multiples of 32;
    * with Q queries, the Q pairs of query and class with the highest class probability are taken;
    * the score is the class probability times the mean mask probability inside the mask;
    * the box is the bounding box of the mask.

    Attributes:
        model: a frozen Mask2FormerForUniversalSegmentation.
        labels: labels by class index; classes with an empty label are ignored.
        least: detections need a score above this.
        short: length of the short side after resizing, in pixels.
        long: largest length of the long side after resizing, in pixels.
        mean: mean of pixels in [0, 1], by channel.
        std: standard deviation of pixels in [0, 1], by channel.
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
        output = self.model(pixel_values=pixels)
        probabilities = output.class_queries_logits[0].float().softmax(-1)[:, :-1]  # without "no object"
        scores, pairs = probabilities.flatten().topk(min(len(probabilities), probabilities.numel()))
        pairs = pairs[scores > self.least]  # the mask's factor is at most 1, so lower scores stay below
        queries, classes = pairs // len(self.labels), pairs % len(self.labels)
        masks = output.masks_queries_logits[0].float()[queries]
        if not len(masks):
            return []
        masks = F.interpolate(masks[None], pixels.shape[2:], mode="bilinear")[0, :, :height, :width]
        masks = F.interpolate(masks[None], (image.height, image.width), mode="bilinear")[0]
        return self._detections(scores[: len(pairs)], classes, masks)

    def size(self, image: Image.Image) -> tuple[int, int]:
        """Return (height, width) of the network's input, before padding."""
        sides = (image.height, image.width)
        factor = min(self.short / min(sides), self.long / max(sides))
        return int(sides[0] * factor + 0.5), int(sides[1] * factor + 0.5)

    def _detections(self, scores: Tensor, classes: Tensor, masks: Tensor) -> list[Detection]:
        inside = masks > 0
        mask_scores = (masks.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        rows = zip((scores * mask_scores).tolist(), classes.tolist(), inside.cpu().numpy(), strict=True)
        return [
            Detection(self.labels[number], score, around(mask), mask)
            for score, number, mask in rows
            if self.labels[number] and score > self.least and mask.any()
        ]


def around(mask: Bool[np.ndarray, "H W"]) -> tuple[float, float, float, float]:
    """Return the bounding box (left, top, right, bottom) of a non-empty mask."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def load_mask2former(name: str, source: str, place: Place, called: Mapping[str, str]) -> Mask2Former:
    """Load a Mask2Former, frozen, in float32 since its scores are compared with thresholds.

    Args:
        name: the reward's name, for messages.
        source: a folder or a hub id.
        place: where it runs.
        called: the reward's label of each checkpoint label (in lower case, without spaces); the checkpoint
            must have a class for each of the reward's labels.

    Raises:
        UserError: no such checkpoint, the hub cannot be reached, another model, or missing classes.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    model = load_pretrained(
        name, source, replace(place, dtype="float32"), Mask2FormerForUniversalSegmentation
    )
    classes = [str(model.config.id2label[i]) for i in sorted(model.config.id2label)]
    labels = tuple(called.get(label.lower().replace(" ", "").replace("_", ""), "") for label in classes)
    missing = sorted(set(called.values()) - set(labels))
    if missing:
        raise UserError(
            f"reward {name!r}: {source!r} knows {len(classes)} classes, such as {', '.join(classes[:3])}, "
            f"but not {', '.join(missing[:3])}; a checkpoint of COCO's 80 classes is needed"
        )
    return Mask2Former(model, labels)
