"""Two sets of trained parameters that exchange places when the second does better (fast-slow LoRA)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.training.state import TrainState


class Exchange:
    """The hook that exchanges two sets of parameters, with their moments and moving averages.

    The first set is the one that is measured and exported, so it is always the better one of the last window.
    ``tally`` (3,) holds running sums of the first's loss, the second's loss and their terms; it must be the
    same on every rank and travels in the checkpoint.
    """

    def __init__(self, pairs: Mapping[str, str], tally: Tensor, every: int):
        """Name the parameters of the first set, and for each its fellow in the second."""
        self._pairs, self._tally, self._every = dict(pairs), tally, every

    def on_start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def on_step(self, state: TrainState) -> None:
        """Compare when it is due: exchange where the second set has had the lower mean loss."""
        if state.step % self._every:
            return
        first, second, terms = self._tally.tolist()
        self._tally.zero_()
        better = terms > 0 and second < first
        if better:
            self._exchange(state)
        state.log({"fast_slow/exchanged": float(better)})

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""

    @torch.no_grad()
    def _exchange(self, state: TrainState) -> None:
        parameters, moments = dict(state.parameters), state.optimizer.state
        averages = state.ema.state_dict() if state.ema is not None else {}
        for one, other in self._pairs.items():
            a, b = parameters[one], parameters[other]
            _swap(a, b)
            if averages:
                _swap(averages[one], averages[other])
            if a in moments and b in moments:
                moments[a], moments[b] = moments[b], moments[a]


def _swap(a: Tensor, b: Tensor) -> None:
    held = a.clone()
    a.copy_(b)
    b.copy_(held)
