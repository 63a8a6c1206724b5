"""DiffusionOPD. Li et al. 2026, "DiffusionOPD: A Unified Perspective of On-Policy Distillation in Diffusion
Models", arXiv 2605.15055 (after UniRL's and verl-omni's code; the official code was not available).

The student samples its own trajectories, and a frozen teacher makes a step from each of their states. With
mu_S and mu_T the means of the student's and the teacher's step from a state, S the step's std and l its
length, the loss of a recorded step is a mean over the latent elements of

    ode    (mu_S - mu_T)^2 / 2              on ODE steps l^2 |v_S - v_T|^2 / 2: long steps count more
    kl     (mu_S - mu_T)^2 / (2 S^2)        the KL of the two steps
    verl   (mu_S - mu_T)^2 l / (2 S^2)      verl-omni's: its std leaves out the step's length

States are constants: no gradient passes through the rollout. There is no reward; ``rollout.rewards`` are
logged only. With ``rollout.eta: 0`` the trajectories are those of the ODE, and all steps are trained on with
form "ode".

``rollout.teachers`` names the teachers: LoRAs, runs or pipelines of the student's family, one for all
prompts, or one for each file of prompts (``ocr.txt=runs/ocr``), so that a student can have several. The
teachers have guidance scale ``rollout.reference_guidance``, and the means of their steps are recorded in the
rollout. Difference from UniRL's recipe: a batch may mix the prompts of several teachers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.noising import expand
from diffalign.diffusion.samplers import FlowSDE
from diffalign.errors import UserError
from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import as_drawn, kernel_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Kernel, Random, Step, Transition


@dataclass(frozen=True)
class DiffusionOPD(RolloutMethod):
    """Distil a teacher's steps from the states of the student's own trajectories.

    Attributes:
        form: scale of the squared difference of two steps, see the module.
        hold_negative: whether to stop the gradient through the negative prediction of guidance.
    """

    form: Literal["ode", "kl", "verl"] = "ode"
    hold_negative: bool = True

    needs_reference: ClassVar[bool] = True

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Transition],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the mean loss over all recorded steps; the teacher's steps are those that were recorded.

        Raises:
            UserError: the batch is not of a rollout with a teacher, or the form needs a std of the steps that
                is 0.
        """
        kernel, x = kernel_of(batch, CARD), batch.x
        if "reference_mean" not in batch.extra:
            raise UserError(
                "method diffusion_opd is trained on a teacher's steps, and this batch has none; allowed with "
                "it: rounds that were sampled for this method"
            )
        mean, std = kernel(as_drawn(policy, batch, self.hold_negative), x.x_t, x.t, x.s, batch.cond)
        mean, teacher_mean = at_least_float32(mean), at_least_float32(batch.extra["reference_mean"].to(mean))
        squared = (mean - teacher_mean) ** 2
        losses = (squared / self._scale(kernel, std, x).to(squared)).flatten(1).mean(1) / 2
        loss = losses.mean()
        metrics = {"loss": loss, "distance": squared.mean().sqrt()}
        return Step(loss, {name: v.detach() for name, v in metrics.items()}, loss.new_full((), len(losses)))

    def _scale(self, kernel: Kernel, std: torch.Tensor, x: Transition) -> torch.Tensor:
        """Return the divisor (B, 1, ...) of a squared difference, without the factor 2."""
        if self.form == "ode":
            return torch.ones_like(std)
        if not bool((std > 0).all()):
            raise UserError(
                f"method.form={self.form!r} divides by the std of steps, and some have none; allowed: ode, "
                "or rollout.eta above 0"
            )
        if self.form == "kl":
            return std**2
        if not isinstance(kernel, FlowSDE):
            raise UserError("method.form='verl' is of the noisy steps of a flow; allowed: kl, ode")
        return std**2 / expand(kernel.length(x.t, x.s), std)


CARD = MethodCard(
    name="diffusion_opd",
    title="DiffusionOPD",
    paper="Li et al., DiffusionOPD: A Unified Perspective of On-Policy Distillation in Diffusion Models",
    year=2026,
    arxiv="2605.15055",
    data=DataKind.TEACHER,
    cost="a step: 1 policy sample with gradient, 1 of the teacher, in the rollout; twice that guided",
    method=DiffusionOPD,
    rollout="trajectories",
    taught=True,
)
