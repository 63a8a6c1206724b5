"""Methods that differentiate a reward: two processes equal one with all their prompts."""

import pytest
import torch

from tests.helpers import in_two_processes
from tests.methods.gradient_worker import METHODS, MOMENTS, equal_runs
from tests.training.toys import distance, same


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes("tests.methods.gradient_worker", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    return equal_runs(torch.float64)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one_with_all_their_prompts(ranks, one, name):
    first, second = ranks
    assert same(first[name], second[name]), "ranks hold the same parameters"
    assert distance(first[name], one[name]) < 1e-7  # noise and rewards are float32
    assert first[f"{name} metrics"] == second[f"{name} metrics"]
    assert first[f"{name} metrics"] == pytest.approx(one[f"{name} metrics"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_a_step_is_that_of_all_prompts(ranks, one, name):
    moments = f"{name} {MOMENTS}"
    assert any(bool((moment.abs() > 1e-6).any()) for moment in one[moments].values())
    assert same(ranks[0][moments], ranks[1][moments])
    assert distance(ranks[0][moments], one[moments]) < 1e-7
