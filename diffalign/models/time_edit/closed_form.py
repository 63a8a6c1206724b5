"""TIME's regularised least squares (Orgad et al. 2023, arXiv 2303.08084, equations 3 and 4), in float64.

A projection W is moved as little as possible so that it makes of each source token c_i what it made of the
destination token c*_i:

    min_W'  sum_i |W' c_i - W c*_i|^2 + lambda |W' - W|^2
    W' = (lambda W + sum_i W c*_i c_i^T) (lambda I + sum_i c_i c_i^T)^-1
       = W [ I + (sum_i (c*_i - c_i) c_i^T) (lambda I + sum_i c_i c_i^T)^-1 ].

The bracket knows nothing of W, so layers with one input (every cross-attention of a UNet) share it. A bias
stays as it is: it is on both sides.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError


@dataclass
class Moments:
    """Running sums over tokens of width C.

    Attributes:
        gram: sum of c c^T, (C, C) float64.
        shift: sum of (c* - c) c^T, (C, C) float64.
    """

    gram: Tensor
    shift: Tensor

    @classmethod
    def empty(cls, width: int) -> "Moments":
        """Return sums over nothing."""
        return cls(*(torch.zeros(width, width, dtype=torch.float64) for _ in range(2)))

    def add(
        self, source: Float[Tensor, "*tokens C"], destination: Float[Tensor, "*tokens C"], weight: float = 1.0
    ) -> None:
        """Add tokens with the destination tokens that they are aligned to, row by row."""
        c, goal = (rows.detach().to("cpu", torch.float64).flatten(0, -2) for rows in (source, destination))
        self.gram += weight * c.T @ c
        self.shift += weight * (goal - c).T @ c

    def bracket(self, strength: float) -> Float[Tensor, "C C"]:
        """Return the matrix that a projection is multiplied by from the right, (C, C) float64.

        Args:
            strength: lambda, more than 0.

        Raises:
            UserError: lambda is 0 or less: the sum over a few tokens cannot be inverted.
        """
        if not strength > 0:
            raise UserError(f"lambda={strength}; allowed: more than 0")
        one = torch.eye(len(self.gram), dtype=torch.float64)
        change: Tensor = torch.linalg.solve(strength * one + self.gram, self.shift.T).T
        return one + change


def edited(weight: Float[Tensor, "D C"], bracket: Float[Tensor, "C C"]) -> Float[Tensor, "D C"]:
    """Return a projection (D, C) after the edit, in its own dtype and place; the product is float64."""
    return (weight.detach().to("cpu", torch.float64) @ bracket).to(weight)
