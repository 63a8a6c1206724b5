"""SFT mix: the denoising loss of the winners beside the method's own, against the drift of both errors.

JavisDiT++ adds 0.1 times the winners' error to Diffusion-DPO, SimpleTuner calls it ``sft_loss_weight``, and
Reg-DPO (arXiv 2511.01450) has such a term for video:

    loss = method + weight * mean |p_w - target|^2.

The states, times and predictions are the ones that the method has made, so it costs no further forward;
only of a method that never asks the policy about the batch's own samples does it ask anew, one policy sample
a group.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import denoising_error
from diffalign.errors import UserError
from diffalign.methods._common import OverStates, noisy
from diffalign.strategies._common import (
    Listening,
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
        weight: of the term. A method's gradient at the start is about beta / 4 of an error's, so 0.1 is a
            light touch beside beta 1000.
    """

    weight: float = 0.1

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(f"sft.weight={self.weight}; allowed: more than 0")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with the term added.

        Raises:
            UserError: its targets cannot be read off its noisy states.
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
        """Return the sum of both losses; ``sft`` is the term alone."""
        heard = Listening(policy)
        step = method(heard, reference, batch, generator)
        index, told = best(batch)
        heard_of = [residual(policy, batch.x, c.x_t, c.t, c.prediction)[index] for c in heard.of(batch)]
        if heard_of:
            errors = torch.stack([overall(method.reduce(r**2)) for r in heard_of]).mean(0)
        else:
            inner = innermost(method)
            if not isinstance(inner, OverStates):
                raise UserError(
                    f"strategy sft: {type(inner).__name__} neither calls the policy on the batch's own "
                    "samples nor has a `time` and a `noising`; allowed: methods that do"
                )
            won = batch.select(index)
            z = noisy(inner, policy, reference, won, generator)
            errors = overall(denoising_error(policy, z, won.cond, method.reduce))
        term = mean_where(errors, told)
        return with_term(step, "sft", term, self.weight)


CARD = StrategyCard(
    name="sft",
    title="SFT mix",
    paper="JavisDiT++ and SimpleTuner (released code); the loss is Ho et al. 2020's",
    year=2025,
    arxiv="",
    composes="pairs, lists and likes",
    cost="nothing; 1 policy sample where the method never asks about the batch itself",
    strategy=SFTMix,
)
