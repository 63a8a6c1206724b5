"""MADPO. Rho 2025, "Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference
Optimization", arXiv 2510.05342; the author's code (sirano1004), on Diffusion-DPO's loss.

With h the margin of a reward model, chosen minus rejected, and Diffusion-DPO's logit,

    loss = w(h) (-log sigmoid(logit)),    w = sigmoid(c h) / sigmoid(h) for h > -tau, else 1,
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(sharpness (|h| - tau))).

c(tau) = 1. Easy pairs (h > tau) have weights below 1, hard ones (0 < h < tau) above 1, up to 1.21 with c_max
2. Pairs that the reward model contradicts (-tau < h < 0) have weights below 1, down to .06 at h = -3 with the
run's tau of 6.9. Note that w rises steeply to 1 as h tends to -tau and is 1 below it: the strongest
contradictions have full weight.

h is the difference of ``batch.extra["reward"]`` if the data has it (the mean of several), otherwise of the
scores; with labels of 1 and 0 all pairs have equal weights. ``reward_scale`` converts it to log-odds. Ours:
the transfer to denoising errors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.losses.contrast import Contrast
from diffalign.methods._base import PairMethod, check_positive
from diffalign.methods._common import compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class MADPO(PairMethod):
    """Diffusion-DPO with a weight for each pair.

    Attributes:
        beta: weight of the KL to the reference, as in ``dpo``.
        c_max: largest coefficient c, of hard pairs, at least 1.
        c_min: smallest coefficient c, of easy pairs, in [0, 1).
        sharpness: rate of the transition from c_max to c_min (the paper's lambda), above 0.
        tau: margin at which the weight is 1, in log-odds, above 0.
        reward_scale: log-odds per unit of the reward, above 0.
    """

    beta: float = 5000.0
    c_max: float = 2.0
    c_min: float = 0.5
    sharpness: float = 1.0
    tau: float = 2.0
    reward_scale: float = 1.0

    extras: ClassVar[frozenset[str]] = frozenset({"reward"})

    def __post_init__(self) -> None:
        check_positive(self, "beta", "sharpness", "tau", "reward_scale")
        if not 0 <= self.c_min < 1 <= self.c_max:
            raise UserError(
                f"method.c_min={self.c_min}, c_max={self.c_max}; allowed: 0 <= c_min < 1 <= c_max"
            )

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean of weighted losses over all pairs of rivals that are not tied."""
        c = compare(self, policy, reference, batch, generator)
        losses = pair_losses(self.loss, self.beta * c.chosen, self.beta * c.rejected, c, batch)
        return preference_step(c, self.weights(self.reward_scale * margins(c, batch)) * losses, self.beta)

    def coefficients(self, h: Tensor) -> Tensor:
        """Return c of margins (P, *unit), same shape: largest at 0, 1 at tau, tending to c_min."""
        # c = c_min + (c_max - c_min) / (1 + transition)
        transition = (self.c_max - 1) / (1 - self.c_min) * torch.exp(self.sharpness * (h.abs() - self.tau))
        return self.c_min + (self.c_max - self.c_min) / (1 + transition)

    def weights(self, h: Tensor) -> Tensor:
        """Return the weights w of margins (P, *unit), same shape."""
        return torch.where(h > -self.tau, (self.coefficients(h) * h).sigmoid() / h.sigmoid(), 1.0)


def margins(c: Contrast, batch: Batch[Tensor]) -> Tensor:
    """Return the reward margins (P, *unit) of pairs; differences of scores if the data has no rewards."""
    if "reward" not in batch.extra:
        return c.gap
    reward = batch.extra["reward"].to(c.gap).reshape(len(batch.group), -1).mean(1)
    return reward[c.better] - reward[c.worse]


CARD = MethodCard(
    name="madpo",
    title="MADPO",
    paper="Rho, Margin Adaptive DPO: Leveraging Reward Model for Granular Control",
    year=2025,
    arxiv="2510.05342",
    data=DataKind.REWARDED_PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=MADPO,
    soft=True,
)
