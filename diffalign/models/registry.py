"""The model families that diffalign knows, without importing torch: what `diffalign models` lists.

A family is one module that says how its prompts are encoded and its network is called. Everything else
(loading, adapters, attention, export) is the same for all of them and never asks for a family's name.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.errors import unknown

if TYPE_CHECKING:
    from diffalign.models.family import Family


@dataclass(frozen=True)
class FamilyCard:
    """What a family is, and how its checkpoints are recognised.

    Attributes:
        name: configuration name (``model.family``).
        title: the name that the field uses.
        pipeline: diffusers pipeline class, the ``_class_name`` of a folder's model_index.json.
        resolution: pixels of the square that it was trained on.
        example: a hub id of a base model.
        same_shapes: hub ids whose networks have the built-in shapes, so that they can be estimated unseen.
        single_file_key: start of a key that only this family's single-file checkpoints have.
        target: "module:object" of the family.
    """

    name: str
    title: str
    pipeline: str
    resolution: int
    example: str
    same_shapes: tuple[str, ...]
    single_file_key: str
    target: str


_CARDS = (
    FamilyCard(
        name="sd15",
        title="Stable Diffusion 1.x",
        pipeline="StableDiffusionPipeline",
        resolution=512,
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
        same_shapes=(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "runwayml/stable-diffusion-v1-5",
            "CompVis/stable-diffusion-v1-4",
            "mhdang/dpo-sd1.5-text2image-v1",
        ),
        single_file_key="cond_stage_model.transformer.",
        target="diffalign.models.sd15:SD15",
    ),
    FamilyCard(
        name="sd3",
        title="Stable Diffusion 3 and 3.5",
        pipeline="StableDiffusion3Pipeline",
        resolution=1024,
        example="stabilityai/stable-diffusion-3.5-medium",
        same_shapes=("stabilityai/stable-diffusion-3-medium-diffusers",),
        single_file_key="model.diffusion_model.joint_blocks.",
        target="diffalign.models.sd3:SD3",
    ),
    FamilyCard(
        name="sdxl",
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        resolution=1024,
        example="stabilityai/stable-diffusion-xl-base-1.0",
        same_shapes=(
            "stabilityai/stable-diffusion-xl-base-1.0",
            "stabilityai/sdxl-turbo",
            "mhdang/dpo-sdxl-text2image-v1",
        ),
        single_file_key="conditioner.embedders.1.model.",
        target="diffalign.models.sdxl:SDXL",
    ),
)

FAMILIES: Mapping[str, FamilyCard] = {card.name: card for card in _CARDS}


def get_family(name: str) -> "Family":
    """The family of that name; imports torch.

    Raises:
        UserError: there is none.
    """
    if name not in FAMILIES:
        raise unknown("model family (model.family)", name, [*FAMILIES, "auto"])
    module, attribute = FAMILIES[name].target.split(":")
    family: Family = getattr(importlib.import_module(module), attribute)
    return family
