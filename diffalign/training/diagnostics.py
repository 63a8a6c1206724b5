"""Does it work? Held-out accuracy and margin, and error drift of winner and loser, by timestep bin.

A preference loss hardly moves while a model learns, and falls while one breaks, so users cannot read it.
These numbers they can: on pairs never trained on, with fixed noise, does the policy prefer the winner more
than the reference does, and does it do so by fitting the winner better or only by fitting the loser worse?

A bin is the method itself with its times drawn from that bin; what it measures are the method's own metrics.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.training.metrics import Meter
from diffalign.training.state import TrainState
from diffalign.types import Batch, Denoiser, Method, TimeSampler
from diffalign.utils.intervals import wilson

# A winner that has lost less log-likelihood than this, in units of the logit, has not been pushed away.
_NOTICEABLE = 0.05
MIN_GROUPS = 6  # of fewer comparisons even a clean sweep tells nothing: the sign test's p is 2^(1 - groups)


class HeldOut:
    """The hook that measures held-out batches every ``every`` steps (0: only at the end).

    Values are logged as ``heldout/<metric>`` over all times and ``heldout/<low>-<high>/<metric>`` for each
    bin. Batches are shared out over ranks; draws depend on the batch and the bin only, so evaluations
    compare.

    Attributes:
        history: (step, totals) of each evaluation, totals named as the method names them.
    """

    def __init__(
        self,
        batches: Sequence[Batch[Any]],
        every: int = 0,
        bins: int = 5,
        *,
        seed: int = 0,
        times: Callable[[float, float], TimeSampler] = Uniform,
        method: Method[Any] | None = None,
        reference: Denoiser | None = None,
        groups: int | None = None,
    ):
        """Keep the sequence, which may make its batches when they are needed.

        Args:
            batches: held-out batches, the same list on every rank.
            every: optimizer steps between evaluations.
            bins: how many equal parts of [0, 1].
            seed: of noise and times.
            times: the sampler of the times of one bin, given its two ends.
            method: the method that measures; None: the run's own.
            reference: what the policy is compared with; None: the run's own.
            groups: in all batches; None: they are counted now.
        """
        if bins < 1:
            raise UserError(f"logging.diagnostics_bins={bins}; allowed: 1 or more")
        self._batches, self._every, self._seed = batches, every, seed
        # A pair's answers in different bins go together, so each pair counts once.
        self._groups = sum(batch.num_groups for batch in batches) if groups is None else groups
        self._bins = [(i / bins, (i + 1) / bins) for i in range(bins)]
        self._method, self._reference = method, reference
        self._samplers = [times(low, high) for low, high in self._bins]
        self.history: list[tuple[int, dict[str, float]]] = []

    @property
    def verdict(self) -> str:
        """The evaluations so far in plain language."""
        if not self.history:
            return "not measured: no held-out data"
        return verdict([totals for _, totals in self.history], self._groups)

    @property
    def figures(self) -> dict[str, float]:
        """The totals of the last evaluation; empty before the first."""
        return dict(self.history[-1][1]) if self.history else {}

    def on_start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def on_step(self, state: TrainState) -> None:
        """Measure when it is due, and at the last step before later hooks move anything (a reference)."""
        if state.step == state.settings.steps or (self._every and state.step % self._every == 0):
            self.measure(state)

    def on_end(self, state: TrainState) -> None:
        """Measure the end of a run that was not interrupted."""
        measured = self.history[-1][0] if self.history else None
        if not state.interrupted and measured != state.step:
            self.measure(state)

    def measure(self, state: TrainState) -> dict[str, float]:
        """Evaluate now, log the values, and return them. A collective."""
        if not len(self._batches):
            return {}
        ranks, rank = state.accelerator.num_processes, state.accelerator.process_index
        measuring = self._method or state.method
        methods = [measuring.at_times(sampler) for sampler in self._samplers]
        labels = [f"{low:.2g}-{high:.2g}" for low, high in self._bins]
        meters = [Meter(state.accelerator.device) for _ in labels]
        for round_ in range(0, len(self._batches), ranks):
            # Every rank asks the network equally often, as one that is spread over them needs; a rank without
            # a batch of its own in the last round measures the last one again and counts nothing.
            index = min(round_ + rank, len(self._batches) - 1)
            counted = round_ + rank < len(self._batches)
            batch = self._batches[index]
            here = batch.to(state.accelerator.device)
            for method, label, meter in zip(methods, labels, meters, strict=True):
                streams = Streams.at(self._seed, index << 32, batch.num_groups, f"heldout {label}")
                with state.evaluating(averaged=False):
                    step = method(state.policy, self._reference or state.reference, here, streams)
                if counted:
                    meter.add({"loss": step.loss, **step.metrics}, step.weight)
        everything = Meter(state.accelerator.device)
        for label, meter in zip(labels, meters, strict=True):
            everything.merge(meter)
            everything.merge(meter, prefix=f"{label}/")
        values = everything.averages(state.accelerator)
        self.history.append((state.step, {name: v for name, v in values.items() if not name[0].isdigit()}))
        values = {f"heldout/{name}": value for name, value in values.items()}
        state.log(values)
        return values


def verdict(history: Sequence[Mapping[str, float]], groups: int) -> str:
    """Return what held-out totals say, in one sentence.

    Args:
        history: totals of each evaluation in order, with the metrics ``rewards/accuracies``,
            ``errors/chosen``, ``errors/rejected`` where the method has them.
        groups: how many comparisons an accuracy is over; Wilson's 95 % interval decides what is signal.
    """
    last = history[-1]
    if "rewards/accuracies" not in last:
        if "loss" not in last:
            return "not measured: every held-out group is a tie"
        trend = last["loss"] - history[0]["loss"]
        if len(history) == 1 or not trend:
            return f"held-out loss {last['loss']:.4g}: nothing to compare it with yet"
        moved = "fell" if trend < 0 else "rose"
        return f"held-out loss {moved} from {history[0]['loss']:.4g} to {last['loss']:.4g}"
    noise = 1.0 / math.sqrt(
        max(1, groups)
    )  # two standard errors of a fair coin's mean: a fall beyond is no chance
    accuracy, best = last["rewards/accuracies"], max(h.get("rewards/accuracies", 0.0) for h in history)
    chosen, rejected = last.get("errors/chosen", 0.0), last.get("errors/rejected", 0.0)
    held = f"held-out accuracy {accuracy:.3f}"
    if groups < MIN_GROUPS:
        return f"too few held-out pairs to tell ({groups}; needed: {MIN_GROUPS}): {held}"
    share = wilson(min(1.0, max(0.0, accuracy)) * groups, groups)
    if share.high < 0.5:
        return f"learning the opposite: {held} is below chance; are the labels flipped?"
    if best - accuracy > 2 * noise:
        return f"overfitting: {held} has fallen from {best:.3f}; stop earlier or lower the learning rate"
    if share.low <= 0.5:
        return f"no signal yet: {held}, 95 % interval {share.low:.3f} to {share.high:.3f} on {groups} pairs"
    moved = f"winner error {chosen:+.3g}, loser error {rejected:+.3g} against the reference"
    lost = last.get("rewards/chosen", 0.0) < -_NOTICEABLE
    if lost and chosen > 0 and rejected > 0 and 2 * chosen > rejected - chosen:
        return (
            f"learning, with displacement: {held}; {moved}. Both errors rise: if images lose "
            "quality, lower the learning rate or raise beta"
        )
    return f"learning: {held}, {moved}"
