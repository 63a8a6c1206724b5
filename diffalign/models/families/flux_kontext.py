"""FLUX.1 Kontext (Black Forest Labs 2025, arXiv 2506.15742): FLUX.1-dev that is shown the image to edit.

The packed latents of the source follow those of the noisy image, at the same places but for a first
coordinate of 1, and their prediction is dropped. Without a source the network draws from text alone, as the
stock pipeline has it.

The source is cut to the size of the image. The stock pipeline resizes sources to one of 17 sizes of about one
megapixel (``_auto_resize``) and images to one megapixel (``max_area``); ``diffalign generate`` leaves both at
the size of the run.
"""

from dataclasses import dataclass
from typing import ClassVar

from diffalign.models.families.flux import Flux
from diffalign.models.families.sources import AsLatents, SourceImages


@dataclass(frozen=True)
class FluxKontext(Flux):
    """The family ``flux_kontext``.

    Attributes:
        max_sequence_length: tokens of T5.
        embedded_guidance: the guidance that a network with a guidance embedding takes.
    """

    name: str = "flux_kontext"

    sources: ClassVar[SourceImages | None] = AsLatents(usual=True, batched=True)


FLUX_KONTEXT = FluxKontext()
