"""The card of a family. No torch."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ProgramFiles:
    """What files of other programs (A1111, Forge, ComfyUI, kohya's scripts) call a family and its modules.

    Attributes:
        architecture: ``modelspec.architecture`` of its models (Stability-AI/ModelSpec 1.0); "": the family's
            name.
        version: ``ss_base_model_version`` of its models, by kohya-ss/sd-scripts; "": there is none.
        begins: beginnings of both as several trainers write them, letters and digits alone ("sd_1.5" is
            "sd15"); (): a LoRA's names are not compared with the model.
        layout: of its LoRAs for other programs than diffusers; "": there is none.
        original_names: whether that layout names modules as the original code does, not as diffusers does.
        implementation: ``modelspec.implementation`` of its single files, whose layout is that code's; "":
            single files are not written.
    """

    architecture: str = ""
    version: str = ""
    begins: tuple[str, ...] = ()
    layout: Literal["", "kohya", "comfyui"] = ""
    original_names: bool = False
    implementation: str = ""


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
        predictions: what its single files may predict where they do not say, a clause; "": one thing alone.
        stored_as: pipeline classes of other families whose folders hold this one's weights too;
            ``model.family`` must name it to read those.
        source: whether a source image besides the prompt is ``taken`` or ``needed``; "": it is refused.
        joined_branches: whether its pipeline calls the network once for both branches of guidance, the rows
            of the negative one first.
        files: what other programs' files call it.
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
    recognised_by: tuple[tuple[str, str, Any], ...] = ()
    predictions: str = ""
    stored_as: tuple[str, ...] = ()
    source: Literal["", "taken", "needed"] = ""
    joined_branches: bool = False
    files: ProgramFiles = ProgramFiles()
