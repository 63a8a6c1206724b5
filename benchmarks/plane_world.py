"""Make one row of the plane: align, sample base and aligned model from the same noise, compare by point.

The settings are those of ``diffalign/plane/settings.py``. "Prompts" are starting points. The primary reward
is the height; for preferences between captions it is prompt fidelity, on a base trained with wrong labels.
"""

import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.counting import Calls, counted
from benchmarks.record import lock
from diffalign.diffusion.randomness import Streams
from diffalign.evaluation.measuring.statistics import bootstrap_mean
from diffalign.methods._common import compare
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.plane.data import Maker, captions, preferences
from diffalign.plane.plane import (
    LABELS,
    Plane,
    PlaneNetwork,
    align,
    data_batch,
    denoiser_of,
    measure,
    points,
    pretrain,
)
from diffalign.plane.settings import PlaneRow
from diffalign.types import Batch
from diffalign.utils.files import open_atomic

PLANE = Plane()
NOISE = 7  # seed of the starting points
PAIR = PlaneRow(DPO())
# Diffusion-DPO's cost: 2 trained samples (3 each) and 2 held ones (1 each)
BUDGET = PAIR.steps * PAIR.groups * 8.0
ONLINE_BUDGET = 2 * BUDGET  # includes the cost of sampling


@lru_cache
def base(mislabelled: bool = False, flow: bool = False) -> PlaneNetwork:
    """Return a base model, which is trained once and stored under ``runs/``.

    ``mislabelled`` selects the one with a quarter of its labels wrong, ``flow`` that of the flow version.
    """
    name = "flow" if flow else "mislabelled" if mislabelled else "base"
    path = record.WORK / f"plane-{name}.pt"
    with lock(path.stem):
        if not path.exists():
            network = _mislabelled() if mislabelled else pretrain(PLANE, flow=flow)
            with open_atomic(path) as file:
                torch.save(network.state_dict(), file)
    network = PlaneNetwork(flow=flow)
    network.load_state_dict(torch.load(path))
    return network


def _mislabelled() -> PlaneNetwork:
    wrong = data_batch(PLANE, 60_000, seed=1, mislabelled=0.25)
    return align(SFT(), base(), wrong, steps=300, groups=512, rate=1e-3)


@lru_cache(maxsize=64)
def drawn(maker: Maker, seed: int) -> Batch[Tensor]:
    """Return the data of one seed, shared by all methods with this maker."""
    return maker(PLANE, denoiser_of(base()), seed=seed)


@lru_cache(maxsize=4)
def start(mislabelled: bool, count: int, flow: bool = False) -> Tensor:
    """Return samples (labels, count, 2) of a base."""
    return points(denoiser_of(base(flow=True) if flow else base(mislabelled)), count, NOISE)


def base_of(row: PlaneRow) -> PlaneNetwork:
    """Return the base model of a row."""
    return base(flow=True) if row.flow else base(row.data is captions)


def cost(row: PlaneRow, data: Batch[Tensor] | None) -> Calls:
    """Return the network calls of one step; for an online row, the mean over a round."""
    start_from = base_of(row)  # outside the count, since the first call trains it
    steps = row.round_steps
    with counted(PlaneNetwork) as calls:
        row.trained(start_from, data, steps=steps)
    return calls.per(steps)


def settings_of(row: PlaneRow, prompts: int, steps: int | None = None) -> dict[str, Any]:
    """Return the settings that identify a row."""
    return {
        "method": row.method,
        "data": row.data.__name__,
        "groups": row.groups,
        "rate": row.rate,
        "prompts": prompts,
        "steps": steps,
        "budget": None if steps else budget(row),
        **({"rollout": row.rollout} if row.rollout else {}),
    }


def budget(row: PlaneRow) -> float:
    """Return the budget of a row in forward-equivalents."""
    return ONLINE_BUDGET if row.rollout else BUDGET


def train(row: PlaneRow, seed: int, steps: int | None = None) -> tuple[PlaneNetwork, dict[str, Any]]:
    """Return a network trained for ``steps`` (None: the budget's), and the figures of its cost."""
    data = None if row.rollout else drawn(row.data, seed)
    calls = cost(row, data)
    steps = steps or max(1, round(budget(row) / calls.cost))
    begin = time.process_time()
    network = row.trained(base_of(row), data, seed, steps=steps)
    took = {
        "steps": steps,
        "seconds": round(time.process_time() - begin, 2),
        "calls": vars(calls),
        "compute": calls.cost * steps,
    }
    return network, took


def run(row: PlaneRow, seed: int, prompts: int, steps: int | None = None) -> dict[str, Any]:
    """Train and measure on ``prompts`` starting points, equally many a label."""
    network, took = train(row, seed, steps)
    about_captions = row.data is captions
    before = start(about_captions, prompts // LABELS, row.flow)
    after = points(denoiser_of(network), prompts // LABELS, NOISE)
    rewards = {
        "height": tuple(PLANE.reward(x.flatten(0, 1)) for x in (before, after)),
        "fidelity": tuple(_right(x) for x in (before, after)),
    }
    primary = "fidelity" if about_captions else "height"
    end = measure(PLANE, denoiser_of(network))
    return {
        "primary": primary,
        "rewards": {name: compared(*pair) for name, pair in rewards.items()},
        "gains": [round(v, 2) for v in (rewards[primary][1] - rewards[primary][0]).tolist()],
        "figures": {
            "off support": round(end.off_support, 4),
            "distance": round(end.distance, 4),
            **row.sampled(took["steps"]),
        },
        **took,
    }


def drift(row: PlaneRow, seed: int, pairs: int, steps: int | None = None) -> dict[str, Any]:
    """Train, then measure how much denoising errors of held-out winners and losers exceed the reference's.

    Values are per pair, in thousandths; pairs, times and noise are the same for every method.
    """
    network, took = train(row, seed, steps)
    batch = preferences(PLANE, denoiser_of(base()), count=pairs, seed=1000)
    with torch.no_grad():
        c = compare(DPO(), denoiser_of(network), denoiser_of(base()), batch, Streams.at(NOISE, 0, pairs))
    rises = {
        name: [round(-2000 * v, 2) for v in getattr(c, name).tolist()] for name in ("chosen", "rejected")
    }
    return {"rises": rises, **took}


def _right(x: Tensor) -> Tensor:
    """Return 1 where a sample of "left" or "right" (labels 1 and 2 of (3, N, 2)) is on its side, else 0."""
    return torch.cat([x[1, :, 0] < 0, x[2, :, 0] > 0]).float()


def compared(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return the means of paired scores, and the gain with its 95 % interval (bootstrap over points)."""
    gain = bootstrap_mean((after - before).numpy())
    return {
        "base": before.mean().item(),
        "aligned": after.mean().item(),
        "gain": [gain.value, gain.low, gain.high],
    }
