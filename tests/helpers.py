"""Small stand-ins that several test modules share."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.paths import VariancePreserving, path_from_config
from diffalign.types import Noised

SD_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
ROOT = Path(__file__).resolve().parents[1]
VECTORS = Path(os.environ.get("DIFFALIGN_VECTORS", ROOT / "tests" / "golden"))
"""Results of reference implementations; the variable names a folder of more cases of the same files."""
PUBLISHED_DATA = ROOT / "tests" / "published"
"""Published prompts, heads, labels and small copies of images and videos, with their licences."""


def sd_path() -> VariancePreserving:
    path, _ = path_from_config(SD_SCHEDULER)
    assert isinstance(path, VariancePreserving)
    return path


@dataclass
class Answers:
    """A denoiser that gives fixed predictions, whatever it is asked."""

    prediction: Tensor
    path: VariancePreserving
    target: str = "eps"

    def __call__(self, x_t, t, cond):
        assert x_t.shape == self.prediction.shape
        return self.prediction


@dataclass
class Affine:
    """eps(x, t) = (a + t / 2) x + b + c mean(cond): a denoiser that depends on all its inputs."""

    path: VariancePreserving
    a: Tensor
    b: Tensor
    target: str = "eps"

    def __call__(self, x_t, t, cond):
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        text = sum(v.flatten(1).mean(1) for v in cond.values()).reshape(shape) if cond else 0.0
        return (self.a + t.reshape(shape) / 2) * x_t + self.b + text


@dataclass(frozen=True)
class GivenTimes:
    """A time sampler that gives the times it was made with."""

    times: tuple[float, ...]

    def __call__(self, count, generator):
        assert count == len(self.times)
        return torch.tensor(self.times, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class GivenNoise:
    """A noising that uses the noise it was made with."""

    eps: Tensor
    by: str = "policy"
    guidance: float = 1.0

    def __call__(self, denoiser, x0, t, cond, group, generator):
        from diffalign.diffusion.noising import add_noise

        return Noised(x0, self.eps, add_noise(denoiser, x0, self.eps, t), t)


def in_two_processes(module: str, *arguments: object, processes: int = 2, pipelines: bool = False) -> None:
    """Run a module on the CPU with these arguments, in two processes or so many (``tests.ranks``).

    ``pipelines`` imports diffusers once for all of them.
    """
    options = ["--pipelines"] if pipelines else []
    _launched(["tests.ranks", *options, str(processes), module, *map(str, arguments)], processes)


def under_torchrun(module: str, *arguments: object) -> None:
    """Run a module under torchrun on the CPU, in two processes, with these arguments."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    _launched([*torchrun, "-m", module, *map(str, arguments)], 2)


def _launched(command: list[str], processes: int) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = launcher.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # rather than kill, so that it takes its two processes with it
        output, _ = launcher.communicate()
        pytest.fail(f"{processes} processes hang: {output[-4000:]}")
    assert launcher.returncode == 0, output[-4000:]
