"""Held-out diagnostics: accuracy, margin, and errors of winner and loser, by bins of time.

A preference loss hardly changes while a model improves and falls while one degrades, so it does not measure
progress. The held-out metrics do: on pairs that are not trained on, with fixed noise, they show whether the
policy prefers the winner more than the reference does, and whether by a lower error on the winner or only by
a higher one on the loser.

A bin evaluates the method with its times drawn from that bin, and records the method's metrics.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.training.context import group_of
from diffalign.training.metrics import Meter
from diffalign.training.state import TrainState
from diffalign.types import Batch, Denoiser, Method, TimeSampler
from diffalign.utils.intervals import wilson

# Fall of a winner's log-likelihood, in units of the logit, from which displacement is reported.
_NOTICEABLE = 0.05
MIN_GROUPS = 6  # with fewer groups no result is significant: the sign test's smallest p is 2^(1 - groups)


class HeldOut:
    """Hook that evaluates held-out batches every ``every`` steps (0: only at the end).

    Values are logged as ``heldout/<metric>`` over all times and ``heldout/<low>-<high>/<metric>`` for each
    bin. Batches are distributed over ranks. Draws depend on the batch and the bin only, so that evaluations
    are comparable.

    Attributes:
        history: (step, totals) of each evaluation; totals are the method's metrics over all times.
    """

    def __init__(
        self,
        batches: Sequence[Batch[Any]],
        every: int = 0,
        bins: int = 5,
        *,
        seed: int = 0,
        span: tuple[float, float] = (0.0, 1.0),
        times: Callable[[float, float], TimeSampler] = Uniform,
        method: Method[Any] | None = None,
        reference: Denoiser | None = None,
        groups: int | None = None,
    ):
        """Set the batches and the bins.

        Args:
            batches: held-out batches, equal on all ranks; the sequence may load them on access.
            every: optimizer steps between evaluations; 0: only at the end.
            bins: number of equal parts of ``span``, at least 1.
            seed: seed of noise and times.
            span: times that are evaluated, from and to.
            times: function from the two ends of a bin to the time sampler of the bin.
            method: method that is evaluated; None: the run's.
            reference: network that the policy is compared with; None: the run's reference.
            groups: number of groups of all batches; None: counted now.
        """
        if bins < 1:
            raise UserError(f"logging.diagnostics_bins={bins}; allowed: 1 or more")
        self._batches, self._every, self._seed = batches, every, seed
        # Results of a pair in different bins are correlated, so each pair counts once.
        self._groups = sum(batch.num_groups for batch in batches) if groups is None else groups
        start, end = span
        ends = [*(start + (end - start) * i / bins for i in range(bins)), end]
        self._bins = list(itertools.pairwise(ends))
        self._method, self._reference = method, reference
        self._samplers = [times(low, high) for low, high in self._bins]
        self.history: list[tuple[int, dict[str, float]]] = []

    @property
    def verdict(self) -> str:
        """One sentence that summarises the evaluations so far."""
        if not self.history:
            return "not measured: no held-out data"
        return verdict([totals for _, totals in self.history], self._groups)

    @property
    def figures(self) -> dict[str, float]:
        """The totals of the last evaluation; empty before the first."""
        return dict(self.history[-1][1]) if self.history else {}

    def on_start(self, state: TrainState) -> None:
        """Do nothing."""

    def on_step(self, state: TrainState) -> None:
        """Evaluate every ``every`` steps, and at the last step before later hooks change the reference."""
        if state.step == state.settings.steps or (self._every and state.step % self._every == 0):
            self.measure(state)

    def on_end(self, state: TrainState) -> None:
        """Evaluate at the end of a run that was not interrupted."""
        measured = self.history[-1][0] if self.history else None
        if not state.interrupted and measured != state.step:
            self.measure(state)

    def measure(self, state: TrainState) -> dict[str, float]:
        """Evaluate now, log the values, and return them (a collective operation)."""
        if not len(self._batches):
            return {}
        rank, ranks = group_of(state.settings, state.accelerator)
        measuring = self._method or state.method
        methods = [measuring.at_times(sampler) for sampler in self._samplers]
        labels = [f"{low:.2g}-{high:.2g}" for low, high in self._bins]
        meters = [Meter(state.accelerator.device) for _ in labels]
        for round_ in range(0, len(self._batches), ranks):
            # All ranks call the network equally often, as a sharded network needs; a rank without a batch in
            # the last round evaluates the last batch again and ignores the result.
            index = min(round_ + rank, len(self._batches) - 1)
            is_own = round_ + rank < len(self._batches)
            batch = self._batches[index]
            on_device = batch.to(state.accelerator.device)
            for method, label, meter in zip(methods, labels, meters, strict=True):
                streams = Streams.at(self._seed, index << 32, batch.num_groups, f"heldout {label}")
                with state.evaluating(averaged=False):
                    step = method(state.policy, self._reference or state.reference, on_device, streams)
                if is_own:
                    meter.add({"loss": step.loss, **step.metrics}, step.weight)
        totals_meter = Meter(state.accelerator.device)
        for label, meter in zip(labels, meters, strict=True):
            totals_meter.merge(meter)
            totals_meter.merge(meter, prefix=f"{label}/")
        values = totals_meter.averages(state.accelerator)
        self.history.append((state.step, {name: v for name, v in values.items() if not name[0].isdigit()}))
        values = {f"heldout/{name}": value for name, value in values.items()}
        state.log(values)
        return values


def verdict(history: Sequence[Mapping[str, float]], groups: int) -> str:
    """Return one sentence that summarises held-out totals.

    Args:
        history: totals of each evaluation, oldest first, with the metrics ``rewards/accuracies``,
            ``errors/chosen``, ``errors/rejected`` if the method has them.
        groups: number of comparisons of an accuracy; Wilson's 95 % interval decides significance.
    """
    last = history[-1]
    if "rewards/accuracies" not in last:
        if "loss" not in last:
            return "not measured: every held-out group is a tie"
        trend = last["loss"] - history[0]["loss"]
        if len(history) == 1 or not trend:
            return f"held-out loss {last['loss']:.4g}: nothing to compare it with yet"
        change = "fell" if trend < 0 else "rose"
        return f"held-out loss {change} from {history[0]['loss']:.4g} to {last['loss']:.4g}"
    # two standard errors of the accuracy at chance level
    noise = 1.0 / math.sqrt(max(1, groups))
    accuracy, best = last["rewards/accuracies"], max(h.get("rewards/accuracies", 0.0) for h in history)
    chosen, rejected = last.get("errors/chosen", 0.0), last.get("errors/rejected", 0.0)
    summary = f"held-out accuracy {accuracy:.3f}"
    if groups < MIN_GROUPS:
        return f"too few held-out pairs to tell ({groups}; needed: {MIN_GROUPS}): {summary}"
    share = wilson(min(1.0, max(0.0, accuracy)) * groups, groups)
    if share.high < 0.5:
        return f"learning the opposite: {summary} is below chance; are the labels flipped?"
    if best - accuracy > 2 * noise:
        return f"overfitting: {summary} has fallen from {best:.3f}; stop earlier or lower the learning rate"
    if share.low <= 0.5:
        return (
            f"no signal yet: {summary}, 95 % interval {share.low:.3f} to {share.high:.3f} on {groups} pairs"
        )
    change = f"winner error {chosen:+.3g}, loser error {rejected:+.3g} against the reference"
    displaced = last.get("rewards/chosen", 0.0) < -_NOTICEABLE
    if displaced and chosen > 0 and rejected > 0 and 2 * chosen > rejected - chosen:
        return (
            f"learning, with displacement: {summary}; {change}. Both errors rise: if images lose "
            "quality, lower the learning rate or raise beta"
        )
    return f"learning: {summary}, {change}"
