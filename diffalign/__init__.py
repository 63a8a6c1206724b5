"""diffalign: preference alignment of diffusion and flow models.

Names are loaded when they are first asked for, so that ``import diffalign`` (and with it the command line's
help) imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffalign import _moved

if TYPE_CHECKING:
    from diffalign.config.schema import Run
    from diffalign.errors import UserError
    from diffalign.runs.align import Result, align
    from diffalign.runs.compare import compare
    from diffalign.runs.validate import read_run

__version__ = "0.1.0"

__all__ = ["Result", "Run", "UserError", "align", "compare", "read_run"]

_HOMES = {
    "Result": ("diffalign.runs.align", "Result"),
    "Run": ("diffalign.config.schema", "Run"),
    "UserError": ("diffalign.errors", "UserError"),
    "align": ("diffalign.runs.align", "align"),
    "compare": ("diffalign.runs.compare", "compare"),
    "read_run": ("diffalign.runs.validate", "read_run"),
}


_moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
