"""PickScore v1 (Kirstain et al., "Pick-a-Pic", arXiv 2305.01569, section 4), and the tiny CLIP in its format.

s(x, y) = exp(logit_scale) cos(text(y), image(x)), no prompt template. The probability that one of several
images of a prompt is preferred is the softmax of their scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.clip import VIT_H, Clip, load_clip


@dataclass(frozen=True)
class PickScore:
    """Scaled cosine of a CLIP."""

    clip: Clip
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32; PIL images take the exact path, pixels (B, 3, H, W) the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return self.clip.scale * (self.clip.texts(prompts) * self.clip.images(images)).sum(-1)


def load(source: str | None, place: Place) -> PickScore:
    """PickScore v1 from the hub, or a model of its format from a folder or hub id."""
    # the model's own repository has no tokenizer
    clip = load_clip("pickscore", source or REGISTRY["pickscore"].checkpoint, place, tokenizer=VIT_H)
    return PickScore(clip, place.batch_size)


def tiny_clip(source: str | None, place: Place) -> PickScore:
    """Return the tiny CLIP that ships with diffalign, or another folder of its format."""
    from diffalign import tiny

    return PickScore(load_clip("tiny_clip", source or str(tiny.clip_path()), place), place.batch_size)
