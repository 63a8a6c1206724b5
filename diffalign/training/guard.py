"""Guards against divergence: skip spikes of the gradient norm, stop at values that are not finite.

Preference losses of diffusion models can spike after hundreds of regular steps and not recover (huggingface
diffusers issue 6565); with clipping alone the step still has the full clipped length in the spike's
direction.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.errors import UserError


class TrainingDiverged(UserError):
    """The loss or a gradient is not finite; the parameters are those of the last finite step."""


def diverged(step: int, metrics: Mapping[str, float]) -> TrainingDiverged:
    """Return the error, whose message has the step and its metrics."""
    measured = ", ".join(f"{name}={value:.6g}" for name, value in sorted(metrics.items()))
    return TrainingDiverged(
        f"training diverged at step {step}: {measured}. The step was not applied and earlier checkpoints "
        "are intact; try a lower optimizer.learning_rate, a lower training.max_grad_norm, or "
        "training.spike_factor 5"
    )


@dataclass
class GradientGuard:
    """Skip steps whose gradient norm exceeds ``factor`` times the running mean of earlier norms.

    The mean is arithmetic over the first ``warmup`` norms, during which no step is skipped, and exponential
    with that window afterwards. A skipped norm enters the mean clamped to the threshold: one spike changes it
    little, and a lasting change of level is accepted after a few skipped steps.

    Attributes:
        factor: threshold relative to the mean, above 1; 0: never skip.
        warmup: number of first norms without a threshold, and length of the window.
        mean: running mean of the norms.
        count: number of norms so far, at most ``warmup``.
    """

    factor: float
    warmup: int = 20
    mean: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        if not (self.factor == 0.0 or self.factor > 1.0):
            raise UserError(f"training.spike_factor={self.factor}; allowed: 0 (never skip), or above 1")

    def skips(self, norm: float) -> bool:
        """Return whether to skip a step with this finite gradient norm, and update the mean with it."""
        active = self.factor > 0.0 and self.count >= self.warmup and self.mean > 0.0
        limit = self.factor * self.mean if active else math.inf
        self.count = min(self.count + 1, self.warmup)
        self.mean += (min(norm, limit) - self.mean) / self.count
        return norm > limit

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state from a checkpoint."""
        self.mean, self.count = float(state["mean"]), int(state["count"])
