"""A process of the speed benchmark: it trains, and notes processor and wall time at each optimizer step.

    python -m benchmarks.speed_child JOB.json

A job is a run of diffalign, a training script given by path, or steps on a network that is made here
(``benchmarks.speed_real``). All are measured by the same hooks of torch's optimizers, so a script is run as
it is. The result lies beside the job as ``result.json``.
"""

import json
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from diffalign.utils.files import write_atomic
from diffalign.utils.memory import peak_memory

SIDE = {"cpu": 2048, "cuda": 8192}
"""Sides of the matrices whose product measures a device's peak."""


@dataclass
class Stamps:
    """Times at which training began and at which each optimizer step ended.

    Attributes:
        rows: (wall s, processor s, processor s inside optimizers so far), from the making of the first
            optimizer on.
        before: peak memory in bytes up to there.
    """

    rows: list[tuple[float, float, float]] = field(default_factory=list)
    before: int = 0
    _inside: float = 0.0
    _since: float = 0.0

    def install(self) -> None:
        """Watch all optimizers of torch."""
        made = torch.optim.Optimizer.__init__

        def watched(optimizer: Any, *arguments: Any, **named: Any) -> None:
            made(optimizer, *arguments, **named)
            if not self.rows:
                self.before = peak()
                forget_peak()
                self._note()

        torch.optim.Optimizer.__init__ = watched  # type: ignore[method-assign]
        torch_optimizer.register_optimizer_step_pre_hook(self._begin)
        torch_optimizer.register_optimizer_step_post_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._since = time.process_time()

    def _end(self, *_: Any) -> None:
        self._inside += time.process_time() - self._since
        self._note()

    def _note(self) -> None:
        self.rows.append((time.perf_counter(), time.process_time(), self._inside))


def peak() -> int:
    """Return the peak memory in bytes since it was last forgotten: of the GPU where one is used, else of the
    process.
    """
    status = Path("/proc/self/status")
    if (torch.cuda.is_available() and torch.cuda.is_initialized()) or not status.exists():
        return peak_memory().bytes
    # the peak that forget_peak resets; that of getrusage is the peak of the whole process
    return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Begin the peak anew, where the system lets a process do so."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def matmul_flops(device: str, dtype: torch.dtype, side: int) -> float:
    """Return the FLOP a second of the best of five products of square matrices; a CPU's by processor time."""
    a = torch.randn(side, side, device=device).to(dtype)
    a @ a
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter if device == "cuda" else time.process_time
        since = clock()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - since)
    return 2 * side**3 / best


def run_ours(job: dict[str, Any]) -> str:
    """Train a run of diffalign; return the precision that it computed in."""
    from diffalign.runs.align import align
    from diffalign.runs.validate import read_run
    from diffalign.training import optimizers

    if job["unfused"]:
        optimizers._FUSED_DEVICES.clear()
    run = read_run(job["config"], job["flags"])
    align(run, lambda line: None)
    return run.training.mixed_precision


def run_script(job: dict[str, Any]) -> str:
    """Run a training script as ``python SCRIPT ARGUMENTS`` would."""
    if find_spec("wandb") is None:  # imported by diffusers' scripts, used with --report_to wandb alone
        stand_in = ModuleType("wandb")
        stand_in.__spec__ = ModuleSpec("wandb", None)
        sys.modules["wandb"] = stand_in
    sys.argv = [job["script"], *job["arguments"]]
    runpy.run_path(job["script"], run_name="__main__")
    return "bf16" if "bf16" in job["arguments"] else "no"


def run_real(job: dict[str, Any]) -> str:
    """Take steps on a network of the real size."""
    from benchmarks.speed_real import steps_of

    steps_of(job["size"], job["flags"], job["steps"], job["batch"])
    return "bf16" if torch.cuda.is_available() else "no"


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ours": run_ours,
    "script": run_script,
    "real": run_real,
}


def main(file: Path) -> None:
    """Do a job and write what it took."""
    job = json.loads(file.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    stamps = Stamps()
    stamps.install()
    precision = KINDS[job["kind"]](job)
    during, processor = peak(), time.process_time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    result = {
        "stamps": stamps.rows,
        "processor": processor,
        "peak": max(stamps.before, during),
        "peak_training": during,
        "matmul": matmul_flops(device, dtype, job.get("side") or SIDE[device]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }
    write_atomic(file.with_name("result.json"), json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
