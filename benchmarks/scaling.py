"""How many pairs a second two processes train beside one: DDP over gloo on a CPU, a thread each.

    python -m benchmarks.scaling                       # the mid-size model of benchmarks.profile
    python -m benchmarks.scaling --model tiny --repetitions 1

Each process has the same number of pairs a step, so that two do twice the work of one. Arms alternate: one
process, two, one, two. Steps after the first are counted, by the wall and by processor time of all threads of
all processes. The page is ``benchmarks/scaling.md``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from benchmarks import record
from benchmarks.profile import prepared, run_of
from benchmarks.speed_page import spread
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from diffalign.training.state import TrainState
from diffalign.utils.files import write_atomic

WORLDS = (1, 2)
PAIRS = 2
"""Pairs a step and process."""


class _Stamps:
    """The hook that notes wall and processor seconds after each step."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def on_start(self, state: TrainState) -> None:
        """Nothing to start."""

    def on_step(self, state: TrainState) -> None:
        self.rows.append((time.perf_counter(), time.process_time()))

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""


def child(model: str, steps: int, folder: Path) -> None:
    """Train as one process of a launch, and let the first write ``result.json``."""
    torch.set_num_threads(1)
    run = run_of(model, folder / f"rank-{os.environ['RANK']}", steps + 1)
    run = replace(run, output=str(folder / "run"), training=replace(run.training, batch_size=PAIRS))
    accelerator = accelerator_for(run.training)
    method, setup = prepared(run, accelerator)
    stamps, roles = _Stamps(), setup.roles
    train(
        method=method, denoiser_of=roles.policy_of, reference=roles.reference, network=roles.network,
        parameters=roles.parameters, source=setup.source, settings=run.training, optimizer=run.optimizer,
        accelerator=accelerator, hooks=[stamps],
    )  # fmt: skip
    taken = [last - first for first, last in zip(stamps.rows[0], stamps.rows[-1], strict=True)]
    everyone = gather_object([taken]) if accelerator.num_processes > 1 else [taken]
    if accelerator.is_main_process:
        result = {"wall": max(wall for wall, _ in everyone), "processor": sum(cpu for _, cpu in everyone)}
        write_atomic(folder / "result.json", json.dumps(result))


def measured(model: str, steps: int, world: int) -> dict[str, Any]:
    """Launch a training of ``world`` processes and return pairs a second, processor seconds a pair and load.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **one_thread, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    with tempfile.TemporaryDirectory() as folder:
        job = ["-m", "benchmarks.scaling", "--model", model, "--steps", str(steps), "--child", folder]
        done = subprocess.run(
            [sys.executable, *launch, *job], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{world} processes ended with {done.returncode}:\n{done.stderr[-3000:]}")
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    pairs = steps * PAIRS * world
    return {
        "processes": world,
        "pairs_a_second": pairs / result["wall"],
        "processor_a_pair": result["processor"] / pairs,
        "busy": result["processor"] / result["wall"] / world,
        "load": os.getloadavg()[0],
    }


def page(model: str, steps: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of all repetitions."""
    by_world = {world: [row for row in rows if row["processes"] == world] for world in WORLDS}
    lines = [
        "# Two processes beside one",
        "",
        f"`python -m benchmarks.scaling --model {model} --steps {steps}`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__.split('+')[0]}: DDP "
        f"over gloo, one thread a process, LoRA-DPO, {PAIRS} pairs a step and process, steps after the "
        "first. Median [least, most] of alternating repetitions. *Busy* is processor time over wall time of "
        "a process: below 1 it waited, for other work on the machine or for the other process.",
        "",
        "| processes | pairs a second | CPU s a pair | busy | load of the machine | n |",
        "|---|---|---|---|---|---|",
    ]
    for world, some in by_world.items():
        names = (("pairs_a_second", 3), ("processor_a_pair", 3), ("busy", 2), ("load", 1))
        cells = [spread([row[name] for row in some], digits) for name, digits in names]
        lines.append(f"| {world} | {' | '.join(cells)} | {len(some)} |")
    both = list(zip(by_world[1], by_world[2], strict=True))
    faster = spread([two["pairs_a_second"] / one["pairs_a_second"] for one, two in both], 2)
    costs = [two["processor_a_pair"] / one["processor_a_pair"] for one, two in both]
    lines += [
        "",
        f"Two over one: {faster} of the pairs a second, {spread(costs, 2)} of the processor time a pair; "
        f"if no process waited, the latter would allow {spread([2 / c for c in costs], 2)} of the pairs a "
        "second.",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all repetitions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "mid"), default="mid")
    parser.add_argument("--steps", type=int, default=6, help="counted steps")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        child(arguments.model, arguments.steps, arguments.child)
        return
    rows = []
    for _ in range(arguments.repetitions):
        for world in WORLDS:
            rows.append(measured(arguments.model, arguments.steps, world))
            print(json.dumps(rows[-1]), flush=True)
    write_atomic(record.HERE / "scaling.md", page(arguments.model, arguments.steps, rows))


if __name__ == "__main__":
    main()
