"""Check the values of a run: ranges of fields, and the consistency of ``data``. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from diffalign.config.fields import Rule, options
from diffalign.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio")

_ANY: Rule = (lambda value: True), "finite numbers, whole ones below 2^63"
_EXAMPLES = {
    "model.path": "a hub id, a diffusers folder, a .safetensors file, or tiny:sdxl",
    "data.path": "a parquet file, a folder, a .jsonl file, a hub dataset, or tiny:pairs",
}


def check_ranges(run: Any, needs: Sequence[str] = ()) -> None:
    """Check a tree of dataclasses against the rules of its fields, and the consistency of ``data``.

    Args:
        run: the tree.
        needs: dotted names of fields that must not be empty, such as ``data.path``.

    Raises:
        UserError: a value is not allowed; it names the first one and the allowed values.
    """
    for dotted in needs:
        if not get(run, dotted):
            example = _EXAMPLES.get(dotted, "required")
            raise UserError(f"{dotted} is not set; give it in the config or as --{dotted} ({example})")
    for dotted, field, _ in options(type(run)):
        value, (allowed, words) = get(run, dotted), field.metadata.get("rule") or _ANY
        if value is not None and not (_finite(value) and allowed(value)):
            raise UserError(f"{dotted}={_shown(value)}; allowed: {words}")
    _check_data(run)


def get(run: Any, dotted: str) -> Any:
    """Return the value at a dotted name: ``get(run, "model.lora.rank")``."""
    return reduce(getattr, dotted.split("."), run)


def _check_data(run: Any) -> None:
    if run.data.buckets and run.data.resolution < run.data.bucket_step:
        raise UserError(
            f"data.bucket_step={run.data.bucket_step}; allowed: at most data.resolution={run.data.resolution}"
        )
    if run.data.streaming and run.data.format not in ("auto", "hub"):
        raise UserError(f"data.streaming is for hub datasets, but data.format={run.data.format!r}")


def _finite(value: Any) -> bool:
    """Return whether every number in a value is finite, and every integer fits into 64 bits."""
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_finite, value))
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
