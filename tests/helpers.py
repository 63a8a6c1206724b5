"""Small stand-ins that several test modules share."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.paths import VariancePreserving, path_from_config
from diffalign.types import Noised

SD_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Reference material beside the checkout; tests that want it skip where it is absent."""


def needs(path: Path) -> pytest.MarkDecorator:
    """A mark that skips a test where some reference material is not there."""
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not beside the checkout")


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
        from diffalign.noising import add_noise

        return Noised(x0, self.eps, add_noise(denoiser, x0, self.eps, t), t)
