"""Qwen-Image-Edit of several images (2509 and 2511; arXiv 2508.02324), given one.

It is Qwen-Image that is shown the image to edit twice. Qwen2.5-VL reads the instruction together with the
source at an area of 384 x 384 pixels, so that a prompt's states are those of prompt and source; and the
latents of the source, at a megapixel, follow the noisy ones in the transformer, their prediction dropped. The
negative condition is the empty prompt read with the source.

The stock pipeline resizes every source to these areas, whatever is drawn, and so does this family: a source
costs 4096 tokens beside images of any size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.models.codecs import Codec
from diffalign.models.families.base import encoded_by_pipeline
from diffalign.models.families.chat import padded
from diffalign.models.families.qwen_image import QwenImage
from diffalign.models.families.sources import SOURCE, Size, SourceImages

MULTIPLE = 32  # pixels of the sides of a source


@dataclass(frozen=True)
class SeenTwice:
    """A source that the text encoder reads, and whose latents stand beside the noisy ones.

    Attributes:
        tokens: of prompt and source together.
        area: pixels of the source that becomes latents.
        seen: pixels of the source that the text encoder reads.
    """

    tokens: int = 512
    area: int = 1024 * 1024
    seen: int = 384 * 384
    needed: bool = True
    usual: bool = True
    batched: bool = False
    read: bool = True

    def size(self, target: Size) -> Size:
        """Return the size of the source's area that is as wide for its height as the image."""
        found = of_area(self.area, target)
        for _ in range(8):  # until the stock pipeline, which is given the result, leaves it as it is
            found, before = of_area(self.area, found), found
            if found == before:
                break
        return found

    def encode(
        self, pipeline: Any, codec: Codec, pixels: Float[Tensor, "B 3 H W"], frames: int
    ) -> dict[str, Tensor]:
        """``source`` (B, C, h, w) in the network's scale, float32."""
        return {SOURCE: codec.encode(pipeline.vae, pixels)[0]}

    def encode_prompts(
        self, pipeline: Any, prompts: list[str], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 3584) of prompts read with their sources, and their mask
        ``encoder_attention_mask`` (B, tokens), float32.

        Raises:
            UserError: more tokens than ``model.max_sequence_length``.
        """
        rows = []
        for prompt, image in zip(prompts, images, strict=True):  # the pipeline takes them one by one
            height, width = of_area(self.seen, (image.height, image.width))
            shown = pipeline.image_processor.resize(image, height, width)
            states, _ = encoded_by_pipeline(pipeline, [prompt], image=[shown])
            if states.shape[1] > self.tokens:
                raise UserError(
                    f"model.max_sequence_length={self.tokens}; {prompt[:60]!r} and its source have "
                    f"{states.shape[1]} tokens, and as many are needed"
                )
            rows.append(states[0].float())
        full, mask = padded(rows, self.tokens)
        return {"encoder_hidden_states": full, "encoder_attention_mask": mask}

    def shapes(self, latents: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of the source's latents, of 8 x 8 pixels each."""
        height, width = self.size((8 * latents[-2], 8 * latents[-1]))
        return {SOURCE: (latents[0], height // 8, width // 8)}


@dataclass(frozen=True)
class QwenImageEdit(QwenImage):
    """The family ``qwen_image_edit``.

    Attributes:
        max_sequence_length: tokens of prompt and source, and of the template behind them.
    """

    name: str = "qwen_image_edit"

    taken: ClassVar[SeenTwice] = SeenTwice()

    @property
    def sources(self) -> SourceImages:  # type: ignore[override]
        """How it takes a source image: as many tokens as the run gives prompts."""
        return SeenTwice(self.max_sequence_length, self.taken.area, self.taken.seen)

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Qwen2.5-VL's tokenizer; the tokens that template and source leave to the prompt."""
        name, limit = super().reader(pipeline)
        return name, limit - self.taken.seen // 28**2 - 8  # patches of 28 x 28 pixels, and words around them


def of_area(area: int, like: Size) -> Size:
    """Return (height, width) of about ``area`` pixels, as wide for its height as ``like``, each a multiple of
    32: diffusers' ``calculate_dimensions``.
    """
    ratio = like[1] / like[0]
    width = math.sqrt(area * ratio)
    return round(width / ratio / MULTIPLE) * MULTIPLE, round(width / MULTIPLE) * MULTIPLE


QWEN_IMAGE_EDIT = QwenImageEdit()
