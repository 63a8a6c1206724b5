"""Diff-Instruct. Luo et al. 2023, "Diff-Instruct: A Universal Approach for Transferring Knowledge From
Pre-trained Diffusion Models", arXiv 2305.18455.

Score distillation: the student's samples x are moved so that their density approaches the teacher's at every
noise level (the integral KL divergence, equation 3.3):

    student:   mean( sg( eps_T(x_t) - eps_A(x_t) ) x ),      x_t = alpha x + sigma eps
    assistant: | eps - eps_A( alpha sg(x) + sigma eps ) |^2

T is the frozen base, with ``guidance`` if the student shall work without guidance, and A an assistant that is
fitted to the student's density. It is the baseline of Distillation-DPO, and DMD (arXiv 2311.18828) without
its regression loss.

Differences from the released code: the student has the sampling steps of the run (there one), and gradients
pass through the ``last`` of them; the weight over noise levels is that of a difference of predicted noises;
student and assistant make one optimizer step each, together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import normal
from diffalign.losses.distillation import along_scores
from diffalign.methods._distillation import Distillation, assistant_of, noise_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class DiffInstruct(Distillation):
    """Distil the scores of the base into a student of few steps."""

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the losses of student and assistant, summed, of B samples from noise ``batch.x`` (B, *d)."""
        assistant, teacher = assistant_of(policy, "assistant"), self.teacher(reference, batch)
        learns = self.learns()
        x = self.sampled(policy, batch, learns)
        with torch.no_grad():
            t = self.times(policy, x, generator)
            eps = sent(normal(generator, len(x), x.shape[1:]), x)
            x_t = add_noise(policy, x.detach(), eps, t)
            teacher_noise, assistant_noise = (noise_of(d, x_t, t, batch.cond) for d in (teacher, assistant))
        student = along_scores(x, teacher_noise, assistant_noise).mean()
        error = self.assistant_errors(assistant, x, batch.cond, generator).mean()
        metrics = {
            "distillation/student": student.detach(),
            "distillation/assistant": error.detach(),
            "distillation/distance": (teacher_noise - assistant_noise).square().mean(),
        }
        loss = student + error if learns else error
        return Step(loss, metrics, x.new_full((), len(x), dtype=torch.float32))


CARD = MethodCard(
    name="diff_instruct",
    title="Diff-Instruct",
    paper="Luo et al., Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained "
    "Diffusion Models",
    year=2023,
    arxiv="2305.18455",
    data=DataKind.TEACHER,
    cost="a sample: T student steps, K of them with gradient; 1 teacher sample, 1 of the assistant without "
    "gradient and 1 with",
    method=DiffInstruct,
    rollout="distillation",
    assistants=("assistant",),
)
