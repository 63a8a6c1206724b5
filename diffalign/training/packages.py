"""Packages that trackers and optimizers need: looked for before anything long begins, imported when used."""

from collections.abc import Sequence
from importlib.util import find_spec

from diffalign.errors import UserError

OF_OPTIMIZERS = {"adamw8bit": "bitsandbytes"}
OF_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def missing(setting: str, package: str) -> UserError:
    """Return the error that names the setting and the package that it needs."""
    return UserError(f"{setting} needs {package}, which is not installed: pip install {package}")


def check_packages(trackers: Sequence[str], optimizer: str) -> None:
    """Check that the packages of the named trackers and of the optimizer are there.

    Raises:
        UserError: the first one that is not installed, with the setting that needs it.
    """
    needed = [(f"logging.trackers={name}", OF_TRACKERS.get(name)) for name in trackers]
    needed.append((f"optimizer.type={optimizer}", OF_OPTIMIZERS.get(optimizer)))
    for setting, package in needed:
        if package is not None and find_spec(package) is None:
            raise missing(setting, package)
