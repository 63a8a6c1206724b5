"""SmPO-Diffusion. Lu et al. 2025, "Smoothed Preference Optimization via ReNoise Inversion for Aligning
Diffusion Models with Varied Human Preferences", arXiv 2506.02698.

A reward model smooths the label of a pair: with its scores r of winner and loser rescaled to [0, 1] by the
published extremes of PickScore on Pick-a-Pic,

    p = exp(r_w) / (exp(r_w) + exp(r_l)),    r = (score - low) / (high - low).

The smoothed likelihood p~(w) ~ p(w)^a p(l)^(gamma - a) with a / gamma = p multiplies DPO's logit by 2 a -
gamma. With m the policy's and r the reference's mean squared error on inverted states (as in InPO)

    loss = -log sigmoid( -(beta / 2) gamma (2 p - 1) [(m_w - r_w) - (m_l - r_l)] ).

The winner is the sample that the reward model prefers, so 2 p - 1 is never negative. The human label
determines only which pairs are tied and have weight 0; pairs with equal rewards have a constant loss of log
2, as released.

As released (JaydenLyh/SmPO, train.py): the policy inverts in 5 grid steps, each averaged with one ReNoise
iteration at the same time input, without added noise. The paper's text has 9 steps. Scores are PickScore's
cosine, without its logit scale. The released code is correct for one pair per process only.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config.build import choice
from diffalign.diffusion.inversion import Inversion
from diffalign.diffusion.likelihood import elbo
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.methods._base import NOISINGS, ScaledMethod
from diffalign.methods._common import ScoreRange, noisy, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Noising, Random, Step


@dataclass(frozen=True, kw_only=True)
class SmPO(ScaledMethod):
    """Diffusion-DPO with labels smoothed by rewards, on inverted states.

    Scores are the batch's ``extra["reward"]`` (B,); without it, its ``score``.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        gamma: factor of the logit of a certain preference, above 0.
        low: smallest score of the reward model; the default is that of PickScore's cosine.
        high: largest score of the reward model, above ``low``.
        noising: DDIM inversion that maps clean latents to noisy states.
    """

    beta: float = 2000.0
    gamma: float = 10.0
    low: float = 0.11543526500463486
    high: float = 0.28201571106910706
    noising: Noising = choice(NOISINGS, Inversion(steps=5, mode="paper", renoise=1))

    extras: ClassVar[frozenset[str]] = frozenset({"reward"})

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.gamma > 0 and self.high > self.low):
            raise UserError(
                f"method.beta={self.beta}, gamma={self.gamma}, low={self.low}, high={self.high}; allowed: "
                "beta and gamma more than 0, high more than low"
            )

    @property
    def score_range(self) -> ScoreRange:
        """The range from ``low`` to ``high``, extended by its length on both sides."""
        span = self.high - self.low
        advice = (
            "a reward in data.rewards (online: rollout.rewards) whose extremes are method.low and "
            "method.high; the defaults are those of PickScore's cosine, the reward pickscore:scale=1"
        )
        return ScoreRange(self.low - span, self.high + span, rewards=True, tolerated=0.01, advice=advice)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs that are not tied by the human label.

        Raises:
            UserError: ``extra["reward"]`` holds several scores per sample.
        """
        reward = batch.extra.get("reward", batch.score)
        if reward.shape != batch.score.shape:
            raise UserError(
                f"extra['reward'] of shape {tuple(reward.shape)}; allowed: one score per sample, "
                f"{tuple(batch.score.shape)}"
            )
        ll = elbo(
            policy, reference, noisy(self, policy, reference, batch, generator), batch.cond, self.reduce
        )
        human = contrast(ll.log_ratio, batch.score, batch.group)
        c = replace(contrast(ll.log_ratio, reward, batch.group), weight=human.weight)
        # gamma (2 p - 1), with p = sigmoid of the difference of rescaled rewards
        smoothed = self.gamma * (2 * torch.sigmoid(c.gap / (self.high - self.low)) - 1)
        return preference_step(c, -logsigmoid(self.beta * smoothed * c.margin), self.beta)


CARD = MethodCard(
    name="smpo",
    title="SmPO-Diffusion",
    paper="Lu et al., Smoothed Preference Optimization via ReNoise Inversion",
    year=2025,
    arxiv="2506.02698",
    data=DataKind.SCORED_PAIRS,
    cost="2 policy samples with gradient, 2 reference samples, 4 per inversion step without (about 4 steps)",
    method=SmPO,
)
