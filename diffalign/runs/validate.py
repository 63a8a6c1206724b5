"""Check a whole run: ranges, names of components, and fields that need each other. No torch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.config.files import find_config, read_yaml
from diffalign.config.io import apply_overrides, from_dict
from diffalign.config.ranges import TRACKERS, check_ranges, get
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
    validation_prompts(run)  # reports a missing file before anything is loaded


def _check_method(run: Run) -> None:
    # Imported here because the registries list packages: names only, still no torch.
    from diffalign.methods.registry import REGISTRY, check_name
    from diffalign.rewards.specs import all_weighted
    from diffalign.strategies.registry import check

    if not isinstance(run.method.get("type"), str):
        raise UserError(
            f"method.type={run.method.get('type')!r}; allowed: one of {', '.join(sorted(REGISTRY))}"
        )
    check_name(run.method["type"])
    check(run.strategies)
    if run.rollout.rewards:
        all_weighted(run.rollout.rewards)


def check_names(run: Any) -> None:
    """Check the names of a run's components: model family, rewards of the data, trackers.

    Raises:
        UserError: an unknown name, with the nearest ones.
    """
    from diffalign.models.families.registry import FAMILIES
    from diffalign.rewards.registry import parse

    if run.model.family != "auto" and run.model.family not in FAMILIES:
        raise unknown("model family (model.family)", run.model.family, ["auto", *FAMILIES])
    for dotted in ("model.path", "data.path", "output", "resume"):
        refuse_remote(get(run, dotted), dotted)
    for spec in run.data.rewards:
        parse(spec)
    for name in run.logging.trackers:
        if name not in TRACKERS:
            raise unknown("tracker (logging.trackers)", name, TRACKERS)


def refuse_remote(value: str | None, dotted: str) -> None:
    """Refuse an address of a remote store where a file, a folder or a hub id is needed.

    Raises:
        UserError: it is such an address; says what to do instead.
    """
    scheme, found, rest = (value or "").partition("://")
    if not found:
        return
    if scheme == "hf":
        kind, _, name = rest.partition("/") if rest.startswith(("datasets/", "spaces/")) else ("", "", rest)
        repository = "/".join(name.split("/")[:2])
        of = " --repo-type dataset" if kind == "datasets" else ""
        advice = (
            f"give a repository as {repository}, or fetch its files first: "
            f"hf download{of} {repository} --local-dir FOLDER"
        )
    elif scheme == "s3":
        advice = f"copy it first: aws s3 cp --recursive {value} FOLDER, or mount the bucket"
    elif scheme in ("gs", "gcs"):
        advice = f"copy it first: gcloud storage cp --recursive {value} FOLDER, or mount the bucket"
    else:
        advice = "download it first and give the file or folder"
    raise UserError(f"{dotted}={value!r}: addresses with {scheme}:// are not read; {advice}")


def validation_prompts(run: Run) -> list[str]:
    """Return the prompts of the validation; a single one that names a file of prompts stands for its prompts.

    Raises:
        UserError: the file does not exist, or is no file of prompts.
    """
    prompts = run.validation.prompts
    if len(prompts) != 1 or not (prompts[0].startswith("tiny:") or _PROMPT_FILE.search(prompts[0])):
        return list(prompts)
    from diffalign.data.prompts.prompt_sets import read_prompts

    return read_prompts(prompts[0])


_PROMPT_FILE = re.compile(r"^\S+\.(txt|jsonl|json|tsv|csv|parquet)$")


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
