"""Which device a command works on, and in which precisions. Importing this module imports no torch."""

import os

from diffalign.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def device_name(name: str) -> str:
    """Return a torch device: ``auto`` is the accelerator if there is one, under torchrun this process's own.

    Raises:
        UserError: it is not there.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = found.type if found is not None else "cpu"
    if name == "auto":
        own = os.environ.get("LOCAL_RANK", "0")
        return best if best == "cpu" or own == "0" else f"{best}:{own}"
    if name.split(":")[0] not in ("cpu", best):
        allowed = ", ".join(dict.fromkeys(["auto", "cpu", best]))
        raise UserError(f"--device {name!r} is not available here; allowed: {allowed}")
    return name
