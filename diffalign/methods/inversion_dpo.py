r"""Inversion-DPO. Li et al. 2025, "Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models",
arXiv 2507.11554; and a variant of ours whose initial gradient is not 0.

**The released loss** (MIGHTYEZ/Inversion-DPO, train_ddim.py). The reference inverts winner and loser in N
guided DDIM steps; x_k is the state before step k, and t_k, the time to which the step leads, is the network's
time input. With w_k = 1 / (2 abar(t_k)) and mean squared errors,

    D = sum_k w_k |eps_theta(x_k, t_k) - eps_ref(x_k, t_k)|^2,
    loss = -log sigmoid( s (beta / 2) (D_w - D_l) / N ).

The code has s = +1 (``sign="released"``: winners move away from the reference and losers towards it), the
figure of the paper s = -1 (``sign="figure"``). In both cases D and its gradient are exactly 0 where the
policy equals the reference, so that training starts at a stationary point which it leaves by rounding errors
only (``target="reference"``).

**Ours** (``target="clean"``) uses the inverted states in Diffusion-DPO's loss. Diffusion-DPO (Wallace et al.
2023, arXiv 2311.12908, equations 10 to 14) needs noisy states of x0 and draws them from the forward process q
in place of the model's posterior p(x_1..T | x0). The log-ratio of a step, averaged over q(x_t-1 | x_t, x0),
is

    log p_theta(x_t-1 | x_t) - log p_ref(x_t-1 | x_t)  =  KL(q || p_ref) - KL(q || p_theta)
        =  -c_t ( |eps_theta(x_t, t) - tau|^2 - |eps_ref(x_t, t) - tau|^2 ),
    tau = (x_t - alpha_t x0) / sigma_t,

which holds for *any* x_t: q(x_t-1 | x_t, x0) is a Gaussian whose mean is linear in x_t and x0, and so in the
noise tau that the state implies. Only the distribution of x_t is an approximation. Here x_t is the
reference's deterministic inversion of x0, a state from which sampling with the reference leads to x0, instead
of a draw from q. With D = sum_k w_k ( |eps_theta - tau|^2 - |eps_ref - tau|^2 ) at the state *after* step k,
whose level is the time input t_k, and s = -1, the loss is Diffusion-DPO's on inverted states (with w_k in
place of c_t, where Diffusion-DPO has a constant). Its initial gradient is not 0, since tau depends on x0 and
the whole trajectory, eps_ref on its last state only. (With the noise of the last step as target the gradient
would be 0 again: for an exact inversion that noise is eps_ref.)

The steps k may be a random subset: D / N is then the mean over ``subset`` draws, which is unbiased. The
released code trains on all N steps with N graphs in memory, and is correct for one pair per process only;
here each group has its own draws. The weight 1 / (2 abar) of an error of the noise corresponds to 1 / 2 for v
and flow.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.inversion import (
    Inversion,
    drawn_steps,
    grid_states,
    implied_noise,
    velocity_weight,
)
from diffalign.diffusion.likelihood import PerSample, at_least_float32, regression_target
from diffalign.diffusion.noising import expand
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.losses.pairwise import LOSSES, Logistic, PairwiseLoss
from diffalign.methods._base import TIMES
from diffalign.methods._common import guided, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Noised, Random, Reduce, Step, TimeSampler


@dataclass(frozen=True)
class InversionDPO:
    """Diffusion-DPO on the reference's deterministic inversion trajectories.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are s (beta / 2) D / N.
        steps: number N of steps of the inversion's grid, at least 1.
        guidance: scale of classifier-free guidance, in the inversion and in both errors; 1 is none.
        target: target of the errors: "clean", the noise that a state implies (ours), or "reference", the
            reference's prediction (released; its initial gradient is 0).
        sign: sign s of the logit: "figure" lowers the winners' errors, "released" raises them.
        subset: number K of the N steps that a group is trained on, each drawn by ``time``; null: all.
        loss: pairwise loss of the rewards of two rivals.
        time: distribution of the K steps; time t selects step floor(t N).
        reduce: reduction of squared errors (B, *d) to units of a sample.
        cache: folder of the reference's trajectories, see ``Inversion``; null: no cache.
    """

    beta: float = 2000.0
    steps: int = 80
    guidance: float = 2.0
    target: Literal["clean", "reference"] = "clean"
    sign: Literal["figure", "released"] = "figure"
    subset: int | None = 1
    loss: PairwiseLoss = choice(LOSSES, Logistic())
    time: TimeSampler = choice(TIMES, Uniform(steps=None))
    reduce: Reduce = PerSample()
    cache: str | None = None

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.steps >= 1 and (self.subset is None or self.subset >= 1)):
            raise UserError(
                f"method.beta={self.beta}, steps={self.steps}, subset={self.subset}; allowed: more than 0, "
                "at least 1, and at least 1 or null"
            )

    def at_times(self, times: TimeSampler) -> "InversionDPO":
        """Return the method with its steps drawn by ``times``."""
        return replace(self, time=times)

    @property
    def noising(self) -> Inversion:
        """Null-text inversion by the reference: guided, on the destination grid, with offset 0."""
        return Inversion(
            self.steps, "destination", "paper", 0, guidance=self.guidance, by="reference", cache=self.cache
        )

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied."""
        k = drawn_steps(self.time, self.steps, self.subset, batch.num_groups, generator)[batch.group]
        repeated = batch.select(torch.arange(len(k)).repeat_interleave(k.shape[1]))
        denoiser, after = guided(reference, batch, self.guidance), self.target == "clean"
        x_t, t = grid_states(self.noising, denoiser, batch.x, batch.cond, k, after)
        z = Noised(repeated.x, implied_noise(policy.path, repeated.x, x_t, t), x_t, t)
        with torch.no_grad():
            reference_prediction = at_least_float32(
                guided(reference, repeated, self.guidance)(x_t, t, repeated.cond)
            )
        predicted = at_least_float32(guided(policy, repeated, self.guidance)(x_t, t, repeated.cond))
        target = regression_target(policy.target, policy, z) if after else reference_prediction
        # -D / 2 of each step, first without and then with its weight w_k
        gain = 0.5 * (
            self.reduce((reference_prediction - target) ** 2) - self.reduce((predicted - target) ** 2)
        )
        gain = (expand(velocity_weight(policy, t), gain) * gain).unflatten(0, k.shape).mean(1)
        c = contrast(gain if self.sign == "figure" else -gain, batch.score, batch.group)
        losses = pair_losses(self.loss, self.beta * c.chosen, self.beta * c.rejected, c, batch)
        return preference_step(c, losses, self.beta)


CARD = MethodCard(
    name="inversion_dpo",
    title="Inversion-DPO",
    paper="Li et al., Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models",
    year=2025,
    arxiv="2507.11554",
    data=DataKind.PAIRS,
    cost="per step trained on 2 guided policy samples with gradient and 2 guided reference samples; "
    "the inversion's, 2 guided reference samples for each of up to 80 steps, once when cached",
    method=InversionDPO,
    soft=True,
)
