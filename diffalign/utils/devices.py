"""The device and the dtypes of commands, and the place of a process. Importing this module does not import
torch.
"""

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


def share() -> tuple[int, int]:
    """Return (rank, world) of this process under torchrun or ``accelerate launch``, else (0, 1).

    Raises:
        UserError: the variables RANK and WORLD_SIZE are no such pair.
    """
    rank, world = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment; allowed: whole numbers, RANK below "
            "WORLD_SIZE, as launchers set them, or neither"
        )
    return int(rank), int(world)
