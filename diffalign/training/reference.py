"""The reference follows the policy in steps (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

Every ``every`` optimizer steps reference = (1 - mix) reference + mix policy: their hard update at mix 1,
their soft one below. A mix that changes with the step makes a policy that trails. What is mixed are the
trained tensors; under LoRA these are the factors A and B, so that a soft update mixes factors and not their
product. The reference's tensors travel in the checkpoints.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.training.sharding import local
from diffalign.training.state import TrainState


class RefreshReference:
    """The hook that moves the reference; it stands before the one that saves checkpoints.

    Every rank holds the same policy, so every rank moves its own reference to the same place.
    """

    def __init__(
        self, reference: Mapping[str, Tensor], every: int, mix: float | Callable[[int], float] = 1.0
    ):
        """Name the tensors.

        Args:
            reference: the reference's tensors by the names of the trained parameters that they follow.
            every: optimizer steps between updates.
            mix: share of the policy, more than 0; or that after a given optimizer step.
        """
        if every < 1:
            raise UserError(f"training.reference_every={every}; allowed here: 1 or more")
        if not callable(mix) and not 0 < mix <= 1:
            raise UserError(f"training.reference_mix={mix}; allowed: more than 0, up to 1")
        self._reference, self._every, self._mix = dict(reference), every, mix

    def of(self, reference: Mapping[str, Tensor]) -> "RefreshReference":
        """Return the hook that moves other tensors of the same names in the same way."""
        return RefreshReference(reference, self._every, self._mix)

    def on_start(self, state: TrainState) -> None:
        """Check that the reference has the tensors that are trained.

        Raises:
            ValueError: other names.
        """
        odd = self._reference.keys() ^ dict(state.parameters).keys()
        if odd:
            raise ValueError(f"reference and policy differ in {len(odd)} tensors, first {min(odd)!r}")

    def on_step(self, state: TrainState) -> None:
        """Move the reference when it is due."""
        if state.step % self._every == 0:
            self.refresh(state)

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""

    @torch.no_grad()
    def refresh(self, state: TrainState) -> None:
        """Move the reference now."""
        mix = self._mix(state.step) if callable(self._mix) else self._mix
        for name, parameter in state.parameters:
            held, new = local(self._reference[name]), local(parameter.detach())
            held.copy_(new if mix == 1 else held.to(new).lerp_(new, mix))
