"""The negative branch of guidance: Diffusion-NPO's numbers, each half its own network, a stock pipeline."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.models.loading import load
from diffalign.models.negative_branch import attach, merged_weights
from diffalign.runs.negative_branch import add_negative_branch
from tests.helpers import VECTORS

FILE = VECTORS / "diffusion_npo_a.npz"


def cases():
    return sorted({key.removesuffix("_eps_guided") for key in np.load(FILE) if key.endswith("_eps_guided")})


class Says(nn.Module):
    """A network that answers with a number for each row."""

    def __init__(self, answer):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, return_dict=True):
        assert len(sample) == len(encoder_hidden_states) == 1
        assert added_cond_kwargs is None or len(added_cond_kwargs["ids"]) == 1
        return (self.answer[None] + 0 * sample,)


@pytest.mark.parametrize("case", cases())
def test_golden_npo(case):
    f = np.load(FILE)
    get = lambda name: torch.from_numpy(f[f"{case}_{name}"])  # noqa: E731
    weights = [{"w": get(name)} for name in ("npo", "preferred", "base")]
    merged = merged_weights(*weights, float(f[f"{case}_merge_weight"]))
    np.testing.assert_allclose(merged["w"].numpy(), f[f"{case}_negative_net"], atol=1e-12)

    own, negative = Says(get("eps_positive_net")), Says(get("eps_negative_net"))
    pipeline = SimpleNamespace(do_classifier_free_guidance=True)
    attach(pipeline, own, negative, "sd15")
    x = torch.zeros(2, 5).double()
    text, ids = torch.tensor([[0.0], [1.0]]), {"ids": torch.zeros(2, 6)}
    low, high = own(x, torch.tensor(7), encoder_hidden_states=text, added_cond_kwargs=ids)[0].chunk(2)
    guided = low + float(f[f"{case}_cfg"]) * (high - low)
    np.testing.assert_allclose(guided[0].detach().numpy(), f[f"{case}_eps_guided"], atol=1e-12)
    pipeline.do_classifier_free_guidance = False
    alone = own(x[:1], torch.tensor(7), encoder_hidden_states=text[:1])[0]
    np.testing.assert_allclose(alone[0].detach().numpy(), f[f"{case}_eps_positive_net"])


def drawn(model, guidance=3.0):
    generator = torch.Generator().manual_seed(0)
    return model.pipeline(
        "a red circle", num_inference_steps=2, guidance_scale=guidance, generator=generator, height=32,
        width=32, output_type="np",
    ).images  # fmt: skip


@pytest.mark.parametrize("family", ["tiny:sdxl", "tiny:sd3"])
def test_a_stock_pipeline_with_an_equal_and_with_another_branch(family):
    """An equal network changes nothing but the last bits; another one changes guided images alone."""
    model = load(ModelConfig(path=family))
    model.pipeline.set_progress_bar_config(disable=True)
    plain, unguided, before = drawn(model), drawn(model, 1.0), fingerprint(model.pipeline)
    other = copy.deepcopy(model.network)
    attach(model.pipeline, model.network, other, model.family.name)
    np.testing.assert_allclose(drawn(model), plain, atol=2e-3)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if n.endswith("proj_out.weight") or "conv_out" in n).mul_(
            0.5
        )
    assert np.abs(drawn(model) - plain).max() > 0.01
    np.testing.assert_allclose(drawn(model, 1.0), unguided, atol=2e-3)
    assert fingerprint(model.pipeline) != before


def test_a_named_branch_is_opened_with_the_model():
    model = load(ModelConfig(path="tiny:sdxl"))
    model.pipeline.set_progress_bar_config(disable=True)
    plain = drawn(model)
    add_negative_branch(model, "tiny:sdxl", "tiny:sdxl")
    np.testing.assert_allclose(drawn(model), plain, atol=2e-3)
    with pytest.raises(UserError, match="merge weight 2"):
        add_negative_branch(model, "tiny:sdxl", "tiny:sdxl", merge_weight=2)


def test_what_is_refused():
    one, two = Says(torch.zeros(1)), nn.Linear(2, 2)
    with pytest.raises(UserError, match="a negative branch for wan, whose pipeline calls each branch"):
        attach(None, one, copy.deepcopy(one), "wan")
    with pytest.raises(UserError, match="another network than the model's"):
        attach(None, one, two, "sd15")
    with pytest.raises(UserError, match="weights of different names"):
        merged_weights({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, {"a": torch.zeros(1)}, 0.0)
