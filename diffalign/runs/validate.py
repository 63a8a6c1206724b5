"""Check a whole run: ranges, names of components, and fields that need each other. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.config.files import find_config, read_yaml
from diffalign.config.io import apply_overrides, from_dict
from diffalign.config.ranges import TRACKERS, check_ranges
from diffalign.config.schema import Run
from diffalign.errors import UserError, unknown


def validate(run: Run, needs: Sequence[str] = ()) -> None:
    """Check every value of a run; None passes where a field may be None.

    Args:
        needs: dotted fields that must not be empty, such as ``data.path``.

    Raises:
        UserError: the first value that is not allowed, with its dotted place and what is.
    """
    check_names(run)
    check_ranges(run, [name for name in needs if name != "data.path" or not run.rollout.prompts])
    _check_method(run)
    if run.validation.every and not run.validation.prompts:
        raise UserError(
            f"validation.every={run.validation.every} draws images, but validation.prompts is empty"
        )


def _check_method(run: Run) -> None:
    # Imported here because the registries list packages: names only, still no torch.
    from diffalign.methods import REGISTRY
    from diffalign.rewards.specs import all_weighted
    from diffalign.strategies.registry import check

    if not isinstance(run.method.get("type"), str):
        raise UserError(
            f"method.type={run.method.get('type')!r}; allowed: one of {', '.join(sorted(REGISTRY))}"
        )
    if run.method["type"] not in set(REGISTRY):
        raise unknown("method (method.type)", run.method["type"], REGISTRY)
    check(run.strategies)
    if run.rollout.rewards:
        all_weighted(run.rollout.rewards)


def check_names(run: Any) -> None:
    """Check the names of a run's components: model family, rewards of the data, trackers.

    Raises:
        UserError: a name that there is not, with the nearest ones.
    """
    from diffalign.models.families.registry import FAMILIES
    from diffalign.rewards.registry import parse

    if run.model.family != "auto" and run.model.family not in FAMILIES:
        raise unknown("model family (model.family)", run.model.family, ["auto", *FAMILIES])
    for spec in run.data.rewards:
        parse(spec)
    for name in run.logging.trackers:
        if name not in TRACKERS:
            raise unknown("tracker (logging.trackers)", name, TRACKERS)


def read_run(path: str | Path, overrides: Sequence[str] = (), needs: Sequence[str] = ()) -> Run:
    """Return a validated run from a YAML file (or the name of a shipped recipe) and dotted flags, which win.

    Args:
        path: file, or name of a recipe such as ``tiny_sdxl_dpo``.
        overrides: ``["--model.lora.rank", "32", "--training.steps=10"]``.
        needs: dotted fields that must not be empty, such as ``data.path``.

    Raises:
        UserError: no such file, bad YAML, an unknown key, or a value that is not allowed.
    """
    file = find_config(path)
    run = apply_overrides(from_dict(read_yaml(file), str(path)), overrides)
    validate(run, needs)
    return run
