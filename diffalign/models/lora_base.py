"""What a LoRA's file says of the base model that it was trained on, and notes where that is another one.

A LoRA of the same architecture fits any base, so that neither a shape nor a name shows a wrong one.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffalign.diffusion.paths import EDM
from diffalign.models.families.registry import FAMILIES
from diffalign.models.loaded import LoadedModel

_CACHED = re.compile(r"models--[^/]*--([^/]+)/snapshots/[^/]+/?$")  # a model in the hub's cache
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_WEIGHTS = (".safetensors", ".ckpt", ".pt")
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def base_metadata(model: LoadedModel, title: str) -> dict[str, str]:
    """Return what a LoRA's header says of its base: ModelSpec, and kohya's names of the model.

    Of a local model the name alone is recorded, as kohya's scripts do: files are published.
    Sources: Stability-AI/ModelSpec 1.0; kohya-ss/sd-scripts train_network.py.
    """
    files = FAMILIES[model.family.name].files
    version = {"ss_base_model_version": files.version} if files.version else {}
    local = os.path.exists(os.path.expanduser(model.source))
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{files.architecture or model.family.name}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "ss_sd_model_name": _last_part(model.source) if local else model.source,
        **version,
        **prediction_metadata(model),
    }


def prediction_metadata(model: LoadedModel) -> dict[str, str]:
    """Return ModelSpec's prediction type of a model; flow models have none."""
    kind = model.pipeline.scheduler.config.get("prediction_type")
    if isinstance(model.path, EDM) or kind not in ("epsilon", "v_prediction"):  # it has no value for EDM
        return {}
    return {"modelspec.prediction_type": "v" if kind == "v_prediction" else "epsilon"}


def of_another_base(
    metadata: Mapping[str, str], config: Mapping[str, Any] | None, model: LoadedModel
) -> Iterator[str]:
    """Yield what a LoRA's file records of its base that the model is not, such as ``NAME is VALUE``.

    Args:
        metadata: of the file's header: kohya's ``ss_*`` and ModelSpec.
        config: peft's ``adapter_config.json``, where it came with one.
        model: the model that it is put on.
    """
    begins = FAMILIES[model.family.name].files.begins
    for name in ("ss_base_model_version", "modelspec.architecture"):
        value = metadata.get(name)
        if value and begins and not re.sub(r"[^a-z0-9]", "", value.lower()).startswith(begins):
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


def _last(place: str) -> str:
    """Return the last part of a hub id or path, which a copy in another folder has too."""
    name = _last_part(place).casefold()
    return next((name.removesuffix(end) for end in _WEIGHTS if name.endswith(end)), name)


def _last_part(place: str) -> str:
    place = place.replace("\\", "/").rstrip("/")
    cached = _CACHED.search(place)
    return cached.group(1) if cached else place.rpartition("/")[2]
