"""The times at which a model calls its network: all, or those of one of two experts."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.diffusion.paths import RectifiedFlow
from diffalign.types import Path

ALL = (0.0, 1.0)


def span_of(path: Path) -> tuple[float, float]:
    """Return the times, from and to, at which a path's network is called."""
    return path.span if isinstance(path, RectifiedFlow) else ALL


def in_span(path: Path, t: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return whether the network is called at each time.

    The boundary is compared with the network's time input, as in the stock pipeline; the boundary itself
    belongs to the expert for high noise.
    """
    if span_of(path) == ALL or not isinstance(path, RectifiedFlow):
        return torch.ones_like(t, dtype=torch.bool)
    time, (low, high) = path.model_time(t).double(), path.span
    return (time >= low * path.scale) & ((time < high * path.scale) | (high == 1))
