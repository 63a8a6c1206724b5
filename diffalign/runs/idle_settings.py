"""What a run says of its settings: those without effect, and lengths that do not fit the run's."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from diffalign.config.fields import options
from diffalign.config.ranges import get
from diffalign.config.schema import Run, TrainingConfig
from diffalign.methods._common import extras_of
from diffalign.strategies.registry import build
from diffalign.types import Method

FAR = 1000.0
"""A beta this many times below the method's default is told."""
OLD = 0.1
"""Share of the initial weights in a moving average from which on it is told."""

_NEEDS: tuple[tuple[str, Callable[[Run], Any], str], ...] = (
    ("rollout.", lambda run: run.rollout.prompts, "rollout.prompts"),
    ("validation.prompts", lambda run: run.validation.every, "validation.every above 0"),
    ("validation.rewards", lambda run: run.validation.every, "validation.every above 0"),
    (
        "optimizer.cycles",
        lambda run: run.optimizer.schedule == "cosine_with_restarts",
        "optimizer.schedule cosine_with_restarts",
    ),
    (
        "optimizer.power",
        lambda run: run.optimizer.schedule == "polynomial",
        "optimizer.schedule polynomial",
    ),
    ("model.lora.", lambda run: run.model.train == "lora", "model.train lora"),
    ("model.text_encoder.lora.", lambda run: run.model.text_encoder.lora.rank, "its rank above 0"),
    ("data.bucket_step", lambda run: run.data.buckets, "data.buckets true"),
    ("data.curriculum.", lambda run: run.data.curriculum.stages, "data.curriculum.stages above 0"),
    ("training.reference_mix", lambda run: run.training.reference_every, "training.reference_every above 0"),
    ("training.reshard", lambda run: run.training.shard != "none", "training.shard full or hybrid"),
)
"""(field or section that ends in a dot, whether it is read, what reads it)."""


def tell_of_settings(run: Run, method: Method[Any], tell: Callable[[str], None]) -> None:
    """Print what settings do not do, before a model is loaded; ``method`` is the run's without strategies."""
    for note in without_effect(run):
        tell(f"note: {note}")
    if scored := unread_rewards(run, method):
        tell(f"note: {scored}")
    tell_of_beta(method, tell)


def unread_rewards(run: Run, method: Method[Any]) -> str | None:
    """Return a sentence where every image is scored and no part of the run reads the scores, else None."""
    data = run.data
    if not data.rewards or data.reads_rewards or "reward" in extras_of(method, *build(run.strategies)):
        return None
    return (
        f"no effect of data.rewards={data.rewards!r}, which score every image: {run.method['type']} does not "
        "read rewards; needed is a method or strategy that does (madpo, smpo, weighted with source reward), "
        "data.rewards_as, data.filters, data.curriculum.by reward or data.best"
    )


def without_effect(run: Run) -> Iterator[str]:
    """Yield a sentence on the settings of each kind that are not at their defaults and that nothing reads."""
    fields = [(name, field, get(run, name)) for name, field, _ in options(Run)]
    changed = [name for name, field, value in fields if value != _default(field)]
    for place, is_read, needed in _NEEDS:
        idle = [name for name in changed if name == place or (place[-1] == "." and name.startswith(place))]
        if idle and not is_read(run):
            shown = ", ".join(f"{name}={get(run, name)!r}" for name in idle)
            yield f"no effect of {shown}: needed is {needed}"


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def tell_of_beta(method: Method[Any], tell: Callable[[str], None]) -> None:
    """Warn of a beta that looks as if it was in the unit of another code, such as 0.1 of language models."""
    own = {field.name: _default(field) for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    usual, beta = own.get("beta"), getattr(method, "beta", None)
    alike = getattr(method, "reduce", None) == own.get("reduce")  # sums have another unit
    if isinstance(usual, float) and isinstance(beta, int | float) and alike and 0 < beta * FAR <= usual:
        tell(
            f"warning: method.beta={beta:g} is far below the default, {usual:g}: errors are means over the "
            "latent elements here, so the loss hardly leaves its start; betas of codes that sum, and of "
            "language models, are in another unit"
        )


def tell_of_length(run: Run, settings: TrainingConfig, tell: Callable[[str], None]) -> None:
    """Warn of a warm-up that does not end, and of a moving average that is longer than the run.

    Args:
        run: the run.
        settings: of its loop, whose ``steps`` are known.
        tell: gets each line.
    """
    steps, warmup, decay = settings.steps, run.optimizer.warmup_steps, settings.ema_decay
    if warmup >= steps:
        tell(
            f"warning: optimizer.warmup_steps={warmup:,} in a run of {steps:,}: the learning rate ends at "
            f"{steps / warmup:.0%} of optimizer.learning_rate"
        )
    if decay and decay**steps > OLD:
        fit = 1 - 10 / steps if steps > 20 else 0.5
        tell(
            f"warning: training.ema_decay={decay:g} in a run of {steps:,} steps: {decay**steps:.0%} of the "
            f"average, which is what is saved and validated, are the weights before training; such as "
            f"{fit:.4g} follows"
        )
