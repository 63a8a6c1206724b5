"""What keeps one bad step from ruining a run: skip a spike of the gradient norm, stop at NaN.

Preference losses of diffusion models are known to spike after hundreds of calm steps and not to recover
(huggingface diffusers issue 6565); clipping alone still takes a full-length step in the spike's direction.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.errors import UserError


class TrainingDiverged(UserError):
    """The loss or a gradient is no longer a finite number. The parameters are those of the last good step."""


def diverged(step: int, metrics: Mapping[str, float]) -> TrainingDiverged:
    """Return the error that names the step and what was measured in it."""
    measured = ", ".join(f"{name}={value:.6g}" for name, value in sorted(metrics.items()))
    return TrainingDiverged(
        f"training diverged at step {step}: {measured}. The step was not taken and the checkpoints before it "
        "are intact; try a lower optimizer.learning_rate, a lower training.max_grad_norm, or "
        "training.spike_factor 5"
    )


@dataclass
class GradientGuard:
    """Skips a step whose gradient norm is more than ``factor`` times the running mean of the norms before it.

    The mean is arithmetic over the first ``warmup`` norms, in which nothing is skipped, and exponential with
    that window afterwards. A skipped norm enters the mean capped at the threshold: one spike moves it little,
    while a lasting change of level is accepted after a few skips instead of stopping the run for good.
    """

    factor: float  # 0: never skip
    warmup: int = 20
    mean: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        if not (self.factor == 0.0 or self.factor > 1.0):
            raise UserError(f"training.spike_factor={self.factor}; allowed: 0 (never skip), or above 1")

    def skips(self, norm: float) -> bool:
        """Return whether to skip a step of this (finite) gradient norm; remembers the norm."""
        judged = self.factor > 0.0 and self.count >= self.warmup and self.mean > 0.0
        limit = self.factor * self.mean if judged else math.inf
        self.count = min(self.count + 1, self.warmup)
        self.mean += (min(norm, limit) - self.mean) / self.count
        return norm > limit

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a checkpoint."""
        self.mean, self.count = float(state["mean"]), int(state["count"])
