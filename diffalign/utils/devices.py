"""The device and the dtypes of commands, and the place of a process. Importing this module does not import
torch.
"""

import os

from diffalign.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def device_name(name: str) -> str:
    """Resolve ``--device``: ``auto`` is the accelerator if there is one (under torchrun the process's own).

    Raises:
        UserError: the device is unknown or not available.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = accelerator.type if accelerator is not None else "cpu"
    if name == "auto":
        local_rank = os.environ.get("LOCAL_RANK", "0")
        return best if best == "cpu" or local_rank == "0" else f"{best}:{local_rank}"
    kind, colon, index = name.partition(":")
    there = torch.accelerator.device_count() if kind == best != "cpu" else 1
    if kind not in ("cpu", best) or (colon and not (index.isdecimal() and int(index) < there)):
        first = [best, *(f"{best}:{number}" for number in range(there) if there > 1)]
        allowed = ", ".join(dict.fromkeys(["auto", "cpu", *first]))
        raise UserError(f"device {name!r} is not available here; allowed: {allowed}")
    return name


def share() -> tuple[int, int]:
    """Return (rank, world) of this process under torchrun or ``accelerate launch``, else (0, 1).

    Raises:
        UserError: the variables RANK and WORLD_SIZE are no such pair, or neither is set and ``srun`` or MPI
            has started several processes of this command, each of which would do the whole work.
    """
    if not os.environ.get("RANK") and not os.environ.get("WORLD_SIZE"):
        _check_tasks()
    world = os.environ.get("WORLD_SIZE") or "1"
    rank = os.environ.get("RANK") or ("0" if world == "1" else "")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(
            f"RANK={rank!r} and WORLD_SIZE={world!r} in the environment; allowed: whole numbers, RANK below "
            "WORLD_SIZE, as launchers set them, or neither"
        )
    return int(rank), int(world)


def _check_tasks() -> None:
    """Raise UserError where ``srun`` or MPI has started several processes that no launcher has numbered."""
    for variable, (starter, one, many) in _TASKS.items():
        count = os.environ.get(variable, "")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{starter} has started {count} {many} ({variable}), and each would do the whole work and "
                f"write the same files; allowed: one {one} a node, which starts `accelerate launch -m "
                "diffalign ...` or `torchrun -m diffalign ...`; or WORLD_SIZE=1 in the environment, where "
                f"each {one} is a run of its own with another --output"
            )


def check_group() -> None:
    """Check that a process which a launcher numbers among several can find the others.

    accelerate joins a process to the others where LOCAL_RANK is set, by torch's rendezvous of MASTER_ADDR and
    MASTER_PORT; otherwise each process would be a run of one process.

    Raises:
        UserError: WORLD_SIZE is above 1, and one of these variables is not set, as where RANK and WORLD_SIZE
            are left over from another job.
    """
    rank, world = share()
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    if world > 1 and missing:
        raise UserError(
            f"the environment has RANK={rank} and WORLD_SIZE={world} without {', '.join(missing)}, so this "
            f"process cannot join the other {world - 1}; allowed: a start by `torchrun -m diffalign ...` or "
            "`accelerate launch -m diffalign ...`, which set all of them, or for a run of one process none: "
            "unset RANK WORLD_SIZE"
        )


_RENDEZVOUS = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which accelerate and torch join processes."""

_MPI = ("mpirun", "process", "processes")
_TASKS = {
    "SLURM_STEP_NUM_TASKS": ("srun", "task", "tasks"),
    "OMPI_COMM_WORLD_SIZE": _MPI,
    "PMI_SIZE": _MPI,
    "MV2_COMM_WORLD_SIZE": _MPI,
}
"""Starters of processes that number them by names of their own: the variable of the number of processes, of
``srun``, Open MPI, MPICH and Intel MPI, and MVAPICH2. SLURM_NTASKS is set in a batch script too, which is one
process."""
