"""Models of the plane, trained once, and its data sets, drawn once; what is set here ends here."""

from functools import lru_cache

import pytest
import torch

from diffalign.methods.sft import SFT
from diffalign.plane.plane import Plane, align, data_batch, denoiser_of, measure, pretrain

PLANE = Plane()


@pytest.fixture(scope="package")
def one_thread():
    """Run on one thread: a network this small is slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def base(one_thread):
    return pretrain(PLANE)


@pytest.fixture(scope="package")
def flow_base(one_thread):
    return pretrain(PLANE, steps=2000, flow=True)


def misled(base):
    """Train a base that saw a quarter of the halves' points under the wrong label."""
    wrong = data_batch(PLANE, 60_000, seed=1, mislabelled=0.25)
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
    return lru_cache(lambda network: measure(PLANE, denoiser_of(network), count=2400))


def drawn_from(base):
    """(maker, seed, flipped) -> Batch, drawn from the base once."""
    return lru_cache(
        lambda maker, seed, flipped=False: maker(PLANE, denoiser_of(base), seed=seed, flipped=flipped)
    )


@pytest.fixture(scope="package")
def data(base):
    return drawn_from(base)


@pytest.fixture(scope="package")
def flow_data(flow_base):
    return drawn_from(flow_base)
