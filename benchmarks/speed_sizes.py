"""Rows of the speed benchmark at real sizes, by name: for a GPU."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.record import Row, lock
from benchmarks.speed_real import SIZES, flops_per_pair

ARMS: Mapping[str, tuple[str, ...]] = {
    "lora": (),
    "checkpointing": ("--model.gradient_checkpointing=true",),
    "offload": ("--model.gradient_checkpointing=true", "--model.offload_activations=true"),
    "bank": ("--data.reference_bank=1",),
    "channels_last": ("--model.channels_last=true",),
    "compile": ("--model.compile=true",),
    "flash": ("--model.attention=flash",),
    "cudnn": ("--model.attention=cudnn",),
    "full": ("--model.train=full", "--model.gradient_checkpointing=true"),
}
"""Flags of our run at every size; a size that does not fit or cannot is a row that says so."""


def on_gpu() -> bool:
    """Return whether there is one."""
    return torch.cuda.is_available()


def wanted(names: Sequence[str], repetitions: int) -> Iterator[tuple[str, str, int]]:
    """Yield size, arm and repetition, the arms in turn."""
    for repetition in range(repetitions):
        for name in names:
            for arm in ARMS:
                yield name, arm, repetition


def row_of(
    folder: Path,
    name: str,
    arm: str,
    steps: int,
    threads: int,
    repetition: int,
    measured: Callable[[Path, Mapping[str, Any]], Row],
) -> Row | None:
    """Return the row of a size and an arm, made if it is missing; one that failed has its error's last
    line.
    """
    size = SIZES[name]
    device = torch.cuda.get_device_name() if on_gpu() else "CPU"
    asked: Row = {"size": name, "arm": arm, "flags": ARMS[arm], "steps": steps, "batch": size.batch}
    asked |= {"side": size.side, "frames": size.frames, "device": device}
    key = f"speed-real-{name}-{arm}-{repetition}"
    if (found := record.known(key, asked)) is not None:
        return found
    job = {"kind": "real", "threads": threads, "size": name, "flags": list(ARMS[arm])}
    job |= {"steps": steps, "batch": size.batch}
    with lock("speed", wait=False) as mine:
        if not mine:
            return None
        facts: Row = {"repetition": repetition, "warm": 2}
        try:
            facts |= {"flops_per_pair": flops_per_pair(name, ARMS[arm])} | measured(folder, job)
        except RuntimeError as error:
            facts["failed"] = str(error).strip().splitlines()[-1]
        return record.keep(key, asked, facts)
