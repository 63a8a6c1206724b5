"""Settings of the launcher (``accelerate launch``): they replace defaults of the run, but no set values."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffalign.config.schema import Run, TrainingConfig
from diffalign.errors import UserError

_SETTINGS = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "accumulation": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
"""Fields of ``training`` by the environment variables that ``accelerate launch`` sets."""

_UNSUPPORTED = ("fp8",)


def with_launcher(run: Run, tell: Callable[[str], None]) -> Run:
    """Return ``run`` with the launcher's settings; ``tell`` gets a line for each one, and for each one that a
    set value of the run overrides.
    """
    default = TrainingConfig()
    changes: dict[str, Any] = {}
    for field, variable in _SETTINGS.items():
        text = os.environ.get(variable, "").strip().lower()
        kind, own = type(getattr(default, field)), getattr(run.training, field)
        if not text or (kind is int and not text.isdecimal()):
            continue
        told = kind(text)
        if told in (own, getattr(default, field)) or told in _UNSUPPORTED:
            continue
        if own == getattr(default, field):
            changes[field] = told
            tell(f"training.{field}={told} from the launcher ({variable})")
        else:
            tell(
                f"warning: the launcher says {field} {told} ({variable}), the run training.{field}={own}: "
                "the run's is used"
            )
    changes |= _sharding(run.training, tell)
    return replace(run, training=replace(run.training, **changes)) if changes else run


def _sharding(training: TrainingConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return what ``accelerate launch --use_fsdp`` asks for, as fields of ``training``.

    Raises:
        UserError: its first version, or copies of groups that are not nodes.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return {}
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the launcher asks for FSDP of version {version} (FSDP_VERSION); allowed: accelerate launch "
            "--fsdp_version 2, or training.shard full without --use_fsdp"
        )
    copies = os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1")
    if copies != "1" and training.shard == "none":
        raise UserError(
            f"the launcher asks for {copies} copies (PARALLELISM_CONFIG_DP_REPLICATE_SIZE); allowed: "
            "training.shard hybrid, a copy on each node"
        )
    found: dict[str, Any] = {}
    if training.shard == "none":
        found["shard"] = "full"
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("0", "false"):
        found["reshard"] = False
    told = ", ".join(f"training.{name}={value}" for name, value in found.items())
    tell(f"{told or f'training.shard={training.shard}'} from the launcher (ACCELERATE_USE_FSDP, version 2)")
    return found
