"""Exchange of two sets of trained parameters if the second has the lower loss (fast-slow LoRA)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.training.state import TrainState


class Exchange:
    """Hook that exchanges two sets of parameters, with their moments and moving averages.

    The first set is evaluated and exported; after an exchange it is the better one of the last window.
    ``tally`` (3,) holds running sums of the first set's loss, the second set's loss and the number of terms;
    it is equal on all ranks and saved in checkpoints.
    """

    def __init__(self, pairs: Mapping[str, str], tally: Tensor, every: int):
        """Set the pairs of names (first set: second set), the tally and the interval in optimizer steps."""
        self._pairs, self._tally, self._every = dict(pairs), tally, every

    def on_start(self, state: TrainState) -> None:
        """Do nothing."""

    def on_step(self, state: TrainState) -> None:
        """Every ``every`` steps, exchange the sets if the second has the lower mean loss; reset the tally."""
        if state.step % self._every:
            return
        first, second, terms = self._tally.tolist()
        self._tally.zero_()
        better = terms > 0 and second < first
        if better:
            self._exchange(state)
        state.log({"fast_slow/exchanged": float(better)})

    def on_end(self, state: TrainState) -> None:
        """Do nothing."""

    @torch.no_grad()
    def _exchange(self, state: TrainState) -> None:
        parameters, moments = dict(state.parameters), state.optimizer.state
        averages = state.ema.state_dict() if state.ema is not None else {}
        for first_name, second_name in self._pairs.items():
            a, b = parameters[first_name], parameters[second_name]
            _swap(a, b)
            if averages:
                _swap(averages[first_name], averages[second_name])
            if a in moments and b in moments:
                moments[a], moments[b] = moments[b], moments[a]


def _swap(a: Tensor, b: Tensor) -> None:
    value = a.clone()
    a.copy_(b)
    b.copy_(value)
