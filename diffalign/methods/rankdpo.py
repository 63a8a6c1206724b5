"""RankDPO. Karthik et al. 2024, "Scalable Ranked Preference Optimization for Text-to-Image Generation", arXiv
2410.18013.

Equations 5 to 7: for a list of K images with scores phi in [0, 1] (fractions of wins), one time per prompt
and one noise per image, with s_i = m_i - r_i the difference of the policy's and the reference's errors,

    loss = -sum over pairs (i better than j) of W_ij log sigmoid( -(beta / 2) (s_i - s_j) ),
    W_ij = |G_i - G_j| |1 / D_i - 1 / D_j|,   G = 2^phi - 1,   D = log(1 + tau), tau the rank by phi.

The loss is a sum over a list's pairs and a mean over lists. The paper has no factor 1/2 and does not state
its beta B: B with errors averaged over the D latent elements is ``beta: 2 B`` here, with summed errors
``beta: 2 D B``. The printed discount has a natural logarithm; ``log_base: 2`` is DCG's. Equal scores have
weight 0, and so has a list of ties. There is no public code.

``pipelines/make_ranked_lists.py`` is the paper's data path, Syn-Pic.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.noising import Forward
from diffalign.errors import UserError
from diffalign.losses.contrast import pairs_of
from diffalign.losses.listwise import dcg_weights
from diffalign.methods._base import NOISINGS, PairMethod
from diffalign.methods._common import ScoreRange, compare, preference_metrics
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Noising, Random, Step
from diffalign.utils.transfer import sent


@dataclass(frozen=True, kw_only=True)
class RankDPO(PairMethod):
    """Ranked lists, with pairs weighted by the change of the gain if they are swapped.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        log_base: base of the discount's logarithm, above 1.
        noising: map from clean latents to noisy states; each image has its own noise.
    """

    beta: float = 5000.0
    log_base: float = math.e
    noising: Noising = choice(NOISINGS, Forward(shared=False))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.log_base > 1:
            raise UserError(f"method.log_base={self.log_base}; allowed: more than 1")

    @property
    def score_range(self) -> ScoreRange:
        """Scores phi must be in [0, 1]."""
        advice = "shares of won comparisons (data.rewards_as wins), or scores divided by their range"
        return ScoreRange(0.0, 1.0, rewards=False, tolerated=0.0, advice=advice)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean over lists of the weighted sum over their pairs."""
        c = compare(self, policy, reference, batch, generator)
        # W_ij (equations 5 to 7), times l(beta (reward_i - reward_j)), summed over the pairs of a list
        weights = dcg_weights(batch.score, batch.group, c.better, c.worse, self.log_base).to(c.chosen)
        losses = weights * self.loss(self.beta * c.chosen, self.beta * c.rejected)
        lists = sent(batch.group[pairs_of(batch.group)[0]], c.weight.device)
        pairs = c.weight.new_zeros(batch.num_groups, *c.weight.shape[1:]).index_add(0, lists, c.weight)
        count = (pairs > 0).to(c.weight).sum()
        loss = (losses * c.weight).sum() / count.clamp(min=1)
        return Step(loss, {"loss": loss.detach(), **preference_metrics(c, self.beta)}, count)


CARD = MethodCard(
    name="rankdpo",
    title="RankDPO",
    paper="Karthik et al., Scalable Ranked Preference Optimization for Text-to-Image Generation",
    year=2024,
    arxiv="2410.18013",
    data=DataKind.LISTS,
    cost="K policy samples with gradient, K reference samples, for lists of K",
    method=RankDPO,
)
