"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718): agreement of an image with its prompt.

The score is scale x cos(text, image), optionally with a prefix before the prompt and clamped at 0. The
default is 100 cos of OpenAI's ViT-L/14 without clamping, since a clamped score has no gradient. Published
variants:

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
    """The reward.

    Attributes:
        clip: the CLIP.
        scale: factor of the cosine.
        prefix: text before each prompt, joined by a space.
        clamp: whether negative cosines become 0.
        batch_size: images a forward pass.
    """

    clip: Clip
    scale: float = 100.0
    prefix: str = ""
    clamp: bool = False
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        texts = [f"{self.prefix} {prompt}" for prompt in prompts] if self.prefix else prompts
        cosine = (self.clip.text_embeddings(texts) * self.clip.image_embeddings(images)).sum(-1)
        return self.scale * (cosine.clamp_min(0) if self.clamp else cosine)


def load(source: str | None, place: Place) -> ClipScore:
    """Load CLIPScore of OpenAI's ViT-L/14, or of the CLIP at ``source``, with the options in ``source``.

    Raises:
        UserError: no CLIP there, an unknown option, or an invalid value.
    """
    (clip,), options = places_and_options(_NAME, source, 1, ["scale", "prefix", "clamp"])
    scale = number(_NAME, "scale", options.get("scale", "100"))
    clamp = yes_or_no(_NAME, "clamp", options.get("clamp", "no"))
    backbone = load_clip(_NAME, clip or REGISTRY[_NAME].checkpoint, place)
    return ClipScore(backbone, scale, options.get("prefix", "").strip(), clamp, place.batch_size)
