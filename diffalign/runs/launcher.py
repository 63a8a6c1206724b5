"""Settings of the launcher (``accelerate launch``): they replace defaults of the run, but no set values."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffalign.config.schema import Run, TrainingConfig
from diffalign.errors import UserError
from diffalign.training.acceleration import DYNAMO
from diffalign.utils.devices import check_group

_SETTINGS = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "accumulation": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
"""Fields of ``training`` by the environment variables that ``accelerate launch`` sets."""

_PRECISIONS = ("no", "bf16", "fp16")


def with_launcher(run: Run, tell: Callable[[str], None]) -> Run:
    """Return ``run`` with the launcher's settings; ``tell`` gets a line for each one, and for each one that a
    set value of the run overrides.

    Raises:
        UserError: a setting that runs do not have, or processes that cannot find each other.
    """
    check_group()
    default = TrainingConfig()
    changes: dict[str, Any] = {}
    for field, variable in _SETTINGS.items():
        own, usual = getattr(run.training, field), getattr(default, field)
        value = _launched(field, variable)
        if value is None or value in (own, usual):
            continue
        if own != usual:
            tell(
                f"warning: the launcher says {field} {value} ({variable}), the run training.{field}={own}: "
                "the run's is used"
            )
        elif field == "mixed_precision" and value not in _PRECISIONS:
            raise UserError(
                f"the launcher says {field} {value} ({variable}); allowed: {', '.join(_PRECISIONS)}, or a "
                "training.mixed_precision of the run"
            )
        else:
            changes[field] = value
            tell(f"training.{field}={value} from the launcher ({variable})")
    _check_context()
    changes |= _sharding(run.training, tell)
    run = replace(run, training=replace(run.training, **changes)) if changes else run
    return _compiled(run, tell)


def _launched(field: str, variable: str) -> Any:
    """Return the launcher's value of a field of ``training``; None where it says nothing.

    Raises:
        UserError: no number where one is needed.
    """
    text = os.environ.get(variable, "").strip().lower()
    if not text or field == "mixed_precision":
        return text or None
    if not text.isdecimal():
        raise UserError(f"{variable}={text!r} from the launcher; allowed: a whole number")
    return int(text)


def _compiled(run: Run, tell: Callable[[str], None]) -> Run:
    """Return ``run`` with ``model.compile`` where the launcher asks for it (``--dynamo_backend inductor``).

    Raises:
        UserError: another backend.
    """
    backend = os.environ.get(DYNAMO, "").strip().lower()
    if backend in ("", "no") or (backend == "inductor" and run.model.compile):
        return run
    if backend != "inductor":
        raise UserError(f"the launcher asks for the compiler {backend} ({DYNAMO}); allowed: no, inductor")
    tell(f"model.compile=True from the launcher ({DYNAMO})")
    return replace(run, model=replace(run.model, compile=True))


def _check_context() -> None:
    """Raise a UserError where ``accelerate launch`` asks for context or sequence parallelism of its own."""
    for variable in ("PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_SP_SIZE"):
        if (size := os.environ.get(variable, "1").strip()) not in ("", "1"):
            raise UserError(
                f"the launcher asks for {variable}={size}; allowed: a launch without it, and "
                f"training.context {size}, which shares the tokens of a row by diffusers"
            )


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
    settings = ", ".join(f"training.{name}={value}" for name, value in found.items())
    tell(
        f"{settings or f'training.shard={training.shard}'} from the launcher (ACCELERATE_USE_FSDP, version 2)"
    )
    return found
