"""DiffusionOPD, on-policy distillation. arXiv 2605.15055 (2026; with UniRL's and verl-omni's code, the
official code was not at hand).

The student draws its own trajectories and a frozen teacher says, at each state that they passed, where it
would have gone. With mu_S and mu_T the means of both steps from a state, S the step's std and l its length,
the loss of a recorded step is a mean over the latent elements of

    ode    (mu_S - mu_T)^2 / 2              on ODE steps l^2 |v_S - v_T|^2 / 2: long steps count more
    kl     (mu_S - mu_T)^2 / (2 S^2)        the KL of the two steps
    verl   (mu_S - mu_T)^2 l / (2 S^2)      verl-omni's: its std leaves out the step's length

States are constants: no gradient flows through the rollout. There is no reward; ``rollout.rewards`` are
watched only. With ``rollout.eta: 0`` the trajectories are the ODE's and every step is learnt from, in form
"ode".

``rollout.teachers`` names the teachers: LoRAs, runs or pipelines of the student's family, one for all
prompts, or one for each file of prompts (``ocr.txt=runs/ocr``), so that a student learns from several of
them at once. Each answers under ``rollout.reference_guidance``, and its answers are recorded in the
rollout. What differs from UniRL's recipe: a batch may mix the prompts of several teachers.
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
    """Steps of the student's own trajectories, drawn towards a teacher's.

    Attributes:
        form: what the squared difference of two steps is divided by, see the module.
        hold_negative: no gradient through what guidance guides away from.
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
            UserError: the batch is not of a rollout with a teacher, or the form divides by what its steps
                do not have.
        """
        kernel, x = kernel_of(batch, CARD), batch.x
        if "reference_mean" not in batch.extra:
            raise UserError(
                "method diffusion_opd learns from a teacher's steps, and this batch has none; allowed with "
                "it: rounds that were sampled for this method"
            )
        mean, std = kernel(as_drawn(policy, batch, self.hold_negative), x.x_t, x.t, x.s, batch.cond)
        mean, taught = at_least_float32(mean), at_least_float32(batch.extra["reference_mean"].to(mean))
        squared = (mean - taught) ** 2
        losses = (squared / self._scale(kernel, std, x).to(squared)).flatten(1).mean(1) / 2
        loss = losses.mean()
        metrics = {"loss": loss, "distance": squared.mean().sqrt()}
        return Step(
            loss, {name: v.detach() for name, v in metrics.items()}, loss.new_tensor(float(len(losses)))
        )

    def _scale(self, kernel: Kernel, std: torch.Tensor, x: Transition) -> torch.Tensor:
        """Return what a squared difference is divided by, beside 2, (B, 1, ...)."""
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
    paper="DiffusionOPD: on-policy distillation of diffusion models",
    year=2026,
    arxiv="2605.15055",
    data=DataKind.TEACHER,
    cost="a step: 1 policy sample with gradient, 1 of the teacher, in the rollout; twice that guided",
    method=DiffusionOPD,
    rollout="trajectories",
    taught=True,
)
