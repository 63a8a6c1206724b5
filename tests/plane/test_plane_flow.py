"""Every method on the flow version of the plane: reward up on the support, down with flipped labels.

The methods of the noise schedule keep their settings of the plane but for what ``tests/plane/flow.py`` says.
"""

import pytest

from diffalign.diffusion.likelihood import at_least_float32
from diffalign.plane.data import captions
from diffalign.plane.plane import denoiser_of, points
from diffalign.plane.settings import PLANE_METHODS
from tests.plane.conftest import after, after_flipped
from tests.plane.flow import FLOW_CHANGES, FLOW_METHODS

ROWS = {**FLOW_METHODS, **{name: row for name, row in PLANE_METHODS.items() if row.flow}}


@pytest.fixture
def case(request, flow_base, flow_mislabelled, measured):
    """(row, its base, the base's figure of what must rise, its name)."""
    row = ROWS[request.param]
    start = flow_mislabelled if row.data is captions else flow_base
    what = "fidelity" if row.data is captions else "reward"
    return row, start, getattr(measured(start), what), what


every_row = pytest.mark.parametrize("case", ROWS, indirect=True)
every_row_that_falls = pytest.mark.parametrize(
    "case", [name for name, row in ROWS.items() if row.falls], indirect=True
)


def test_every_method_has_a_row():
    assert set(ROWS) == set(PLANE_METHODS) and set(FLOW_CHANGES) <= set(FLOW_METHODS)


def test_the_base_is_the_data(flow_base, measured):
    got = measured(flow_base)
    assert abs(got.reward) < 0.1 and got.off_support < 0.03 and got.distance < 0.12 and got.fidelity > 0.97
    assert denoiser_of(flow_base).target == "flow"


def test_a_flow_needs_few_steps(flow_base):
    """Ten Euler steps are nearly where fifty are: paths are nearly straight."""
    few, many = (points(denoiser_of(flow_base), 300, seed=5, steps=n) for n in (10, 50))
    assert (at_least_float32(few) - many).norm(dim=-1).median() < 0.1


@every_row
def test_a_method_raises_the_reward_on_the_support(case, seed, flow_data):
    row, start, before, what = case
    got = after(row, start, flow_data, seed)
    assert getattr(got, what) > before + row.gain
    assert got.off_support < 0.03
    assert got.distance < 0.13 or not row.optimum


@every_row_that_falls
def test_flipped_labels_lower_the_reward(case, flow_data):
    row, start, before, what = case
    assert getattr(after_flipped(row, start, flow_data, at_least=80), what) < before - row.gain
