"""Dropout: at random weights, in training mode, a preference loss starts at log 2 with margin 0."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.methods.dpo import DPO
from diffalign.models.dropout import switch_off_dropout
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from diffalign.types import Batch
from tests.models.conftest import MAKERS
from tests.video_pipelines import CASES

FAMILIES = {**{name: (make, (32, 32)) for name, make in MAKERS.items()}, **CASES}
TARGETS = ("to_k", "to_q", "to_v")
OTHER_TARGETS = {"kandinsky5": ("to_key", "to_query", "to_value")}


def with_random_weights(network):
    """Every dropout of the network at 0.3, and no weight at its initial zero."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return sum(isinstance(module, nn.Dropout) for module in network.modules())


def first_step(model, config, size):
    policy = policy_denoiser(model, config)
    reference = reference_denoiser(model, policy, config, None)
    model.network.train()
    cond = dict(model.encode_prompts(["a red circle", "a red circle"]))
    sizes = torch.full((2, 2), 32.0)
    cond |= model.micro_conditions(sizes, torch.zeros(2, 2), sizes)
    x = torch.randn(2, *model.latent_shape(*size), generator=torch.Generator().manual_seed(1))
    batch = Batch(x, cond, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    return DPO(beta=1000.0)(policy, reference, batch, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_starts_at_log_2(family, train, tmp_path):
    make, size = FAMILIES[family]
    lora = LoraConfig(rank=2, targets=OTHER_TARGETS.get(family, TARGETS))
    config = ModelConfig(path=str(make(tmp_path / family)), train=train, lora=lora)
    model = load(config)
    layers = with_random_weights(model.network)
    assert switch_off_dropout(model.network) == layers
    prepare_policy(model, config, seed=0)
    step = first_step(model, config, size)
    # A copy of a weight at another address may be multiplied by another kernel: last digits, times beta.
    # Dropout left on makes it 20.
    assert step.loss.item() == pytest.approx(math.log(2), abs=1e-3)
    assert step.metrics["rewards/margins"].item() == pytest.approx(0, abs=2e-3)


def test_with_its_dropout_a_network_is_not_its_own_reference(tmp_path):
    """The control: the same step of ModelScope's network with dropout left on."""
    make, size = FAMILIES["text_to_video"]
    config = ModelConfig(path=str(make(tmp_path / "model")), lora=LoraConfig(rank=2, targets=TARGETS))
    model = load(config)
    assert with_random_weights(model.network) > 0
    prepare_policy(model, config, seed=0)
    assert abs(first_step(model, config, size).loss.item() - math.log(2)) > 0.1


def test_loras_own_dropout_is_kept(tmp_path):
    make, _size = FAMILIES["sd15"]
    config = ModelConfig(
        path=str(make(tmp_path / "model")), lora=LoraConfig(rank=2, targets=TARGETS, dropout=0.5)
    )
    model = load(config)
    switch_off_dropout(model.network)
    prepare_policy(model, config, seed=0)
    left = [module.p for module in model.network.modules() if isinstance(module, nn.Dropout) and module.p]
    assert left and set(left) == {0.5}
    assert replace(config, dropout=True).dropout
