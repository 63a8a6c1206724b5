"""A Stable Diffusion 1.x and a motion adapter put together: AnimateDiff."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.models.sources import HUB_ID, user_errors
from diffalign.utils.text import read_json_object


def load_motion(path: str, dtype: torch.dtype) -> Any:
    """Return the motion adapter of ``model.motion_adapter``: a hub id or a folder.

    Raises:
        UserError: not there, or not a motion adapter.
    """
    from diffusers import MotionAdapter

    folder = Path(path).expanduser()
    if folder.exists():
        _adapter_config(path)
    elif not HUB_ID.fullmatch(path):
        raise UserError(f"model.motion_adapter={path!r}: no such folder; allowed: a hub id, or a folder")
    with user_errors("model.motion_adapter", path):
        return MotionAdapter.from_pretrained(str(folder) if folder.exists() else path, dtype=dtype)


def set_in_motion(pipeline: Any) -> None:
    """Give an AnimateDiff pipeline that was just put together the schedule that motion adapters are trained
    on: linear between the ends of Stable Diffusion's (AnimateDiff's inference configuration).
    """
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, beta_schedule="linear", clip_sample=False, steps_offset=1
    )


def drop_adapter(pipeline: Any) -> None:
    """Let an AnimateDiff pipeline's adapter go: the network holds its weights, and they are trained and saved
    only there.
    """
    if pipeline.components.get("motion_adapter") is not None:
        pipeline.register_modules(motion_adapter=None)


def motion_config(unet_config: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """Return the configuration of the network of a UNet and a motion adapter, without weights.

    An adapter that is no folder here is taken to have the usual shapes, of animatediff-motion-adapter-v1-5-2.

    Raises:
        UserError: a folder that holds no adapter, or one that does not fit the UNet.
    """
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    known = _adapter_config(adapter) if Path(adapter).expanduser().exists() else {}
    with torch.device("meta"), user_errors("model.motion_adapter", adapter):
        unet, motion = UNet2DConditionModel.from_config(dict(unet_config)), MotionAdapter.from_config(known)
        return dict(UNetMotionModel.from_unet2d(unet, motion, load_weights=False).config)


def _adapter_config(path: str) -> dict[str, Any]:
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        raise UserError(
            f"model.motion_adapter={path!r}: no config.json in it; allowed: a hub id, or a folder"
        )
    config = read_json_object(file)
    if config.get("_class_name") != "MotionAdapter":
        raise UserError(
            f"model.motion_adapter={path!r} is a {config.get('_class_name')}, not a MotionAdapter"
        )
    return config
