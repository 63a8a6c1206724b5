"""The model families that diffalign knows, without importing torch: what `diffalign models` lists.

A family is one module that encodes prompts and calls the network. Everything else (loading, adapters,
attention, export) is common to all families and does not depend on their names.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.errors import UserError, unknown

if TYPE_CHECKING:
    from diffalign.models.families.base import Family


@dataclass(frozen=True)
class FamilyCard:
    """The facts on a family, and how its checkpoints are recognised.

    Attributes:
        name: configuration name (``model.family``).
        title: the name that the field uses.
        pipeline: diffusers pipeline class, the ``_class_name`` of a folder's model_index.json.
        resolution: pixels of the square that it was trained on.
        example: a hub id of a base model.
        same_shapes: hub ids whose networks have the built-in shapes, so that they can be estimated unseen.
        single_file_key: start of a key that only this family's single-file checkpoints have, or several; ()
            where diffusers reads no single files.
        target: "module:object" of the family.
        other_shapes: hub ids of networks of other shapes, each with the "module:object" of the differing
            configurations.
        moves: the family whose models become this one's with a ``model.motion_adapter``.
        recognised_by: (component, key, value) of configurations that tell its models from those of another
            family with the same pipeline class; of two cards that fit, the one with more of them wins.
        refuses: components that some of its pipelines have and that cannot be trained here, with the reason.
    """

    name: str
    title: str
    pipeline: str
    resolution: int
    example: str
    same_shapes: tuple[str, ...]
    single_file_key: str | tuple[str, ...]
    target: str
    other_shapes: tuple[tuple[str, str], ...] = ()
    moves: str | None = None
    refuses: tuple[tuple[str, str], ...] = ()
    recognised_by: tuple[tuple[str, str, Any], ...] = ()


_CARDS = (
    FamilyCard(
        name="animatediff",
        title="AnimateDiff on Stable Diffusion 1.x",
        pipeline="AnimateDiffPipeline",
        resolution=512,
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
        same_shapes=(),
        single_file_key=(),
        target="diffalign.models.families.animatediff:ANIMATEDIFF",
        moves="sd15",
    ),
    FamilyCard(
        name="cogvideox",
        title="CogVideoX",
        pipeline="CogVideoXPipeline",
        resolution=480,
        example="THUDM/CogVideoX-2b",
        same_shapes=("THUDM/CogVideoX-2b", "zai-org/CogVideoX-2b"),
        single_file_key=(),
        target="diffalign.models.families.cogvideox:COGVIDEOX",
        other_shapes=(
            ("THUDM/CogVideoX-5b", "diffalign.models.families.cogvideox:LARGE"),
            ("zai-org/CogVideoX-5b", "diffalign.models.families.cogvideox:LARGE"),
        ),
    ),
    FamilyCard(
        name="flux",
        title="FLUX.1",
        pipeline="FluxPipeline",
        resolution=1024,
        example="black-forest-labs/FLUX.1-dev",
        same_shapes=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev"),
        single_file_key=("double_blocks.", "model.diffusion_model.double_blocks."),
        target="diffalign.models.families.flux:FLUX",
        other_shapes=(("black-forest-labs/FLUX.1-schnell", "diffalign.models.families.flux:SCHNELL"),),
    ),
    FamilyCard(
        name="flux2_klein",
        title="FLUX.2 klein",
        pipeline="Flux2KleinPipeline",
        resolution=1024,
        example="black-forest-labs/FLUX.2-klein-base-4B",
        same_shapes=("black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-klein-4B"),
        single_file_key=(),
        target="diffalign.models.families.flux2_klein:FLUX2_KLEIN",
        other_shapes=(
            ("black-forest-labs/FLUX.2-klein-base-9B", "diffalign.models.families.flux2_klein:LARGE"),
            ("black-forest-labs/FLUX.2-klein-9B", "diffalign.models.families.flux2_klein:LARGE"),
        ),
    ),
    FamilyCard(
        name="ltx",
        title="LTX-Video 0.9",
        pipeline="LTXPipeline",
        resolution=512,
        example="Lightricks/LTX-Video",
        same_shapes=("Lightricks/LTX-Video",),
        single_file_key=(),
        target="diffalign.models.families.ltx:LTX",
    ),
    FamilyCard(
        name="pixart",
        title="PixArt-Sigma",
        pipeline="PixArtSigmaPipeline",
        resolution=1024,
        example="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        same_shapes=(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
            "PixArt-alpha/PixArt-Sigma-XL-2-256x256",
        ),
        single_file_key=(),
        target="diffalign.models.families.pixart:PIXART",
    ),
    FamilyCard(
        name="pixart_alpha",
        title="PixArt-alpha",
        pipeline="PixArtAlphaPipeline",
        resolution=1024,
        example="PixArt-alpha/PixArt-XL-2-1024-MS",
        same_shapes=("PixArt-alpha/PixArt-XL-2-1024-MS",),
        single_file_key=(),
        target="diffalign.models.families.pixart:PIXART_ALPHA",
        other_shapes=(("PixArt-alpha/PixArt-XL-2-512x512", "diffalign.models.families.pixart:UNTOLD"),),
    ),
    FamilyCard(
        name="qwen_image",
        title="Qwen-Image",
        pipeline="QwenImagePipeline",
        resolution=1024,
        example="Qwen/Qwen-Image",
        same_shapes=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
        single_file_key=(),
        target="diffalign.models.families.qwen_image:QWEN_IMAGE",
    ),
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
        target="diffalign.models.families.sd15:SD15",
    ),
    FamilyCard(
        name="sd21",
        title="Stable Diffusion 2.x",
        pipeline="StableDiffusionPipeline",
        resolution=768,
        example="stabilityai/stable-diffusion-2-1",
        same_shapes=("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2"),
        single_file_key="cond_stage_model.model.",
        target="diffalign.models.families.sd21:SD21",
        recognised_by=(("unet", "cross_attention_dim", 1024),),
    ),
    FamilyCard(
        name="sd3",
        title="Stable Diffusion 3 and 3.5",
        pipeline="StableDiffusion3Pipeline",
        resolution=1024,
        example="stabilityai/stable-diffusion-3.5-medium",
        same_shapes=("stabilityai/stable-diffusion-3-medium-diffusers",),
        single_file_key="model.diffusion_model.joint_blocks.",
        target="diffalign.models.families.sd3:SD3",
        other_shapes=(
            ("stabilityai/stable-diffusion-3.5-medium", "diffalign.models.families.sd3:MEDIUM_35"),
            ("stabilityai/stable-diffusion-3.5-large", "diffalign.models.families.sd3:LARGE_35"),
            ("stabilityai/stable-diffusion-3.5-large-turbo", "diffalign.models.families.sd3:LARGE_35"),
        ),
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
        target="diffalign.models.families.sdxl:SDXL",
    ),
    FamilyCard(
        name="text_to_video",
        title="ModelScope text-to-video",
        pipeline="TextToVideoSDPipeline",
        resolution=256,
        example="ali-vilab/text-to-video-ms-1.7b",
        same_shapes=(
            "ali-vilab/text-to-video-ms-1.7b",
            "damo-vilab/text-to-video-ms-1.7b",
            "cerspense/zeroscope_v2_576w",
        ),
        single_file_key=(),
        target="diffalign.models.families.text_to_video:TEXT_TO_VIDEO",
    ),
    FamilyCard(
        name="wan",
        title="Wan 2.1 and 2.2",
        pipeline="WanPipeline",
        resolution=480,
        example="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        same_shapes=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
        single_file_key=(),
        target="diffalign.models.families.wan:WAN",
        other_shapes=(
            ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "diffalign.models.families.wan:LARGE"),
            ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "diffalign.models.families.wan:TI2V"),
        ),
        refuses=(
            (
                "transformer_2",
                "it is two experts, for high and for low noise, and one network is trained here. Allowed: "
                "the models of one transformer (Wan 2.1, Wan 2.2 TI2V-5B), or a folder that holds one expert "
                "alone as its transformer, trained at that expert's times (method time: {type: uniform, "
                "steps: null, low: 0.875} for A14B's high-noise expert, high: 0.875 for the other)",
            ),
        ),
    ),
    FamilyCard(
        name="z_image",
        title="Z-Image",
        pipeline="ZImagePipeline",
        resolution=1024,
        example="Tongyi-MAI/Z-Image",
        same_shapes=("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
        single_file_key=(),
        target="diffalign.models.families.z_image:Z_IMAGE",
    ),
)

FAMILIES: Mapping[str, FamilyCard] = {card.name: card for card in _CARDS}


def get_family(name: str) -> "Family":
    """Return the family of that name; imports torch.

    Raises:
        UserError: there is none.
    """
    if name not in FAMILIES:
        raise unknown("model family (model.family)", name, [*FAMILIES, "auto"])
    family: Family = _at(FAMILIES[name].target)
    return family


def moved(card: FamilyCard, adapter: str | None) -> FamilyCard:
    """Return the card of the family that ``model.motion_adapter`` makes of one; itself without an adapter.

    Raises:
        UserError: no motion adapter fits models of that family.
    """
    if adapter is None:
        return card
    found = [other for other in FAMILIES.values() if other.moves == card.name]
    if not found:
        fitting = ", ".join(other.moves for other in FAMILIES.values() if other.moves)
        raise UserError(
            f"model.motion_adapter={adapter!r} with a model of {card.name} ({card.title}); allowed: null, or "
            f"a model of {fitting}"
        )
    return found[0]


def known_shapes() -> dict[str, FamilyCard]:
    """Return the cards by the hub ids of networks whose shapes are built in."""
    return {
        hub_id: card
        for card in FAMILIES.values()
        for hub_id in (*card.same_shapes, *(other for other, _ in card.other_shapes))
    }


def built_in(name: str, hub_id: str | None = None) -> Mapping[str, Mapping[str, Any]]:
    """Return the configurations of a family's components, of the base model or of one of another shape."""
    differing = dict(FAMILIES[name].other_shapes).get(hub_id or "")
    return {**get_family(name).configs, **(_at(differing) if differing else {})}


def _at(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)
