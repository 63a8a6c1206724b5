"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718): how well an image fits its prompt.

scale x cos(text, image), optionally with a prefix before the prompt, and cut at 0. Without options it is 100
cos of OpenAI's ViT-L/14, not cut, for what is cut has no gradient. The published variants:

| as in | spec |
|---|---|
| the paper | clipscore:openai/clip-vit-base-patch32@scale=2.5@prefix=A photo depicts@clamp=yes |
| torchmetrics | clipscore:openai/clip-vit-large-patch14@clamp=yes |
| ImageReward's comparison | clipscore:scale=1 |

The prefix and the prompt are joined by a space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import number, places_and_options, yes_or_no
from diffalign.rewards.zoo.clip import Clip, load_clip

_NAME = "clipscore"


@dataclass(frozen=True)
class ClipScore:
    """``scale`` times the cosine of a CLIP; ``clamp`` cuts it at 0."""

    clip: Clip
    scale: float = 100.0
    prefix: str = ""
    clamp: bool = False
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32; PIL images take the exact path, pixels (B, 3, H, W) the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        texts = [f"{self.prefix} {prompt}" for prompt in prompts] if self.prefix else prompts
        cosine = (self.clip.texts(texts) * self.clip.images(images)).sum(-1)
        return self.scale * (cosine.clamp_min(0) if self.clamp else cosine)


def load(source: str | None, place: Place) -> ClipScore:
    """CLIPScore of OpenAI's ViT-L/14, or of the CLIP in a folder or on the hub, with options.

    Raises:
        UserError: no CLIP there, an option that there is not, or a value that it cannot have.
    """
    (clip,), options = places_and_options(_NAME, source, 1, ["scale", "prefix", "clamp"])
    scale = number(_NAME, "scale", options.get("scale", "100"))
    clamp = yes_or_no(_NAME, "clamp", options.get("clamp", "no"))
    backbone = load_clip(_NAME, clip or REGISTRY[_NAME].checkpoint, place)
    return ClipScore(backbone, scale, options.get("prefix", "").strip(), clamp, place.batch_size)
