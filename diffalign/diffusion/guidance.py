"""Classifier-free guidance as a wrapper of a denoiser."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffalign.diffusion.wrapper import Wrapper
from diffalign.types import Cond


@dataclass(frozen=True, eq=False)
class Guided(Wrapper):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    The prediction is negative + scale (positive - negative); both come from one network call of 2B samples.
    If the path has ``guided_patch`` or ``guided_rows``, each token or row is rescaled to the norm of the
    positive prediction's.

    Attributes:
        denoiser: the network.
        negative: negative conditions by name, one row or B rows each; names that it lacks (sizes) are taken
            from the positive conditions.
        scale: guidance scale; 1 is no guidance.
        detached: compute the negative prediction in a separate call without gradient.
    """

    negative: Mapping[str, Tensor]
    scale: float
    detached: bool = False

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the guided prediction, shaped like ``x_t``."""
        rows = {k: self.negative[k].to(v).expand_as(v) if k in self.negative else v for k, v in cond.items()}
        if self.detached and torch.is_grad_enabled():
            with torch.no_grad():
                negative = self.denoiser(x_t, t, rows)
            return self._guided(negative, self.denoiser(x_t, t, cond))
        both = {k: torch.cat([rows[k], v]) for k, v in cond.items()}
        negative, positive = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return self._guided(negative, positive)

    def _guided(self, negative: Tensor, positive: Tensor) -> Tensor:
        guided = negative + self.scale * (positive - negative)
        if getattr(self.path, "guided_rows", False):
            ratio: Tensor = positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
            return guided * ratio
        patch = getattr(self.path, "guided_patch", None)
        return guided if patch is None else guided * (lengths(positive, patch) / lengths(guided, patch))


def lengths(prediction: Float[Tensor, "B C h w"], patch: int) -> Float[Tensor, "B 1 h w"]:
    """Return the Euclidean norm of each token (``patch`` x ``patch`` latents), repeated at its latents."""
    squares = avg_pool2d(prediction.square().sum(1, keepdim=True), patch) * patch**2
    return squares.sqrt().repeat_interleave(patch, 2).repeat_interleave(patch, 3)
