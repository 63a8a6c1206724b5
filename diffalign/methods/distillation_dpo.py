"""Distillation-DPO. Zhao et al. 2025, "Diffusion Distillation With Direct Preference Optimization For
Efficient 3D LiDAR Scene Completion", arXiv 2504.11447.

A teacher of many steps is distilled into a student of few, and a preference that need not be differentiable
takes part: of two samples of one condition the better is x_w, the worse x_l, and each side has an assistant
(B of winners, W of losers) that follows its density. With one time and one noise for both,

    student:    mean( sg(eps_T - eps_B) x_w ) - c mean( sg(eps_T - eps_W) x_l )
    assistants: | eps - eps_B( alpha sg(x_w) + sigma eps ) |^2, and the same of W on x_l,

times and noises of the assistants their own. So winners are drawn towards the teacher and losers pushed away
from it. Samples of a tie teach nothing.

The released loss multiplies the detached difference by x_t - x, the noise alone, in place of x: its gradient
to the student is exactly 0. This is the intended one, with x; both are in the tests' golden vectors.

``assistants: crossed`` (ours) holds each sample against the other side's assistant: eps_W for x_w, eps_B for
x_l. With the published rule and assistants that know their densities exactly, the mean motion of samples at
a place where a sample wins with probability p, from a student of density q, is along

    (2 p - 1) grad log(teacher / q) - 2 grad p,

against the preference: a winner that its own assistant is subtracted from loses what made it win. Crossed,
the second term is + (p / (1 - p) + (1 - p) / p) grad p. The plane shows both (docs/methods).

What differs from the released code besides: noise is added as alpha x + sigma eps (theirs, of point clouds,
is x + sigma eps); both samples have noises of their own (``scale: 1.1`` is theirs: the second starts from the
first one's noise times 1.1); student and assistants take one step each, together, on the same samples (theirs
alternate); the optimizer is the run's (SGD with rate 1e-5 and norms clipped at 0.05 there, which alone bounds
the losers' term).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import normal
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.losses.distillation import along_scores
from diffalign.methods._base import check_positive
from diffalign.methods._distillation import Distillation, assistant_of, noise_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True)
class DistillationDPO(Distillation):
    """Score distillation that draws winners to the teacher and pushes losers away.

    Attributes:
        losers: c, weight of the losers' term.
        assistants: which assistant a sample is held against: its own side's, as published, or the other's.
        scale: of the second sample's noise, which is then the first one's times this; null: its own noise.
    """

    losers: float = 1.0
    assistants: Literal["own", "crossed"] = "own"
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.losers < 0:
            raise UserError(f"method.losers={self.losers}; allowed: 0 or more")
        if self.assistants not in ("own", "crossed"):
            raise UserError(f"method.assistants={self.assistants!r}; allowed: own, crossed")
        if self.scale is not None:
            check_positive(self, "scale")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the losses of student and assistants over P pairs of ``batch.x`` noise (2P, *d)."""
        better, worse = (assistant_of(policy, name) for name in ("better", "worse"))
        batch = self._scaled(batch)
        learns = self.learns()
        x = self.sampled(policy, batch, learns)
        assert batch.value is not None
        with torch.no_grad():
            scores = batch.value(x.detach(), torch.arange(len(x), device=x.device))
        pairs = contrast(scores, scores, batch.group)
        sides = [batch.select(index) for index in (pairs.better, pairs.worse)]
        samples = [x[index] for index in (pairs.better, pairs.worse)]
        held = [better, worse] if self.assistants == "own" else [worse, better]
        with torch.no_grad():
            t = self.times(policy, samples[0], generator)
            eps = normal(generator, len(t), x.shape[1:]).to(x)
        terms, distances = [], []
        for side, sample, assistant in zip(sides, samples, held, strict=True):
            with torch.no_grad():
                x_t = add_noise(policy, sample.detach(), eps, t)
                goal = noise_of(self.teacher(reference, side), x_t, t, side.cond)
                own = noise_of(assistant, x_t, t, side.cond)
            terms.append(along_scores(sample, goal, own))
            distances.append((goal - own).square().flatten(1).mean(1))
        student = pairs.mean(terms[0] - self.losers * terms[1])
        errors = [
            pairs.mean(self.followed(assistant, sample, side.cond, generator))
            for side, sample, assistant in zip(sides, samples, (better, worse), strict=True)
        ]
        metrics = {
            "reward": scores.float().mean(),
            "rewards/margins": pairs.mean(pairs.gap),
            "distillation/student": student.detach(),
            "distillation/better": errors[0].detach(),
            "distillation/worse": errors[1].detach(),
            "distillation/distance": pairs.mean(distances[0]),
        }
        loss = errors[0] + errors[1]
        return Step(loss + student if learns else loss, metrics, pairs.count)

    def _scaled(self, batch: Batch[Tensor]) -> Batch[Tensor]:
        """Return the batch with the noise of the second sample of each pair made of the first one's."""
        if self.scale is None:
            return batch
        x = batch.x.reshape(batch.num_groups, 2, *batch.x.shape[1:])
        return replace(batch, x=torch.stack([x[:, 0], self.scale * x[:, 0]], 1).flatten(0, 1))


CARD = MethodCard(
    name="distillation_dpo",
    title="Distillation-DPO",
    paper="Zhao et al., Diffusion Distillation With Direct Preference Optimization For Efficient 3D LiDAR "
    "Scene Completion",
    year=2025,
    arxiv="2504.11447",
    data=DataKind.TEACHER_AND_REWARD,
    cost="a sample: T student steps, K of them with gradient; 1 teacher sample, 1 of an assistant without "
    "gradient and 1 with",
    method=DistillationDPO,
    rollout="distillation",
    assistants=("better", "worse"),
)
