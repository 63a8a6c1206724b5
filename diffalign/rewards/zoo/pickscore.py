"""PickScore v1 (Kirstain et al., "Pick-a-Pic", arXiv 2305.01569, section 4), and the tiny CLIP in its format.

s(x, y) = exp(logit_scale) cos(text(y), image(x)), without a prompt template. The softmax of the scores of
several images of a prompt is the probability that each is preferred. ``pickscore:scale=1`` gives the plain
cosine, with which SmPO's released code smooths labels (arXiv 2506.02698).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import number, places_and_options
from diffalign.rewards.zoo.clip import VIT_H, Clip, load_clip


@dataclass(frozen=True)
class PickScore:
    """The scaled cosine of a CLIP; ``scale`` None takes the model's own, exp(logit_scale)."""

    clip: Clip
    batch_size: int = 16
    scale: float | None = None

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        scale = self.clip.scale if self.scale is None else self.scale
        return scale * (self.clip.text_embeddings(prompts) * self.clip.image_embeddings(images)).sum(-1)


def load(source: str | None, place: Place) -> PickScore:
    """Load PickScore v1 from the hub, or a model of its format at ``source``; the option is ``scale``.

    Raises:
        UserError: no CLIP there, an unknown option, or a scale that is no number.
    """
    (model,), options = places_and_options("pickscore", source, 1, ["scale"])
    scale = number("pickscore", "scale", options["scale"]) if "scale" in options else None
    # PickScore's repository holds no tokenizer
    clip = load_clip("pickscore", model or REGISTRY["pickscore"].checkpoint, place, tokenizer=VIT_H)
    return PickScore(clip, place.batch_size, scale)


def tiny_clip(source: str | None, place: Place) -> PickScore:
    """Load the tiny CLIP that ships with diffalign, or another folder of its format."""
    from diffalign import tiny

    return PickScore(load_clip("tiny_clip", source or str(tiny.clip_path()), place), place.batch_size)
