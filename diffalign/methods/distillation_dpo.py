"""Distillation-DPO. Zhao et al. 2025, "Diffusion Distillation With Direct Preference Optimization For
Efficient 3D LiDAR Scene Completion", arXiv 2504.11447.

A teacher of many steps is distilled into a student of few steps, with a preference that need not be
differentiable: of two samples of one condition the better is x_w, the worse x_l. Two assistants are fitted to
their densities, B to that of winners, W to that of losers. With one time and one noise for both samples,

    student:    mean( sg(eps_T - eps_B) x_w ) - c mean( sg(eps_T - eps_W) x_l )
    assistants: | eps - eps_B( alpha sg(x_w) + sigma eps ) |^2, and the same of W on x_l,

with separate times and noises for the assistants. Winners move towards the teacher and losers away from it.
Ties have weight 0.

The released loss multiplies the detached difference by x_t - x, the noise alone, in place of x: its gradient
to the student is exactly 0. The loss here has x, as intended; the tests' golden vectors have both.

``assistants: crossed`` (ours) compares each sample with the other side's assistant: eps_W for x_w, eps_B for
x_l. With the published rule and exact assistants, the mean motion of samples at a point where a sample wins
with probability p, for a student of density q, is along

    (2 p - 1) grad log(teacher / q) - 2 grad p,

whose second term opposes the preference. With crossed assistants it is + (p / (1 - p) + (1 - p) / p) grad p.
The 2-D plane shows both.

Further differences from the released code: noise is added as alpha x + sigma eps (there, for point clouds, x
+ sigma eps); the two samples have independent noises (there, and with ``scale: 1.1``, the second starts from
the first one's noise times 1.1); student and assistants make one optimizer step each, together, on the same
samples (there they alternate); the optimizer is the run's (there SGD with rate 1e-5 and norms clipped at
0.05, which is the only bound of the losers' term).
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
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class DistillationDPO(Distillation):
    """Distil scores with winners moved towards the teacher and losers away from it.

    Attributes:
        losers: weight c of the losers' term, at least 0.
        assistants: assistant that a sample is compared with: its own side's ("own", as published), or that of
            the other side ("crossed").
        scale: factor from the first sample's noise to the second one's, above 0; null: independent noises.
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
        """Return the losses of student and assistants, summed, of P pairs from noise ``batch.x`` (2P, *d)."""
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
        compared = [better, worse] if self.assistants == "own" else [worse, better]
        with torch.no_grad():
            t = self.times(policy, samples[0], generator)
            eps = sent(normal(generator, len(t), x.shape[1:]), x)
        terms, distances = [], []
        for side, sample, assistant in zip(sides, samples, compared, strict=True):
            with torch.no_grad():
                x_t = add_noise(policy, sample.detach(), eps, t)
                teacher_noise = noise_of(self.teacher(reference, side), x_t, t, side.cond)
                assistant_noise = noise_of(assistant, x_t, t, side.cond)
            terms.append(along_scores(sample, teacher_noise, assistant_noise))
            distances.append((teacher_noise - assistant_noise).square().flatten(1).mean(1))
        # mean(sg(eps_T - eps_B) x_w) - c mean(sg(eps_T - eps_W) x_l)
        student = pairs.mean(terms[0] - self.losers * terms[1])
        errors = [
            pairs.mean(self.assistant_errors(assistant, sample, side.cond, generator))
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
        """Return the batch with the noise of each pair's second sample computed from the first one's."""
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
