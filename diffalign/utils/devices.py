"""The device and the dtypes of commands. Importing this module does not import torch."""

import os

from diffalign.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def device_name(name: str) -> str:
    """Resolve ``--device``: ``auto`` is the accelerator if there is one (under torchrun the process's own).

    Raises:
        UserError: the device is not available.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = accelerator.type if accelerator is not None else "cpu"
    if name == "auto":
        local_rank = os.environ.get("LOCAL_RANK", "0")
        return best if best == "cpu" or local_rank == "0" else f"{best}:{local_rank}"
    if name.split(":")[0] not in ("cpu", best):
        allowed = ", ".join(dict.fromkeys(["auto", "cpu", best]))
        raise UserError(f"--device {name!r} is not available here; allowed: {allowed}")
    return name
