"""What values a run may have beyond their types: ranges, names, and fields that need each other. No torch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any

from diffalign.errors import UserError

Rule = tuple[Callable[[Any], bool], str]

TRACKERS = ("tensorboard", "wandb", "trackio")


def _at_least(low: float) -> Rule:
    return (lambda v: v >= low), f"{low} or more"


def _multiple(step: int) -> Rule:
    return (lambda v: v > 0 and v % step == 0), f"a positive multiple of {step}"


_POSITIVE: Rule = (lambda v: v > 0), "more than 0"
_SHARE: Rule = (lambda v: 0 <= v <= 1), "0 to 1"
_BELOW_ONE: Rule = (lambda v: 0 <= v < 1), "0 or more and less than 1"
_NAMED: Rule = (lambda v: bool(v) and all(v)), "at least one name"

RULES: Mapping[str, Rule] = {
    "output": ((lambda v: bool(v.strip())), "a folder name"),
    "model.lora.rank": _at_least(1),
    "model.lora.alpha": _POSITIVE,
    "model.lora.dropout": _BELOW_ONE,
    "model.lora.targets": _NAMED,
    "data.limit": _at_least(1),
    "data.likes_share": _SHARE,
    "data.best": _at_least(1),
    "data.altered.timeout": _POSITIVE,
    "data.altered.retries": _at_least(0),
    "data.rewards": ((lambda v: all(v)), "names of rewards"),
    "data.curriculum.stages": ((lambda v: v >= 0), "1 or more, or 0 for none"),
    "data.curriculum.steps": _at_least(1),
    "data.curriculum.min_gap": _at_least(0),
    "data.resolution": _multiple(8),
    "data.height": _multiple(8),
    "data.width": _multiple(8),
    "data.frames": _at_least(1),
    "data.fps": _POSITIVE,
    "data.segment_seconds": _POSITIVE,
    "data.bucket_step": _multiple(8),
    "data.prompt_dropout": _SHARE,
    "data.flip_labels": _SHARE,
    "data.holdout": _BELOW_ONE,
    "data.max_holdout": _at_least(0),
    "data.cache_batch_size": _at_least(1),
    "data.workers": _at_least(0),
    "rollout.prompts_per_round": _at_least(1),
    "rollout.samples": _at_least(1),
    "rollout.steps": _at_least(1),
    "rollout.eta": _at_least(0),
    "rollout.window": _at_least(1),
    "rollout.window_shift": _at_least(0),
    "rollout.window_stride": _at_least(1),
    "rollout.guidance": _at_least(0),
    "rollout.batch_size": _at_least(1),
    "rollout.resolution": _multiple(8),
    "rollout.trained_steps": ((lambda v: 0 < v <= 1), "more than 0, up to 1"),
    "rollout.lowest_time": _BELOW_ONE,
    "rollout.passes": _at_least(1),
    "rollout.part": _at_least(1),
    "rollout.first_branch": _at_least(0),
    "rollout.inner_steps": _at_least(0),
    "rollout.threshold": _BELOW_ONE,
    "rollout.keep": _at_least(1),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.betas": (
        (lambda v: all(0 <= b < 1 for b in v)),
        "two numbers, each 0 or more and less than 1",
    ),
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _at_least(0),
    "optimizer.warmup_steps": _at_least(0),
    "training.steps": _at_least(1),
    "training.batch_size": _at_least(1),
    "training.accumulation": _at_least(1),
    "training.max_grad_norm": ((lambda v: v >= 0), "0 (no clipping) or more"),
    "training.spike_factor": ((lambda v: v == 0 or v > 1), "0 (never skip) or more than 1"),
    "training.ema_decay": _BELOW_ONE,
    "training.reference_every": _at_least(0),
    "training.reference_mix": ((lambda v: 0 < v <= 1), "more than 0, up to 1"),
    "training.seed": ((lambda v: 0 <= v < 2**63), "0 to 2^63 - 1"),
    "logging.every": _at_least(1),
    "logging.diagnostics_every": _at_least(0),
    "logging.diagnostics_bins": _at_least(1),
    "checkpoint.every": _at_least(1),
    "checkpoint.limit": ((lambda v: v >= 0), "1 or more, or 0 to keep all"),
    "validation.every": _at_least(0),
    "validation.images_per_prompt": _at_least(1),
    "validation.sampling_steps": _at_least(1),
    "validation.guidance": _at_least(0),
    "validation.frames": _at_least(1),
    "validation.fps": _POSITIVE,
    "validation.seed": _at_least(0),
}


def check_shared(run: Any, needs: Sequence[str] = (), rules: Mapping[str, Rule] = RULES) -> None:
    """What is asked of ``model``, ``data`` and the sections about training, in whatever tree has them.

    Args:
        run: a tree of dataclasses.
        needs: as ``validate``.
        rules: by dotted place; those of sections that the tree has not are passed over.

    Raises:
        UserError: as ``validate``.
    """
    sections = {field.name for field in fields(run)}
    for dotted in needs:
        if not get(run, dotted):
            what = _WHAT.get(dotted, "required")
            raise UserError(f"{dotted} is not set; give it in the config or as --{dotted} ({what})")
    for dotted, (allowed, words) in rules.items():
        if dotted.partition(".")[0] not in sections:
            continue
        value = get(run, dotted)
        if value is not None and not (_finite(value) and allowed(value)):
            raise UserError(f"{dotted}={value!r}; allowed: {words}")
    _check_data(run)


def get(run: Any, dotted: str) -> Any:
    """The value at a dotted place: ``get(run, "model.lora.rank")``."""
    return reduce(getattr, dotted.split("."), run)


def _check_data(run: Any) -> None:
    if run.data.buckets and run.data.resolution < run.data.bucket_step:
        raise UserError(
            f"data.bucket_step={run.data.bucket_step}; allowed: at most data.resolution={run.data.resolution}"
        )
    if run.data.streaming and run.data.format not in ("auto", "hub"):
        raise UserError(f"data.streaming is for hub datasets, but data.format={run.data.format!r}")


def _finite(value: Any) -> bool:
    return all(math.isfinite(v) for v in _numbers(value))


def _numbers(value: Any) -> Iterator[float]:
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float):
            yield item


_WHAT = {
    "model.path": "a hub id, a diffusers folder, a .safetensors file, or tiny:sdxl",
    "data.path": "a parquet file, a folder, a .jsonl file, a hub dataset, or tiny:pairs",
}
