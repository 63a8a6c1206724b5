"""Models of two experts, one network above a noise level and one below it (Wan 2.2 A14B).

One expert is trained at a time, at its own times. A LoRA of such a model is a folder with a LoRA's folder for
each expert that it changes, ``high_noise/`` and ``low_noise/``: both files name their modules
``transformer.*``, since diffusers takes the expert as an argument (``load_into_transformer_2``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.config.schema import ModelConfig
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.spans import ALL
from diffalign.errors import UserError
from diffalign.models.sources import EXPERT_FOLDERS, LORA_FILES
from diffalign.types import Path as NoisingPath

FIRST, SECOND = "transformer", "transformer_2"
EXPERTS: Mapping[str, str] = {"high": FIRST, "low": SECOND}
"""The pipeline's components by ``model.expert``."""

FOLDERS: Mapping[str, str] = dict(zip((FIRST, SECOND), EXPERT_FOLDERS, strict=True))
"""The folders of a LoRA by component."""

INTO: Mapping[str, Mapping[str, Any]] = {FIRST: {}, SECOND: {"load_into_transformer_2": True}}
"""Further arguments of diffusers' ``load_lora_weights`` by component."""


def spanned(noising: NoisingPath, pipeline: Any, component: str) -> NoisingPath:
    """Return the path with the times at which a pipeline asks a component: of two experts from its boundary
    on, or up to it.
    """
    boundary = pipeline.config.get("boundary_ratio")
    if boundary is None or not isinstance(noising, RectifiedFlow):
        return noising
    return replace(noising, span=(boundary, ALL[1]) if component == FIRST else (ALL[0], boundary))


def lora_folders(path: str | Path) -> dict[str, Path]:
    """Return the folders of a LoRA of experts by component; empty for anything else."""
    return {
        component: Path(path, folder)
        for component, folder in FOLDERS.items()
        if any(Path(path, folder, name).is_file() for name in LORA_FILES)
    }


def changing(adapters: Sequence[str], expert: str | None) -> tuple[str, ...]:
    """Return those of ``model.adapter`` that change the trained network: not a LoRA of the other expert."""
    found = []
    for spec in adapters:
        path = Path(spec).expanduser()
        parts = lora_folders(path) or lora_folders(path / "aligned")
        if not parts or EXPERTS[expert or "high"] in parts:
            found.append(spec)
    return tuple(found)


def check_expert(config: ModelConfig, index: Mapping[str, Any] | None, trained: bool) -> bool:
    """Check ``model.expert`` against a model, and return whether it is two experts.

    Args:
        index: of the pipeline; None: a single file.
        trained: whether the model is loaded to be trained.

    Raises:
        UserError: an expert of a model of one network; none of a split model that will be trained.
    """
    split = all(((index or {}).get(name) or [None])[0] is not None for name in (FIRST, SECOND))
    if config.expert is not None and not split:
        raise UserError(
            f"model.expert={config.expert!r}, but {config.path!r} has one network for all times; allowed: "
            "null"
        )
    if split and trained and config.expert is None:
        raise UserError(
            f"model.expert is null, and {config.path!r} is two experts, of which one is trained at a time; "
            "allowed: high, then low in a run that starts from the first (model.path: its folder), or one "
            "of them"
        )
    return split
