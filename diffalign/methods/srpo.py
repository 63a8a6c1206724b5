"""SRPO and Direct-Align. Shen et al. 2025, "Directly Aligning the Full Diffusion Trajectory with Fine-Grained
Human Preference", arXiv 2509.06942.

The policy samples x_0 from noise eps without gradient. The sample is noised with the same eps to a time t at
high noise, the policy makes one step with gradient from t to s, and since eps is known, the clean latents are
recovered in closed form:

    y = alpha_s x0_hat(x_t) + sigma_s eps_hat(x_t),    x0' = (y - sigma_s eps) / alpha_s.

A perfect prediction gives x_0 for all t and s. The reward of x0' is relative to words before the prompt,

    S = (1 + k) r(x0', "a. prompt") - r(x0', "b. prompt"),    loss = relu(margin - S) / 2,

summed over two branches: a step to less noise, with a positive and b negative words, and a step to more noise
(inversion), whose gradient has the opposite sign, with a negative and b positive words. k is linear in the
point on the path, from its clean to its noisy end: ``denoise`` in the first branch, ``inversion`` in the
second.

S must be below ``margin`` to have a gradient (metric ``past_margin``, the share of branches without one).
With equal rewards under both words S = k r, so that a reward of 17 and more, such as PickScore, is past the
margin in the first branch: weight it by 0.05, as released.

With ``positive`` and ``negative`` empty it is Direct-Align: S = r in the first branch and -r in the second.

Differences from the released code (Tencent-Hunyuan/SRPO, fastvideo/SRPO.py): it is written in alpha and
sigma, so that it also works on variance-preserving paths; every sample has its own noise, point and words
(there all processes share one noise, and words follow the number of the step); the guidance of the gradient
step is that of the sampling; the two branches use one point; the loss has a penalty on the distance to the
reference (``hold``), where the code has none and its authors advise to stop after some tens of steps.
"""

import math
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
from diffalign.utils.transfer import sent

POINTS, EDGE = 1000, 5
"""Number of points between ``low`` and ``high``, and the number at each end that is never drawn."""


@dataclass(frozen=True)
class SRPO(RewardGradient):
    """Maximise the reward, relative to words, of a noised sample that one step recovers.

    Attributes:
        positive: positive words, of which each group draws one.
        negative: negative words, of which each group draws one.
        high: time of the noisy end of the points, below 1.
        low: time of their clean end, above 0.
        reach: longest step as a share of the points, in (0, 1].
        margin: relative reward S from which the gradient is 0.
        denoise: k of the first branch at the clean and at the noisy end.
        inversion: k of the second branch at the clean and at the noisy end.
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

    @property
    def saturation(self) -> float:
        """Reward from which on S is past the margin in the first branch, if words do not change it."""
        least = min(self.denoise) if self.words else 1.0
        return self.margin / least if least > 0 else math.inf

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss of B samples from noise ``batch.x`` (B, *d)."""
        sampling = Unrolled(policy, reference if self.hold else None, batch)
        eps = batch.x
        x0 = sampling.run(torch.zeros(sampling.steps, len(eps), dtype=torch.bool, device=eps.device))
        draws = uniform(generator, batch.num_groups, (3,)).cpu()[batch.group]
        point, length = self.places(draws[:, 0])
        drawn_words = [
            [words[int(draw * len(words))] for draw in column.tolist()] if words else []
            for words, column in zip((self.positive, self.negative), draws[:, 1:].T, strict=True)
        ]
        loss, penalty = torch.zeros(len(eps), device=eps.device), sampling.penalty
        rewards: list[Tensor] = []
        past = torch.zeros_like(loss)
        # two branches from one point: (t, s) towards less noise, and towards more noise (inversion)
        for ends, k, words in (
            ((point + length, point), self.denoise, drawn_words),
            (
                ((point - length).clamp(min=1), (point - length).clamp(min=1) + length),
                self.inversion,
                drawn_words[::-1],
            ),
        ):
            t, s = (sent(self.time(POINTS - end), x0) for end in ends)
            clean, noise, distance = sampling.predicted(add_noise(policy, x0, eps, t), t)
            recovered = recover(policy.path, clean, noise, eps, t, s)
            weight = sent(k[0] + (k[1] - k[0]) * point / (POINTS - 1), x0)
            score, reward = self.score(batch, recovered, words, weight, inverted=bool(rewards))
            loss, penalty = loss + (self.margin - score).relu() / 2, penalty + distance / 2
            past = past + (score >= self.margin) / 2
            rewards.append(reward)
        return gradient_step(rewards[0], loss, penalty, self.hold, past)

    def places(self, draws: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        """Return points (B,), counted from the clean end, and lengths (B,) of steps, for draws in [0, 1)."""
        point = EDGE + (draws * (POINTS - 2 * EDGE)).long()
        longest = int(self.reach * POINTS) + 1
        return point, torch.minimum(point, POINTS - point).clamp(max=longest)

    def time(self, index: Tensor) -> Tensor:
        """Return the times (B,) of points counted from the noisy end, 0 to ``POINTS`` - 1."""
        return self.high + (self.low - self.high) * index / (POINTS - 1)

    def score(
        self, batch: Batch[Tensor], latents: Tensor, words: Sequence[Sequence[str]], k: Tensor, inverted: bool
    ) -> tuple[Tensor, Tensor]:
        """Return S (B,) and the reward (B,) with the first words; without words S is r, or -r if inverted."""
        assert batch.value is not None
        rows = torch.arange(len(latents), device=latents.device)
        if not self.words:
            reward = batch.value(latents, rows)
            return -reward if inverted else reward, reward
        positive_reward, negative_reward = batch.value(latents, rows, words=words)
        return relative(positive_reward, negative_reward, k), positive_reward


def relative(positive_reward: Tensor, negative_reward: Tensor, k: Tensor) -> Tensor:
    """Return S = (1 + k) positive_reward - negative_reward, (B,)."""
    return (1 + k) * positive_reward - negative_reward


def recover(path: Path, clean: Tensor, noise: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the clean latents (B, *d) recovered from a step from t to s by the known noise ``eps``.

    Args:
        path: path of the policy.
        clean: the policy's estimate of the clean latents at t.
        noise: the policy's estimate of the noise at t.
        eps: noise that was added to the sample.
        t: (B,) times at which the step starts.
        s: (B,) times at which it ends, below or above t.
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
