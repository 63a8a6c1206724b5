"""Bank of reference predictions: a pair has K draws of noise, with one reference call for each.

With fresh noise the reference is called at every visit of a pair, one forward beside the policy's forward and
backward. Here a pair has a bank of K draws of (time, noise, flip, prompt dropout) from the same distribution,
and each visit picks one of them at random. Given the bank, the expected loss of a step is the mean over its
draws, an unbiased estimate of the loss with fresh noise. A draw is determined by (seed, pair, number of the
draw), so a resumed run uses the same draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.types import Cond
from diffalign.utils.transfer import sent

NAME = "reference_bank"
"""Name of the condition, (B,) int64, with each sample's draw (``sample_name``); networks do not read it."""

_RIVALS = 2**10


def sample_name(draw: int, rival: int) -> int:
    """Return the id of a sample from the draw of its group and its position in the group."""
    return draw * _RIVALS + rival


@dataclass(frozen=True, eq=False)
class Banked(Wrapper):
    """A reference that is called once for each draw of a bank; for batches without a bank, at every call.

    Attributes:
        denoiser: the reference.
        predictions: predictions in host memory by (sample id, time), each with the sum over its noisy state.
    """

    predictions: dict[tuple[int, float], tuple[Tensor, float]] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the predictions of the batch, (B, *d).

        Raises:
            UserError: the noisy state of a draw differs from that of the first call.
        """
        if NAME not in cond:
            return self.denoiser(x_t, t, cond)
        sums = x_t.detach().flatten(1).double().sum(1)
        names, times, states = torch.stack([cond[NAME].to(sums), t.to(sums), sums]).tolist()
        keys = [(int(name), time) for name, time in zip(names, times, strict=True)]
        missing = [i for i, key in enumerate(keys) if key not in self.predictions]
        self._predict(missing, keys, states, x_t, t, cond)
        for key, state in zip(keys, states, strict=True):
            if abs(self.predictions[key][1] - state) > 1e-3 * (1 + abs(state)):
                raise UserError(
                    "data.reference_bank: the method calls its reference on different noisy states of one "
                    "draw; allowed with it: data.reference_bank 0"
                )
        return sent(torch.stack([self.predictions[key][0] for key in keys]), x_t.device)

    def _predict(
        self,
        rows: Sequence[int],
        keys: Sequence[tuple[int, float]],
        states: Sequence[float],
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
    ) -> None:
        """Call the reference on ``rows`` of the batch and store its predictions."""
        if not rows:
            return
        index = torch.tensor(rows, device=x_t.device)
        row_cond = {name: value[index.to(value.device)] for name, value in cond.items()}
        computed = self.denoiser(x_t[index], t[index.to(t.device)], row_cond).detach().cpu()
        for row, prediction in zip(rows, computed.unbind(), strict=True):
            self.predictions[keys[row]] = (prediction.clone(), states[row])
