"""Held-out accuracy by time: how often the better image of a pair scores higher, ties of labels left out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffalign.diffusion.randomness import Streams
from diffalign.losses.contrast import pairs_of
from diffalign.runs.reward.method import TOKENS, StepAwareTraining, Timed
from diffalign.training.acceleration import Accelerator
from diffalign.training.metrics import Meter
from diffalign.training.state import TrainState
from diffalign.types import Batch, Denoiser


class AccuracyByTime:
    """The hook that measures the accuracy every ``every`` steps (0: only at the end), with averaged weights
    if there are any.

    Time 0 is the finished image; elsewhere it is the one-step estimate, with the same noise at each
    measurement. Batches are divided among the ranks.

    Attributes:
        history: (step, accuracy by time) of each measurement.
    """

    def __init__(
        self,
        method: StepAwareTraining,
        reference: Denoiser,
        batches: Sequence[Batch[Tensor]],
        times: Sequence[float],
        every: int = 0,
        seed: int = 0,
    ):
        self._method, self._reference = method, reference
        self._batches, self._times = list(batches), times
        self._every, self._seed = every, seed
        self.history: list[tuple[int, dict[str, float]]] = []

    def on_start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def on_step(self, state: TrainState) -> None:
        """Measure when it is due."""
        if state.step == state.settings.steps or (self._every and state.step % self._every == 0):
            self._record(state)

    def on_end(self, state: TrainState) -> None:
        """Measure the end of a run that was not interrupted."""
        if not state.interrupted and (not self.history or self.history[-1][0] != state.step):
            self._record(state)

    def _record(self, state: TrainState) -> None:
        policy: object = state.policy
        assert isinstance(policy, Timed)
        with state.evaluating():
            values = self.measure(policy, state.accelerator)
        self.history.append((state.step, values))
        state.log({f"heldout/accuracy/{time}": value for time, value in values.items()})

    @torch.no_grad()
    def measure(self, policy: Timed, accelerator: Accelerator) -> dict[str, float]:
        """Return accuracy by time ("0.25"); equal scores count half. A collective: all ranks must call it."""
        meter = Meter(accelerator.device)
        unwrapped = Timed(policy.clip.model, policy.clip)  # ranks may hold different numbers of batches
        for index in range(accelerator.process_index, len(self._batches), accelerator.num_processes):
            batch = self._batches[index].to(accelerator.device)
            for time in self._times:
                streams = Streams.at(self._seed, index << 32, batch.num_groups, f"heldout {time}")
                right, weight = self._right(unwrapped, batch, time, streams)
                meter.add({f"{time:g}": right}, weight)
        return meter.averages(accelerator)

    def _right(
        self, policy: Timed, batch: Batch[Tensor], time: float, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """Return the share of right answers in a batch, and the number of answers."""
        t = torch.full((len(batch.group),), time, device=batch.x.device, dtype=batch.x.dtype)
        method = self._method
        pixels = method.estimates(self._reference, batch, t, streams) if time else method.finished(batch)
        scores = policy(pixels, t, batch.cond[TOKENS], batch.group)
        first, second = (index.to(scores.device) for index in pairs_of(batch.group))
        label = method.label(batch.score[first], batch.score[second])
        lead = scores[first] - scores[second]
        right = label * (lead > 0) + (1 - label) * (lead < 0) + 0.5 * (lead == 0)
        counted = (label != 0.5).to(right)
        return (right * counted).sum() / counted.sum().clamp(min=1), counted.sum()


def table(before: Mapping[str, float], after: Mapping[str, float], pairs: int) -> list[str]:
    """Return lines with the accuracies before and after training."""
    lines = [f"held-out accuracy over {pairs} pairs, by time:", "  t      before  after"]
    return lines + [f"  {time:<5}  {before[time]:.3f}   {after[time]:.3f}" for time in before]
