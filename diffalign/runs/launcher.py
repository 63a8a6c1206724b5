"""Settings of the launcher (``accelerate launch``): they hold where the run's own are at their defaults."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffalign.config.schema import Run, TrainingConfig

_SETTINGS = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "accumulation": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
}
"""Fields of ``training`` by the environment variables that ``accelerate launch`` sets."""

_UNSUPPORTED = ("fp8",)


def with_launcher(run: Run, tell: Callable[[str], None]) -> Run:
    """Return ``run`` with what the launcher was told; ``tell`` gets a line for each setting, and for each one
    of a run that says otherwise and therefore wins.
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
                "the run's own counts"
            )
    return replace(run, training=replace(run.training, **changes)) if changes else run
