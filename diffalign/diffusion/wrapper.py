"""Base class of denoisers that wrap another denoiser."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffalign.types import Cond, Denoiser, Path, Target


@dataclass(frozen=True, eq=False)
class Wrapper:
    """A denoiser that wraps another one and has its path and target; subclasses define the call.

    Attributes:
        denoiser: the wrapped denoiser.
    """

    denoiser: Denoiser

    @property
    def path(self) -> Path:
        """The path of the wrapped denoiser."""
        return self.denoiser.path

    @property
    def target(self) -> Target:
        """The target of the wrapped denoiser."""
        return self.denoiser.target

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the prediction, shaped like ``x_t``."""
        raise NotImplementedError
