"""Exponential moving average of the trained parameters, in float32.

After each applied step, average = decay * average + (1 - decay) * parameter, starting from the initial
parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.training.sharding import local, placed_like


class Ema:
    """A moving average of named parameters."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], decay: float):
        if not 0.0 < decay < 1.0:
            raise UserError(
                f"training.ema_decay={decay}; allowed: 0 (no moving average), or above 0 and below 1"
            )
        self.decay = decay
        self._parameters = dict(parameters)
        self._average = {name: p.detach().float().clone() for name, p in parameters}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current parameters."""
        new = [local(p.detach()).float() for p in self._parameters.values()]
        torch._foreach_lerp_([local(average) for average in self._average.values()], new, 1.0 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the parameters hold the average, for validation and for saving."""
        trained = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(trained)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by name, in float32."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the average from a checkpoint."""
        for name, average in self._average.items():
            average.copy_(placed_like(state[name], average))

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
