"""Two processes share the gradient of the text encoders' adapters."""

import torch

from tests.helpers import in_two_processes
from tests.models.text_worker import gradients
from tests.tiny_pipelines import make_sdxl


def test_two_processes_have_the_gradient_of_one_with_both_rows(tmp_path):
    folder = make_sdxl(tmp_path / "sdxl")
    in_two_processes("tests.models.text_worker", folder, tmp_path, pipelines=True)
    expected = gradients(str(folder))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(expected) == 24 and expected.keys() == first.keys() == second.keys()
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert gradient.abs().max() > 0
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-8)
