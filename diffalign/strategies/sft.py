"""SFT mix: add the winners' denoising loss, so that the errors of winners and losers do not both rise.

JavisDiT++ adds 0.1 times the winners' error to Diffusion-DPO, SimpleTuner has it as ``sft_loss_weight``, and
Reg-DPO (arXiv 2511.01450) uses such a term for video:

    loss = method + weight * mean |p_w - target|^2.

The noisy states, times and predictions are those of the method, so the term costs no network call. Where the
method never calls the policy on the batch's own samples, the term costs one policy sample per group.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import denoising_error
from diffalign.errors import UserError
from diffalign.methods._common import OverStates, noisy
from diffalign.strategies._common import (
    Recording,
    Wrapped,
    best,
    innermost,
    mean_where,
    overall,
    readable,
    residual,
    with_term,
)
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Denoiser, Method, Random, Step


@dataclass(frozen=True)
class SFTMix:
    """Add the winners' denoising loss.

    Attributes:
        weight: weight of the SFT term, above 0. At initialisation the gradient of Diffusion-DPO is about
            beta / 4 times that of an error, so 0.1 is small beside beta 1000.
    """

    weight: float = 0.1

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(f"sft.weight={self.weight}; allowed: more than 0")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with the SFT term added.

        Raises:
            UserError: the method's targets cannot be computed from its noisy states.
        """
        return Wrapped(readable(method, "sft"), self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the method's loss plus the SFT term; metric ``sft`` is the term.

        Raises:
            UserError: the method has no noisy states of clean latents.
        """
        calls = Recording(policy)
        step = method(calls, reference, batch, generator)
        index, certain = best(batch)
        residuals = [residual(policy, batch.x, c.x_t, c.t, c.prediction)[index] for c in calls.of(batch)]
        if residuals:
            errors = torch.stack([overall(method.reduce(r**2)) for r in residuals]).mean(0)
        else:
            inner = innermost(method)
            if not isinstance(inner, OverStates):
                raise UserError(
                    f"strategy sft: {type(inner).__name__} neither calls the policy on the batch's own "
                    "samples nor has a `time` and a `noising`; allowed: methods that do"
                )
            winners = batch.select(index)
            z = noisy(inner, policy, reference, winners, generator)
            errors = overall(denoising_error(policy, z, winners.cond, method.reduce))
        term = mean_where(errors, certain)
        return with_term(step, "sft", term, self.weight)


CARD = StrategyCard(
    name="sft",
    title="SFT mix",
    paper="JavisDiT++ and SimpleTuner (released code); the loss is Ho et al. 2020's",
    year=2025,
    arxiv="",
    composes="pairs, lists and likes",
    cost="nothing; 1 policy sample where the method never calls the policy on the batch",
    strategy=SFTMix,
)
