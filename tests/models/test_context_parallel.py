"""Tokens shared by two processes: their gradients add up to those of one, for every family that may share."""

from pathlib import Path

import pytest
import torch

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models import context
from diffalign.models.context import check_parts, check_sharing, share_tokens
from diffalign.models.families.chat import text_multiple
from diffalign.models.families.registry import having
from diffalign.models.loading import load
from tests.flow_pipelines import make_flux2
from tests.helpers import in_two_processes
from tests.models.context_worker import gradients, model_of
from tests.tiny_pipelines import (
    make_flux,
    make_flux2_klein,
    make_flux_kontext,
    make_qwen_image,
    make_qwen_image_edit,
    make_sd15,
)
from tests.video_pipelines import make_ltx, make_wan, make_wan_i2v, make_wan_ti2v

pytestmark = pytest.mark.slow

MAKERS = {
    "flux": make_flux, "flux_kontext": make_flux_kontext, "flux2": make_flux2,
    "flux2_klein": make_flux2_klein, "qwen_image": make_qwen_image, "qwen_image_edit": make_qwen_image_edit,
    "wan": make_wan, "wan_i2v": make_wan_i2v, "wan_ti2v": make_wan_ti2v,
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with a tiny model of each family, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("context")
    for name, make in MAKERS.items():
        make(folder / name)
    in_two_processes("tests.models.context_worker", folder, *MAKERS, pipelines=True)
    return folder


def test_every_family_that_shares_is_compared() -> None:
    assert set(MAKERS) == set(having("shares_tokens"))


@pytest.mark.parametrize("family", MAKERS)
def test_gradients_of_one_process_are_the_sum_of_two_and_not_their_mean(two: Path, family: str) -> None:
    """Each process has the gradient of its own tokens: what DDP makes, a mean, is half of the gradient."""
    expected = gradients(model_of(two, family))
    parts = [torch.load(two / f"{family}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = expected.pop("")
    for part in parts:
        torch.testing.assert_close(part.pop(""), whole, rtol=1e-4, atol=1e-5)
        assert part.keys() == expected.keys()
    for name, gradient in expected.items():
        summed = parts[0][name] + parts[1][name]
        # gradients that vanish by symmetry (a key's bias) are rounding
        scale = max(float(gradient.norm()), 1e-4)
        assert float((summed - gradient).norm()) < 1e-5 * scale, name
    largest = max(expected, key=lambda name: float(expected[name].norm()))
    mean = (parts[0][largest] + parts[1][largest]) / 2
    assert float((mean - expected[largest]).norm()) > 0.4 * float(expected[largest].norm())


def test_a_family_without_a_tested_plan_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    for make, name in ((make_sd15, "sd15"), (make_ltx, "ltx")):
        config = ModelConfig(path=str(make(tmp_path / name)))
        with pytest.raises(UserError, match=rf"training.context=2 with {name}.*allowed: 1, or .*flux.*wan"):
            check_sharing(config, 2, validates=False)
    check_sharing(ModelConfig(path=str(make_wan(tmp_path / "wan"))), 2, validates=True)
    config = ModelConfig(path=str(make_qwen_image(tmp_path / "qwen")))
    check_sharing(config, 2, validates=False)
    with pytest.raises(UserError, match=r"validation.every.*qwen_image.*own number of tokens"):
        check_sharing(config, 2, validates=True)


def test_heads_and_tokens_must_be_divisible(tmp_path: Path) -> None:
    wan = load(ModelConfig(path=str(make_wan(tmp_path / "wan"))))
    check_parts(wan, 2, (64, 64), 9)
    with pytest.raises(UserError, match="context=4: wan has 2 attention heads; allowed: a divisor"):
        check_parts(wan, 4, (64, 64), 9)
    with pytest.raises(UserError, match="makes 27 tokens of 48 x 48 pixels in 9 frames; allowed"):
        check_parts(wan, 2, (48, 48), 9)
    check_parts(wan, 2, None, 9)  # of many sizes, which are checked when they are seen
    flux = load(ModelConfig(path=str(make_flux(tmp_path / "flux")), max_sequence_length=9))
    with pytest.raises(UserError, match=r"reads 9 tokens of text; allowed: model.max_sequence_length"):
        check_parts(flux, 2, (64, 64), None)


def test_tokens_that_cannot_be_divided_are_named_when_they_are_seen() -> None:
    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    block = Block()
    block.register_forward_pre_hook(context._Divisible({"hidden_states": 1}, 2), with_kwargs=True)
    assert block(torch.zeros(1, 4, 2)).shape == (1, 4, 2)
    for call in (lambda x: block(x), lambda x: block(hidden_states=x)):
        with pytest.raises(UserError, match=r"context=2: 5 tokens \(hidden_states of Block\)"):
            call(torch.zeros(1, 5, 2))


def test_an_attention_that_would_see_a_part_only_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load(ModelConfig(path=str(make_flux(tmp_path / "flux")))).network
    assert text_multiple(network) == 1
    monkeypatch.setattr(type(network), "enable_parallelism", lambda self, config: None)

    class Mesh:
        shape = (1, 1, 2)

    with pytest.raises(UserError, match=r"2 attention layers of Flux.*would see a part of the tokens only"):
        share_tokens(network, Mesh())
