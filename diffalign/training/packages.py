"""Packages that trackers, optimizers and quantised weights need; they are checked before a run starts."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType

from diffalign.errors import UserError

OF_OPTIMIZERS = dict.fromkeys(("adamw8bit", "paged_adamw", "paged_adamw8bit"), "bitsandbytes")
OF_QUANTIZED = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao_int8": "torchao",
    "torchao_float8": "torchao",
}
OF_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def missing(setting: str, package: str) -> UserError:
    """Return the error that names the setting and the package that it needs."""
    return UserError(f"{setting} needs {package}, which is not installed: pip install {package}")


def check_packages(
    trackers: Sequence[str], optimizer: str, quantized: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Check that the packages of trackers, optimizer and quantised weights are installed.

    Args:
        trackers: names of the trackers.
        optimizer: type of the optimizer.
        quantized: kind of quantisation by the name of its setting.

    Raises:
        UserError: a package is not installed; the message has the setting that needs it.
    """
    needed = [(f"logging.trackers={name}", OF_TRACKERS.get(name)) for name in trackers]
    needed.append((f"optimizer.type={optimizer}", OF_OPTIMIZERS.get(optimizer)))
    needed += [(f"{setting}={kind}", OF_QUANTIZED.get(kind)) for setting, kind in quantized.items()]
    for setting, package in needed:
        if package is not None and find_spec(package) is None:
            raise missing(setting, package)
