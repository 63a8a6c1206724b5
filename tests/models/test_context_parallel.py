"""Diffusers' context parallelism: the gradients of its processes, which a setting would have to add up."""

import pytest
import torch

from tests.helpers import in_two_processes
from tests.models.context_worker import gradients, network

pytestmark = pytest.mark.slow


def test_gradients_of_one_process_are_the_sum_of_two_and_not_their_mean(tmp_path):
    """Each process has the gradient of its own tokens: what DDP makes, a mean, is half of the gradient."""
    in_two_processes("tests.models.context_worker", tmp_path, tmp_path)
    whole, expected = gradients(network())
    parts = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for part in parts:
        torch.testing.assert_close(part.pop(""), whole, rtol=1e-4, atol=1e-5)
        assert part.keys() == expected.keys()
    for name, gradient in expected.items():
        summed = parts[0][name] + parts[1][name]
        assert (summed - gradient).norm() < 1e-5 * gradient.norm(), name
        assert (summed / 2 - gradient).norm() > 0.4 * gradient.norm(), "a mean is another gradient"
