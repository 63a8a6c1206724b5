"""The reference's predictions kept: each pair is noised in a few ways only, and each way is asked about once.

With fresh noise the reference is asked at every visit of a pair: a forward beside the policy's forward and
backward. Here a pair has a bank of K draws of (time, noise, flip, prompt dropout), of the same law, one of
which is taken at random at each visit. Given the bank, a step's expected loss is the mean over its draws,
which is unbiased for the loss with fresh noise, as every draw is one of fresh noise. The draws follow from
(seed, pair, number of the draw), so that a resumed run has the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.types import Cond

NAME = "reference_bank"
"""Condition, (B,) int64, that names each sample's draw: ``sample_name``; networks do not read it."""

_RIVALS = 2**10


def sample_name(draw: int, rival: int) -> int:
    """Return the number of a sample: of the draw of its group, and of its place in it."""
    return draw * _RIVALS + rival


@dataclass(frozen=True, eq=False)
class Banked(Wrapper):
    """A reference that is asked once about each draw of a bank; of batches without one, every time.

    Attributes:
        kept: predictions in main memory by (name of the sample, time), each with the sum of its noisy state.
    """

    kept: dict[tuple[int, float], tuple[Tensor, float]] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the prediction for all B, (B, *d).

        Raises:
            UserError: the state of a draw is another than when it was first asked about.
        """
        if NAME not in cond:
            return self.denoiser(x_t, t, cond)
        sums = x_t.detach().flatten(1).double().sum(1)
        names, times, states = torch.stack([cond[NAME].to(sums), t.to(sums), sums]).tolist()
        keys = [(int(name), time) for name, time in zip(names, times, strict=True)]
        self._ask([i for i, key in enumerate(keys) if key not in self.kept], keys, states, x_t, t, cond)
        for key, state in zip(keys, states, strict=True):
            if abs(self.kept[key][1] - state) > 1e-3 * (1 + abs(state)):
                raise UserError(
                    "data.reference_bank: the method asks its reference about other states of the same draw; "
                    "allowed with it: data.reference_bank 0"
                )
        return torch.stack([self.kept[key][0] for key in keys]).to(x_t.device)

    def _ask(
        self,
        rows: Sequence[int],
        keys: Sequence[tuple[int, float]],
        states: Sequence[float],
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
    ) -> None:
        """Ask the reference about some rows, and keep what it says."""
        if not rows:
            return
        index = torch.tensor(rows, device=x_t.device)
        some = {name: value[index.to(value.device)] for name, value in cond.items()}
        found = self.denoiser(x_t[index], t[index.to(t.device)], some).detach().cpu()
        for row, prediction in zip(rows, found.unbind(), strict=True):
            self.kept[keys[row]] = (prediction.clone(), states[row])
