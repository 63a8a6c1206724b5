"""Models of the plane, trained once, and its data sets, drawn once; what is set here ends here.

Shapes are checked in a short run of every row, that of seed 0. Bases, data, measurements and the other runs
repeat the same calls, where checks take up to half of the time: they are off there (``unchecked``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jaxtyping
import pytest
import torch

from diffalign.methods.sft import SFT
from diffalign.plane.plane import (
    Plane,
    PlaneNetwork,
    PlaneResult,
    align,
    data_batch,
    denoiser_of,
    measure,
    pretrain,
)
from diffalign.plane.rows import PlaneRow

PLANE = Plane()
POINTS = 2400  # measured; the standard error of a mean reward is 0.018
FEW_STEPS = (
    6  # of a run with checked shapes: enough for a second round, and for what happens every five steps
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take a ``seed`` with as many as ``--plane-seeds`` says."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--plane-seeds")))


@contextmanager
def unchecked() -> Iterator[None]:
    """Switch the checks of shapes off for calls that repeat checked ones."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def figures(network: PlaneNetwork, steps: int = 50, count: int = POINTS) -> PlaneResult:
    """Measure a network by so many points, sampled in so many steps."""
    with unchecked():
        return measure(PLANE, denoiser_of(network), count, steps=steps)


def after(row: PlaneRow, start: PlaneNetwork, data: Any, seed: int = 0) -> PlaneResult:
    """Train a row from ``start`` on what ``data(maker, seed)`` gives, and measure the result."""
    batch = None if row.rollout else data(row.data, seed)
    if seed == 0:
        row.trained(start, batch, seed, steps=FEW_STEPS)
    with unchecked():
        trained = row.trained(start, batch, seed)
    return figures(trained, row.sampling)


def after_flipped(row: PlaneRow, start: PlaneNetwork, data: Any, at_least: int) -> PlaneResult:
    """Train a row with flipped labels, and measure the result.

    Only the direction is tested: half the steps are enough, ``at_least`` so many or all that the row has, and
    so are fewer points, sampled in fewer steps.
    """
    steps = max(row.steps // 2, min(row.steps, at_least))
    with unchecked():
        batch = None if row.rollout else data(row.data, 0, True)
        trained = row.trained(start, batch, flipped=True, steps=steps)
    return figures(trained, steps=20, count=POINTS // 2)


@pytest.fixture(scope="package")
def one_thread():
    """Run on one thread: a network this small is slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def base(one_thread):
    with unchecked():
        return pretrain(PLANE)


@pytest.fixture(scope="package")
def flow_base(one_thread):
    with unchecked():
        return pretrain(PLANE, steps=2000, flow=True)


def misled(base):
    """Train a base that saw a quarter of the halves' points under the wrong label."""
    wrong = data_batch(PLANE, 60_000, seed=1, mislabelled=0.25)
    with unchecked():
        return align(SFT(), base, wrong, steps=300, groups=512, rate=1e-3)


@pytest.fixture(scope="package")
def mislabelled(base):
    return misled(base)


@pytest.fixture(scope="package")
def flow_mislabelled(flow_base):
    return misled(flow_base)


@pytest.fixture(scope="package")
def measured(one_thread):
    """Measure a base once."""
    return lru_cache(figures)


def drawn_from(base):
    """(maker, seed, flipped) -> Batch, drawn from the base once."""

    @lru_cache
    def data(maker, seed, flipped=False):
        with unchecked():
            return maker(PLANE, denoiser_of(base), seed=seed, flipped=flipped)

    return data


@pytest.fixture(scope="package")
def data(base):
    return drawn_from(base)


@pytest.fixture(scope="package")
def flow_data(flow_base):
    return drawn_from(flow_base)
