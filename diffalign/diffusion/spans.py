"""The times at which a model asks its network: all, or those of one of two experts."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.diffusion.paths import RectifiedFlow
from diffalign.types import Path

ALL = (0.0, 1.0)


def span_of(path: Path) -> tuple[float, float]:
    """Return the times, from and to, at which a path's network is asked."""
    return path.span if isinstance(path, RectifiedFlow) else ALL


def asked(path: Path, t: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return whether the network is asked at each time.

    Held against the boundary is what the network would be told, as the stock pipeline does; the boundary is
    of the expert for high noise.
    """
    if span_of(path) == ALL or not isinstance(path, RectifiedFlow):
        return torch.ones_like(t, dtype=torch.bool)
    told, (low, high) = path.model_time(t).double(), path.span
    return (told >= low * path.scale) & ((told < high * path.scale) | (high == 1))
