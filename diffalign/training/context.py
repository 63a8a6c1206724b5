"""Groups of processes that share the tokens of their rows (``training.context``).

The processes of a group see the same rows, noise and times, and each computes a part of the network's tokens
(``models.context``). So a group counts as one process wherever rows are given out and losses are summed.
Groups are consecutive processes, and thus within a node where the degree divides its processes.
"""

from typing import Any

from accelerate import Accelerator

from diffalign.config.schema import TrainingConfig
from diffalign.errors import UserError


def check_degree(settings: TrainingConfig, processes: int) -> None:
    """Check that the processes can be divided into groups.

    Raises:
        UserError: ``training.context`` does not divide their number.
    """
    degree = settings.context
    if processes % degree:
        many = f"{processes} process{'es' * (processes != 1)}"
        divisors = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        raise UserError(
            f"training.context={degree}: {many} cannot be divided into groups of {degree}; allowed with "
            f"{many}: {divisors}"
        )


def group_of(settings: TrainingConfig, accelerator: Accelerator) -> tuple[int, int]:
    """Return (index of this process's group, number of groups); without context every process is a group."""
    degree = settings.context
    return accelerator.process_index // degree, accelerator.num_processes // degree


def context_summary(settings: TrainingConfig, groups: int) -> str:
    """Return a one-line description of a run's groups of processes."""
    many = f"{groups} group{'s' * (groups != 1)}"
    return (
        f"training.context={settings.context}: {settings.context * groups} processes in {many}; those of a "
        "group see the same rows, and each computes a part of their tokens"
    )


def context_mesh(settings: TrainingConfig, accelerator: Accelerator) -> Any:
    """Return the device mesh (groups, 1, processes of a group); None without context. A collective."""
    if settings.context == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    _, groups = group_of(settings, accelerator)
    # diffusers expects both of these names, and a size of 1 for what is not used
    names = ("groups", "ring", "ulysses")
    return init_device_mesh(accelerator.device.type, (groups, 1, settings.context), mesh_dim_names=names)
