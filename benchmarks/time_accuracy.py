"""Accuracy on held-out pairs of the plane by time: how often policy against reference prefers the winner.

The quantity is that of a run's held-out diagnostics (``heldout/LOW-HIGH/rewards/accuracies``): the share of
pairs whose winner's log-ratio is above the loser's, at times drawn from a bin. Labels are Bradley-Terry
draws, so that even the true heights agree with only a part of them.
"""

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import plane_world
from benchmarks.record import over_seeds
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Uniform
from diffalign.methods._common import compare
from diffalign.methods.dpo import DPO
from diffalign.plane.data import preferences
from diffalign.plane.plane import denoiser_of
from diffalign.plane.settings import PLANE_METHODS
from diffalign.types import Batch

METHODS = ("dpo", "ipo", "mapo", "kto", "inpo", "sft")
BINS, PAIRS, SEEDS, HELD_OUT_SEED = 5, 1500, 3, 1000


def held_out(pairs: int = PAIRS) -> Batch[torch.Tensor]:
    """Return pairs of the base that no row is trained on."""
    base = denoiser_of(plane_world.base())
    return preferences(plane_world.PLANE, base, count=pairs, seed=HELD_OUT_SEED)


def bins() -> list[tuple[float, float]]:
    """Return the ends of each bin of time."""
    return [(i / BINS, (i + 1) / BINS) for i in range(BINS)]


def right(method: str, seed: int, batch: Batch[torch.Tensor]) -> list[list[float]]:
    """Train a row; return for each bin of time and held-out pair 1 where the winner is preferred, else 0."""
    row = PLANE_METHODS[method]
    network = row.trained(plane_world.base(), plane_world.drawn(row.data, seed), seed)
    policy, reference = denoiser_of(network), denoiser_of(plane_world.base())
    found = []
    with torch.no_grad():
        for low, high in bins():
            streams = Streams.at(plane_world.NOISE, 0, batch.num_groups)
            c = compare(DPO(time=Uniform(low=low, high=high)), policy, reference, batch, streams)
            found.append((c.margin > 0).float().tolist())
    return found


def ceiling(batch: Batch[torch.Tensor]) -> float:
    """Return the share of labels with which the true heights agree."""
    height, score = (values.reshape(-1, 2) for values in (batch.extra["reward"], batch.score))
    return float((height.argmax(1) == score.argmax(1)).float().mean())


def figure(methods: Sequence[str] = METHODS, pairs: int = PAIRS, seeds: int = SEEDS) -> Figure:
    """Plot the accuracy of each method by time, with 95 % intervals over pairs and seeds."""
    batch = held_out(pairs)
    drawn, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    middles = [(low + high) / 2 for low, high in bins()]
    for number, method in enumerate(methods):
        of_seeds = [right(method, seed, batch) for seed in range(seeds)]
        means = [over_seeds([tables[i] for tables in of_seeds]) for i in range(BINS)]
        at = [middle + 0.012 * (number - (len(methods) - 1) / 2) for middle in middles]
        spread = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
        axis.errorbar(at, [m.value for m in means], spread, fmt="o-", ms=3, lw=1, label=method)
    axis.axhline(0.5, color="0.7", lw=1, zorder=0)
    axis.axhline(ceiling(batch), color="0.4", lw=1, ls=":", zorder=0, label="the true heights")
    axis.set(xlabel="time (0 data, 1 noise)", ylabel="accuracy on held-out pairs", xlim=(0, 1))
    axis.legend(frameon=False, fontsize=7, ncols=2)
    return drawn
