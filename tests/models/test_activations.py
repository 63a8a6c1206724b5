"""Settings that change where a step's tensors lie: activations in main memory, channels last."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffalign.config.schema import DataConfig, LoraConfig, ModelConfig, Run, TrainingConfig
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.estimate.estimate import estimate
from diffalign.methods import build
from diffalign.models import activations
from diffalign.models.activations import offload_activations
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from diffalign.runs.micro_batch import workload_of
from diffalign.runs.role_checks import check_roles
from diffalign.types import Batch

LORA = ModelConfig(path="tiny:sdxl", lora=LoraConfig(rank=4))


def step(config, after=lambda network: None):
    """Return the loss of a DPO step and the gradients by name."""
    model = load(config)
    parameters = prepare_policy(model, config)
    after(model.network)
    for name, parameter in parameters:
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.normal_(std=0.1, generator=generator)
    policy = policy_denoiser(model, config)
    reference = reference_denoiser(model, policy, config)
    sizes = torch.full((2, 2), 32.0)
    cond = {**model.encode_prompts(["a red circle"] * 2), **model.micro_conditions(sizes, 0 * sizes, sizes)}
    x = torch.randn(2, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    batch = Batch(x, cond, torch.zeros(2).long(), torch.tensor([1.0, 0.0]))
    loss = build({"type": "dpo", "beta": 100.0})(policy, reference, batch, Streams.at(0, 0, 1)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in parameters}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradients(checkpointing, monkeypatch):
    copied: list[int] = []

    def counting(packed):
        if isinstance(packed, tuple):
            copied.append(packed[1].nbytes)
        return activations_unpacked(packed)

    activations_unpacked = activations._unpacked
    monkeypatch.setattr(activations, "_unpacked", counting)
    config = replace(LORA, gradient_checkpointing=checkpointing)
    loss, gradients = step(config)
    assert not copied
    again, offloaded = step(config, offload_activations)
    assert torch.equal(loss, again) and loss != pytest.approx(0.6931, abs=1e-4)
    for name, gradient in gradients.items():  # a copy's strides may choose another kernel
        torch.testing.assert_close(gradient, offloaded[name], atol=1e-6, rtol=1e-5)
    assert sum(copied) > 2**18, "what was kept came back from copies"


def test_weights_are_not_copied_and_nothing_is_without_gradient(monkeypatch):
    shapes = []
    pack = activations._packing

    def watching(network):
        inner = pack(network)

        def packing(tensor):
            packed = inner(tensor)
            shapes.append((tuple(tensor.shape), isinstance(packed, tuple)))
            return packed

        return packing

    monkeypatch.setattr(activations, "_packing", watching)
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7, bias=False))
    network[0].requires_grad_(False)
    offload_activations(network)
    with torch.no_grad():
        network(torch.randn(2, 3))
    assert not shapes
    network(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert {(shape, moved) for shape, moved in shapes} == {((3, 5), False), ((2, 5), True), ((5, 7), False)}
    with pytest.raises(RuntimeError):
        network(torch.randn(2, 4, requires_grad=True))
    shapes.clear()
    torch.exp(torch.randn(2, requires_grad=True))
    assert not shapes, "a forward that fails leaves no hook behind"


def test_a_cpu_has_nothing_to_offload():
    config = replace(LORA, offload_activations=True)
    with pytest.raises(UserError, match=r"offload_activations=True on a CPU.*allowed: false"):
        prepare_policy(load(config), config)
    run = Run(model=replace(config, compile=True))
    with pytest.raises(UserError, match=r"model\.compile=True with model\.offload_activations"):
        check_roles(run, build(run.method))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_estimate_tells_where_activations_are(checkpointing):
    run = Run(
        model=replace(LORA, gradient_checkpointing=checkpointing),
        data=DataConfig(resolution=64),
        training=TrainingConfig(batch_size=2),
    )
    here = estimate(workload_of(run))
    there = estimate(workload_of(replace(run, model=replace(run.model, offload_activations=True))))
    assert here.offloaded == 0 and there.offloaded > 0
    kept, left = here.memory["activations"], there.memory["activations"]
    assert left < kept / 2
    assert there.offloaded + left == pytest.approx(kept) if checkpointing else there.offloaded == kept
    assert {**here.memory, "activations": 0} == {**there.memory, "activations": 0}
    told = "main memory: activations"
    assert told in dict(there.rows()) and told not in dict(here.rows())


@pytest.mark.parametrize("train", ["lora", "full"])
def test_channels_last_computes_the_same_step(train):
    config = replace(LORA, train=train)
    loss, gradients = step(config)
    layout = {}

    def look(network):
        layout.update({name: p for name, p in network.named_parameters() if p.dim() == 4 and p.shape[-1] > 1})

    again, last = step(replace(config, channels_last=True), look)
    assert layout and all(p.is_contiguous(memory_format=torch.channels_last) for p in layout.values())
    torch.testing.assert_close(loss, again, atol=1e-5, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, last[name], atol=1e-5, rtol=1e-3)


def test_a_transformer_has_no_use_for_channels_last():
    config = ModelConfig(path="tiny:sd3", channels_last=True)
    with pytest.raises(
        UserError, match=r"channels_last=True with SD3Transformer2DModel.*UNet2DConditionModel"
    ):
        prepare_policy(load(config), config)
    run = Run(model=config, data=DataConfig(resolution=32))
    with pytest.raises(UserError, match="channels_last"):
        estimate(workload_of(run))
