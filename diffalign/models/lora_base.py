"""What a LoRA's file says of the base model that it was trained on, and notes where that is another one.

A LoRA of the same architecture fits any base, so that neither a shape nor a name shows a wrong one.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffalign.models.loaded import LoadedModel

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_WEIGHTS = (".safetensors", ".ckpt", ".pt")
_FAMILIES = {
    "sd15": ("sd_v1", "stable-diffusion-v1"),
    "sdxl": ("sdxl", "stable-diffusion-xl"),
    "flux": ("flux1", "flux-1"),
}
"""Beginnings of ``ss_base_model_version`` (kohya-ss/sd-scripts) and ``modelspec.architecture`` by family."""
_SECOND = ("sd_v2", "stable-diffusion-v2")
_SECOND_WIDTH = 1024
"""Stable Diffusion 2: the class of 1.5 with wider text states."""
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def of_another_base(
    metadata: Mapping[str, str], config: Mapping[str, Any] | None, model: LoadedModel
) -> Iterator[str]:
    """Yield what a LoRA's file records of its base that the model is not, such as ``NAME is VALUE``.

    Args:
        metadata: of the file's header: kohya's ``ss_*`` and ModelSpec.
        config: peft's ``adapter_config.json``, where it came with one.
        model: the model that it is put on.
    """
    version, architecture = _begins(model)
    named = {
        "ss_base_model_version": (metadata.get("ss_base_model_version"), version),
        "modelspec.architecture": (metadata.get("modelspec.architecture"), architecture),
    }
    for name, (value, start) in named.items():
        if value and start and not value.lower().startswith(start):
            yield f"{name} is {value}"
    recorded = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower())
    own = model.pipeline.scheduler.config.get("prediction_type")
    if recorded and own in _PREDICTIONS.values() and recorded != own:
        yield f"modelspec.prediction_type is {metadata['modelspec.prediction_type']}"
    # kohya's scripts, which sign their files, keep a file's name alone, and people rename those
    whole = {} if "sshs_model_hash" in metadata else metadata
    trained = str((config or {}).get("base_model_name_or_path") or "")
    places = {
        "ss_sd_model_name": whole.get("ss_sd_model_name"),
        "base_model_name_or_path": trained if _HUB_ID.fullmatch(trained) else None,
    }
    for name, place in places.items():
        if place and _last(str(place)) != _last(model.source):
            yield f"{name} is {place}"


def _begins(model: LoadedModel) -> tuple[str, str]:
    width = getattr(model.network, "config", {}).get("cross_attention_dim")
    if model.family.name == "sd15" and width == _SECOND_WIDTH:
        return _SECOND
    return _FAMILIES.get(model.family.name, ("", ""))


def _last(place: str) -> str:
    """Return the last part of a hub id or path, which a copy in another folder has too."""
    name = place.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()
    return next((name.removesuffix(end) for end in _WEIGHTS if name.endswith(end)), name)
