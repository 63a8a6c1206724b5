"""SRPO and Direct-Align. Shen et al. 2025, "Directly Aligning the Full Diffusion Trajectory with Fine-Grained
Human Preference", arXiv 2509.06942.

The policy samples x_0 from noise eps without gradient. Its sample is noised again by the same eps to a time t
of the first part of the path, the policy takes one step with gradient from t to s, and since eps is known,
the clean latents are recovered without its help:

    y = alpha_s x0_hat(x_t) + sigma_s eps_hat(x_t),    x0' = (y - sigma_s eps) / alpha_s.

A perfect prediction gives x_0 whatever t and s are. The reward of x0' is relative to words before the prompt,

    S = (1 + k) r(x0', "a. prompt") - r(x0', "b. prompt"),    loss = relu(margin - S) / 2,

summed over two branches: a step to less noise with a positive and b negative words, and a step to more noise
(inversion), whose gradient has the other sign, with a negative and b positive. k is linear in the place on
the path: ``denoise`` from its clean to its noisy end, ``inversion`` likewise.

``positive`` and ``negative`` empty: Direct-Align alone, S = r in the first branch and -r in the second.

What differs from the released code (Tencent-Hunyuan/SRPO, fastvideo/SRPO.py): it is written in alpha and
sigma, so that noise schedules have it too; every sample has its own noise, place and words, where all
processes share one noise and words follow the number of the step; the guidance of the gradient step is that
of the sampling; the two branches are of one place; there is a penalty on the distance to the reference
(``hold``), where the code has none and its authors advise to stop after some tens of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.noising import add_noise, expand
from diffalign.diffusion.randomness import uniform
from diffalign.diffusion.samplers import DDIM
from diffalign.errors import UserError
from diffalign.methods._reward_gradients import RewardGradient, Unrolled, gradient_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Path, Random, Step

POINTS, EDGE = 1000, 5
"""Places between the two times, and how many at each end no step is drawn from."""


@dataclass(frozen=True)
class SRPO(RewardGradient):
    """One-step recovery of a noised sample, rewarded relative to words.

    Attributes:
        positive: words of which one stands before the prompt; drawn for each group.
        negative: words that the reward is relative to.
        high: time of the noisy end of the places.
        low: time of their clean end.
        reach: longest step as a share of the places.
        margin: S above which nothing is learnt.
        denoise: k of the first branch at the clean and at the noisy end.
        inversion: k of the second branch there.
    """

    positive: tuple[str, ...] = ("Natural-lighting", "Detail", "Detailed", "Real")
    negative: tuple[str, ...] = ("Concept art", "Painting", "Anime", "Flat", "Oil")
    high: float = 27 / 28
    low: float = 0.75
    reach: float = 0.1
    margin: float = 0.7
    denoise: tuple[float, float] = (0.1, 0.25)
    inversion: tuple[float, float] = (0.3, 0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low < self.high < 1:
            raise UserError(f"method.low={self.low}, high={self.high}; allowed: 0 < low < high < 1")
        if not 0 < self.reach <= 1:
            raise UserError(f"method.reach={self.reach}; allowed: more than 0, up to 1")
        if bool(self.positive) != bool(self.negative):
            raise UserError(
                f"method.positive={self.positive}, negative={self.negative}; allowed: words in both, or none"
            )

    @property
    def words(self) -> bool:
        """Whether rewards are relative to words."""
        return bool(self.positive)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss of B samples, of ``batch.x`` noise (B, *d)."""
        sampling = Unrolled(policy, reference if self.hold else None, batch)
        eps = batch.x
        x0 = sampling.run(torch.zeros(sampling.steps, len(eps), dtype=torch.bool, device=eps.device))
        draws = uniform(generator, batch.num_groups, (3,)).cpu()[batch.group]
        place, length = self.places(draws[:, 0])
        said = [
            [words[int(draw * len(words))] for draw in column.tolist()] if words else []
            for words, column in zip((self.positive, self.negative), draws[:, 1:].T, strict=True)
        ]
        loss, held = torch.zeros(len(eps), device=eps.device), sampling.held
        rewards: list[Tensor] = []
        for ends, k, words in (
            ((place + length, place), self.denoise, said),
            (
                ((place - length).clamp(min=1), (place - length).clamp(min=1) + length),
                self.inversion,
                said[::-1],
            ),
        ):
            t, s = (self.time(POINTS - end).to(x0) for end in ends)
            clean, noise, distance = sampling.predicted(add_noise(policy, x0, eps, t), t)
            recovered = recover(policy.path, clean, noise, eps, t, s)
            weight = (k[0] + (k[1] - k[0]) * place / (POINTS - 1)).to(x0)
            score, reward = self.score(batch, recovered, words, weight, inverted=bool(rewards))
            loss, held = loss + (self.margin - score).relu() / 2, held + distance / 2
            rewards.append(reward)
        return gradient_step(rewards[0], loss, held, self.hold)

    def places(self, draws: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """Return the place of each draw from U[0, 1), counted from the clean end, and the step's length."""
        place = EDGE + (draws * (POINTS - 2 * EDGE)).long()
        longest = int(self.reach * POINTS) + 1
        return place, torch.minimum(place, POINTS - place).clamp(max=longest)

    def time(self, index: Tensor) -> Tensor:
        """Return the times (B,) of places counted from the noisy end, 0 to ``POINTS`` - 1."""
        return self.high + (self.low - self.high) * index / (POINTS - 1)

    def score(
        self, batch: Batch[Tensor], latents: Tensor, words: Sequence[Sequence[str]], k: Tensor, inverted: bool
    ) -> tuple[Tensor, Tensor]:
        """Return S (B,) and the reward (B,) under the first words; without words S is r, or -r inverted."""
        assert batch.value is not None
        rows = torch.arange(len(latents), device=latents.device)
        if not self.words:
            reward = batch.value(latents, rows)
            return -reward if inverted else reward, reward
        wanted, unwanted = batch.value(latents, rows, words=words)
        return relative(wanted, unwanted, k), wanted


def relative(wanted: Tensor, unwanted: Tensor, k: Tensor) -> Tensor:
    """(1 + k) wanted - unwanted, each (B,)."""
    return (1 + k) * wanted - unwanted


def recover(path: Path, clean: Tensor, noise: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the clean latents (B, *d) that a step from t to s and the known noise ``eps`` give.

    Args:
        path: of the policy.
        clean: its estimate of the clean latents at t.
        noise: its estimate of the noise there.
        eps: the noise that was added.
        t: (B,) where the step starts.
        s: (B,) where it ends, before or after t.
    """
    alpha, sigma = (expand(c, clean) for c in path.coefficients(s))
    return (DDIM().after(path, clean, noise, t, s)[0] - sigma * eps) / alpha


CARD = MethodCard(
    name="srpo",
    title="SRPO",
    paper="Shen et al., Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference",
    year=2025,
    arxiv="2509.06942",
    data=DataKind.DIFFERENTIABLE,
    cost="a sample: 2 policy predictions with gradient, 2 reference samples, the sampling without; 4 rewards "
    "of 2 images",
    method=SRPO,
    rollout="gradients",
)
