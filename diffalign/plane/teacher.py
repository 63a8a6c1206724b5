"""The ideal teacher on the plane: the exact denoiser of a known optimum, without a network."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.plane.plane import LABELS, Mixture, Plane
from diffalign.types import Cond, Path, Target


@dataclass(frozen=True)
class IdealTeacher:
    """The exact denoiser of ``Plane.optimum`` at a temperature.

    For a Gaussian mixture E[x0 | x_t] is known: under mode k with mean m_k, x_t ~ N(alpha m_k, v) with
    v = alpha^2 std^2 + sigma^2, and E[x0 | x_t, k] = m_k + alpha std^2 / v (x_t - alpha m_k).

    Attributes:
        path: path of the student.
        target: prediction target of the student, "eps" or "flow".
        tau: temperature of the optimum; a negative one prefers low points.
        plane: the plane.
    """

    path: Path
    target: Target
    tau: float = 0.5
    plane: Plane = Plane()

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the exact prediction at points (B, 2)."""
        alpha, sigma = (c[:, None].to(x_t) for c in self.path.coefficients(t))
        x0 = torch.zeros_like(x_t)
        for label in range(LABELS):
            best = _optimum(self.plane, label, self.tau)
            variance = alpha**2 * best.std**2 + sigma**2
            offset = x_t[:, None] - alpha[:, :, None] * best.means  # x_t - alpha m_k
            posterior = (best.weights.log() - (offset**2).sum(-1) / (2 * variance)).softmax(1)  # p(k | x_t)
            x0_given_mode = best.means + (alpha * best.std**2 / variance)[:, :, None] * offset
            mean = (posterior[:, :, None] * x0_given_mode).sum(1)
            x0 = torch.where((cond["label"] == label)[:, None], mean, x0)
        # avoids a division by 0 at sigma = 0
        eps = (x_t - alpha * x0) / sigma.clamp(min=torch.finfo(x_t.dtype).tiny)
        return eps - x0 if self.target == "flow" else eps


@lru_cache
def _optimum(plane: Plane, label: int, tau: float) -> Mixture:
    return plane.optimum(label, tau)
