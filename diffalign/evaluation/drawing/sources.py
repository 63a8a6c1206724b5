"""Source images of prompts, handed to the stock pipelines of the families that take them."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from diffalign.data.encoding.geometry import cut_to
from diffalign.data.encoding.images import cut_image
from diffalign.errors import UserError
from diffalign.evaluation.drawing.pipeline import Pipeline
from diffalign.media.sourced import SourcedPrompt, sources_of
from diffalign.models.families.registry import FAMILIES, get_family
from diffalign.models.families.sources import SourceImages


def taken_by(pipeline: Pipeline) -> SourceImages | None:
    """Return how the family of a pipeline takes a source image; None: it takes none, or is of no family."""
    name = type(pipeline).__name__
    cards = [card for card in FAMILIES.values() if card.pipeline == name and card.source]
    return get_family(cards[0].name).sources if cards else None


def check_sources(pipeline: Pipeline, prompts: Sequence[str]) -> None:
    """Check that the prompts have source images where the pipeline needs them, and none where it takes none.

    Raises:
        UserError: otherwise, or where some prompts have one and others have not.
    """
    sourced, taken = sources_of(prompts), taken_by(pipeline)
    if sourced and taken is None:
        raise UserError(
            f"{len(sourced)} prompts have a source image, such as {sourced[0]!r}, and "
            f"{type(pipeline).__name__} takes none; allowed: prompts without one, or a model that takes "
            "sources (`diffalign models`)"
        )
    if taken is not None and taken.needed and not sourced:
        raise UserError(
            f"{type(pipeline).__name__} draws nothing without a source image, and the prompts have none; "
            "allowed: a prompt set with a column of it (source, path_src, ...), or --source IMAGE"
        )


def drawn_one_by_one(pipeline: Pipeline, prompts: Sequence[str]) -> bool:
    """Return whether the stock pipeline takes the sources of these prompts one at a time only."""
    taken = taken_by(pipeline)
    return taken is not None and not taken.batched and bool(sources_of(prompts))


def told_source(prompt: str) -> Mapping[str, str]:
    """Return what a manifest says of a prompt's source, and its noise depends on; nothing without one."""
    return {"source_image": prompt.digest} if isinstance(prompt, SourcedPrompt) else {}


def source_arguments(
    pipeline: Pipeline, prompts: Sequence[str], height: int | None, width: int | None
) -> dict[str, Any]:
    """Return the sources of some prompts as arguments of the pipeline's call.

    They are cut as training cuts them where the size of what is drawn is given; else the pipeline does with
    them what it does.
    """
    sourced, taken = sources_of(prompts), taken_by(pipeline)
    if not sourced or taken is None:
        return {}
    images = [prompt.image for prompt in sourced]
    if height is not None and width is not None:
        images = [_cut(image, taken.size((height, width))) for image in images]
    return {"image": images if taken.batched else images[0]}


def _cut(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    return cut_image(image, cut_to((image.height, image.width), target))
