"""The run directory between two starts: what a killed start has left, and an earlier run that is replaced."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from diffalign.config.io import to_yaml
from diffalign.config.reward_schema import AnyRun
from diffalign.errors import UserError
from diffalign.runs.resume import files_of, portable
from diffalign.training.acceleration import Accelerator
from diffalign.training.checkpoint import Checkpoints, Snapshot
from diffalign.utils.files import write_atomic

_WRITTEN = (
    "aligned", "reward", "checkpoints", "samples", "tensorboard",
    "metrics.jsonl", "summary.json", "validation.json", "tracker_id",
)  # fmt: skip
"""What a run writes beside its configuration, its cache, and its rounds, which ``runs.rollouts`` replaces."""

_SHARED = ("checkpoints", "samples")
"""Those of which a run writes folders ``step-N`` alone."""

_TEMPORARY = (
    *(f".{name}.*.tmp" for name in (*_WRITTEN, "config.yaml")),
    "checkpoints/.step-*.partial",
    "samples/*/.*.tmp",
    "rollouts/*/.part-*.tmp",
)
"""Names under which a run writes what it renames when it is complete."""


def begin(
    run: AnyRun, checkpoints: Checkpoints, accelerator: Accelerator, tell: Callable[[str], None]
) -> Snapshot | None:
    """Remove leftovers, and return the checkpoint that the run goes on from; None: a new run.

    Raises:
        UserError: as ``Checkpoints.start``; or the run reads what it replaces.
    """
    replaced = run.overwrite and run.resume is None
    for name, place in files_of(run).items() if replaced else ():
        if any(Path(place).resolve().is_relative_to((Path(run.output) / one).resolve()) for one in _WRITTEN):
            raise UserError(
                f"{name}={place!r} is of the run in {run.output!r}, which --overwrite true replaces; "
                "allowed: a copy of it elsewhere, or another --output"
            )
    if accelerator.is_main_process:
        remove_leftovers(Path(run.output), tell)
    accelerator.wait_for_everyone()
    snapshot = checkpoints.start(run.resume, run.overwrite)
    if run.resume is not None and snapshot is None:
        tell(f"resume=latest: {checkpoints.folder} has no checkpoint yet, so a new run starts")
    return snapshot


def record(run: AnyRun, accelerator: Accelerator) -> None:
    """Write ``config.yaml``, after removing the run that this one replaces; called once all that it needs is
    there.
    """
    if accelerator.is_main_process:
        if run.overwrite and run.resume is None:
            remove_earlier(Path(run.output))
        write_atomic(Path(run.output) / "config.yaml", to_yaml(portable(run)))
    accelerator.wait_for_everyone()


def remove_leftovers(output: Path, tell: Callable[[str], None]) -> None:
    """Remove what a killed start was writing, and say so; the caller holds the lock of ``output``.

    A folder that was moved aside, and not replaced yet, is moved back.
    """
    for aside in output.glob(".*.old.*.tmp"):
        for held in aside.iterdir():
            if held.name in _WRITTEN and not (output / held.name).exists():
                os.replace(held, output / held.name)
    left = sorted({path for pattern in _TEMPORARY for path in output.glob(pattern)})
    for path in left:
        _remove(path)
    if left:
        names = ", ".join(path.relative_to(output).as_posix() for path in left)
        tell(f"removed what an earlier start, which was killed, had not finished writing: {names}")


def remove_earlier(output: Path) -> None:
    """Remove what an earlier run has written, which a new one replaces.

    Other files in ``checkpoints`` and ``samples`` stay: a run may write into a folder that has such folders.
    """
    for name in _WRITTEN:
        if name not in _SHARED:
            _remove(output / name)
            continue
        for step in (output / name).glob("step-*"):
            _remove(step)
        if (output / name).is_dir() and not any((output / name).iterdir()):
            (output / name).rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
