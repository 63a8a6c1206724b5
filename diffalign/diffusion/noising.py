"""Forward noising: from clean latents to noisy states.

``Forward`` samples the forward process q(x_t | x0). Rivals share their noise (Diffusion-DPO, Wallace et al.
2023, arXiv 2311.12908, section 5.1 and released code), which lowers the variance of the difference of their
errors.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.diffusion.randomness import normal
from diffalign.errors import UserError
from diffalign.types import Cond, Denoiser, Noised, Random
from diffalign.utils.transfer import sent


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` (B,) with trailing axes of length 1, to broadcast against ``like`` (B, *d)."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


@dataclass(frozen=True)
class Forward:
    """x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, 1).

    Attributes:
        shared: draw one noise for all members of a group; otherwise one for each sample.
        noise_offset: standard deviation of a constant per channel that is added to eps (and so is part of the
            target), at least 0; it helps with very dark and very bright images.
        input_perturbation: standard deviation of noise that is added to eps in x_t but not in the target, at
            least 0; shared within a group like eps.
    """

    shared: bool = True
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    by: ClassVar[Literal["policy"]] = "policy"
    guidance: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        for name in ("noise_offset", "input_perturbation"):
            if getattr(self, name) < 0:
                raise UserError(f"noising.{name}={getattr(self, name)}; allowed: 0 or more")

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        t: Tensor,
        cond: Cond,
        group: Tensor,
        generator: Random | torch.Generator,
    ) -> Noised:
        """Noise ``x0`` (B, *d) to times ``t`` (B,) on the path of ``denoiser``; ``cond`` is not used."""
        eps = self._draw(x0.shape[1:], x0, group, generator)
        if self.noise_offset:
            channel = x0.shape[1:2] + (1,) * (x0.ndim - 2)
            eps = eps + self.noise_offset * self._draw(channel, x0, group, generator)
        perturbed = eps
        if self.input_perturbation:
            perturbed = eps + self.input_perturbation * self._draw(x0.shape[1:], x0, group, generator)
        return Noised(x0, eps, add_noise(denoiser, x0, perturbed, t), t)

    def _draw(
        self, shape: tuple[int, ...], like: Tensor, group: Tensor, generator: Random | torch.Generator
    ) -> Tensor:
        groups = int(group.max()) + 1
        if self.shared:
            return sent(normal(generator, groups, shape), like)[sent(group, like.device)]
        # A stream belongs to a group, so independent members are drawn as extra rows of their group's stream.
        rank = rank_in_group(group)
        members = sent(normal(generator, groups, (int(rank.max()) + 1, *shape)), like)
        return members[sent(group, like.device), sent(rank, like.device)]


def add_noise(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return alpha(t) x0 + sigma(t) eps on the denoiser's path, (B, *d)."""
    alpha, sigma = denoiser.path.coefficients(t)
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def rank_in_group(group: Tensor) -> Tensor:
    """Return the number of earlier samples of the same group for each sample, (B,) int64."""
    same = (group[:, None] == group[None, :]).long()
    return torch.tril(same, diagonal=-1).sum(1)
