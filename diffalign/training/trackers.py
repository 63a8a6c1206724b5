"""Trackers (dashboards) by name: tensorboard, wandb, trackio; for scalars, images and videos by step."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from diffalign.errors import UserError, unknown
from diffalign.media.files import still
from diffalign.media.videos import VIDEO_SUFFIXES


@runtime_checkable
class Tracker(Protocol):
    """A dashboard of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show scalars of one optimizer step."""
        ...

    def log_media(self, step: int, files: Mapping[str, Path]) -> None:
        """Show images and videos of one optimizer step, by name; a name is one series over the steps."""
        ...

    def close(self) -> None:
        """Write pending values and close."""
        ...


class TensorBoard:
    """Event files in ``<folder>/tensorboard``; values after the step from which a run starts are hidden."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        # a first start that was killed before its checkpoint has left values too
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_media(self, step: int, files: Mapping[str, Path]) -> None:
        """Add each image, and the middle frame of each video (videos would need another package)."""
        import numpy as np

        for name, file in files.items():
            self._writer.add_image(name, np.asarray(still(file)), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run, named after the run's folder; a resumed run continues the same one."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], start_step: int):
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        name = folder.resolve().name
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(folder),
            config=dict(config),
            id=_run_id(folder, start_step),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log(dict(values), step=step)

    def log_media(self, step: int, files: Mapping[str, Path]) -> None:
        """Log the files as wandb's images and videos."""
        import wandb

        self._run.log({name: _wrapped(wandb, file) for name, file in files.items()}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Trackio:
    """A trackio run, named after the run's folder and its id; a resumed run continues the same one."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], start_step: int):
        try:
            import trackio
        except ImportError:
            raise _missing("trackio") from None
        name = f"{folder.resolve().name}-{_run_id(folder, start_step)}"
        self._run = trackio.init(project=project, name=name, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log(dict(values), step=step)

    def log_media(self, step: int, files: Mapping[str, Path]) -> None:
        """Log the files as trackio's images and videos."""
        import trackio

        self._run.log({name: _wrapped(trackio, file) for name, file in files.items()}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def open_trackers(
    names: Sequence[str], folder: Path, project: str, config: Mapping[str, Any], start_step: int = 0
) -> list[Tracker]:
    """Return the named trackers of one run.

    Raises:
        UserError: an unknown name, or one whose package is not installed.
    """
    check_trackers(names)
    return [TRACKERS[name](Path(folder), project, config, start_step) for name in names]


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a name that is not a tracker."""
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker (logging.trackers)", name, TRACKERS)


def _wrapped(package: Any, file: Path) -> Any:
    """Return a file as the dashboard's image or video object."""
    return (package.Video if file.suffix.lower() in VIDEO_SUFFIXES else package.Image)(str(file))


def _missing(package: str) -> UserError:
    return UserError(f"logging.trackers names {package}, which is not installed: pip install {package}")


def _run_id(folder: Path, start_step: int) -> str:
    """Return the run's id on a dashboard, which is stored in its folder; a fresh run gets a new one."""
    path = folder / "tracker_id"
    if start_step == 0 or not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
