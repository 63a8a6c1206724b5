"""What counts as one unit of a sample: squared errors (B, *d) to a mean for each unit, (B, *unit).

``estimators.PerSample`` is the usual answer, one number a sample.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError


@dataclass(frozen=True)
class PerFrame:
    """One unit per latent frame of a video: the mean over channels, height and width."""

    def __call__(self, squared: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B F"]:
        """(B, F) means.

        Raises:
            UserError: images, which have no frame axis.
        """
        if squared.ndim != 5:
            raise UserError(
                f"latents of shape {tuple(squared.shape)} have no frames; allowed: videos, (B, C, F, h, w)"
            )
        return squared.mean((1, 3, 4))
