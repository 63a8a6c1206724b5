"""Updates of the reference towards the policy (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

Every ``every`` optimizer steps reference = (1 - mix) reference + mix policy: the paper's hard update at mix
1, its soft update below. With a mix that depends on the step it is a moving average of the policy. The
trained tensors are mixed; with LoRA these are the factors A and B, so that a soft update mixes factors, not
their product. Checkpoints contain the reference's tensors.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.training.sharding import local
from diffalign.training.state import TrainState


class RefreshReference:
    """Hook that updates the reference; it must come before the hook that saves checkpoints.

    The policy is equal on all ranks, so each rank updates its own copy of the reference.
    """

    def __init__(
        self, reference: Mapping[str, Tensor], every: int, mix: float | Callable[[int], float] = 1.0
    ):
        """Set the tensors and the schedule.

        Args:
            reference: the reference's tensors by the names of the corresponding trained parameters.
            every: optimizer steps between updates, at least 1.
            mix: weight of the policy, in (0, 1], or a function from the optimizer step to it.
        """
        if every < 1:
            raise UserError(f"training.reference_every={every}; allowed here: 1 or more")
        if not callable(mix) and not 0 < mix <= 1:
            raise UserError(f"training.reference_mix={mix}; allowed: more than 0, up to 1")
        self._reference, self._every, self._mix = dict(reference), every, mix

    def of(self, reference: Mapping[str, Tensor]) -> "RefreshReference":
        """Return a hook with the same schedule for other tensors of the same names."""
        return RefreshReference(reference, self._every, self._mix)

    def on_start(self, state: TrainState) -> None:
        """Check that reference and policy have tensors of the same names.

        Raises:
            ValueError: the names differ.
        """
        differing = self._reference.keys() ^ dict(state.parameters).keys()
        if differing:
            raise ValueError(
                f"reference and policy differ in {len(differing)} tensors, first {min(differing)!r}"
            )

    def on_step(self, state: TrainState) -> None:
        """Update the reference every ``every`` steps."""
        if state.step % self._every == 0:
            self.refresh(state)

    def on_end(self, state: TrainState) -> None:
        """Do nothing."""

    @torch.no_grad()
    def refresh(self, state: TrainState) -> None:
        """Update the reference now."""
        mix = self._mix(state.step) if callable(self._mix) else self._mix
        for name, parameter in state.parameters:
            target, new = local(self._reference[name]), local(parameter.detach())
            target.copy_(new if mix == 1 else target.to(new).lerp_(new, mix))
