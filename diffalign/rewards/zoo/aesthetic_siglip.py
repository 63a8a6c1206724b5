"""Aesthetic predictor v2.5 (github.com/discus0434/aesthetic-predictor-v2-5): a head on SigLIP.

Linear 1152-1024-128-64-16-1 with dropout and no activation, on the unit pooled output of
google/siglip-so400m-patch14-384; images are stretched to a square. Code and head of that repository are
AGPL-3.0. None of it is included here; users who accept the licence download the head themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.preprocess import Stretch
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.aesthetic import check_width, load_head, score_embeddings
from diffalign.rewards.zoo.clip import load_pretrained, unit

_NAME = "aesthetic_v2_5"
_BACKBONE = "google/siglip-so400m-patch14-384"


@dataclass(frozen=True)
class SiglipAesthetic:
    """A head on the unit pooled outputs of SigLIP's vision tower; prompts are ignored."""

    vision: Any
    head: nn.Module
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        squares = Stretch(self.vision.config.image_size)(images, self.vision.device)
        pooled = self.vision(pixel_values=squares.to(self.vision.dtype)).pooler_output
        return score_embeddings(self.head, unit(pooled))


def load(source: str | None, place: Place) -> SiglipAesthetic:
    """Load the predictor; ``source`` is HEAD or HEAD@BACKBONE.

    BACKBONE is a folder or hub id of a SigLIP, or of its vision tower alone.

    Raises:
        UserError: no head given, a missing file, or a head and a backbone of different widths.
    """
    from transformers import SiglipVisionModel

    if source is None:
        raise UserError(f"reward {_NAME!r} needs its head. {REGISTRY[_NAME].notes}")
    path, _, backbone = source.partition("@")
    backbone = backbone or _BACKBONE
    head = load_head(path, _NAME).to(place.device)
    vision = load_pretrained(_NAME, backbone, place, SiglipVisionModel)
    check_width(_NAME, path, head, backbone, vision.config.hidden_size)
    return SiglipAesthetic(vision, head, place.batch_size)
