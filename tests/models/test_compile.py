"""Regional torch.compile: 50 steps of two buckets, policy and reference, compile nothing after warm-up."""

import pytest
import torch
import torch._dynamo

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.diffusion.randomness import Streams
from diffalign.methods import build
from diffalign.models import lora
from diffalign.models.compiling import GRAPHS, compile_network
from diffalign.models.denoisers import AdaptersOff, adapter_layers
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from diffalign.types import Batch

pytestmark = pytest.mark.slow
WARM, STEPS = 4, 50


def test_no_recompilation_after_warm_up(monkeypatch):
    torch._dynamo.reset()
    graphs: list[int] = []

    def counting(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(lora, "compile_network", lambda network: compile_network(network, backend=counting))
    config = ModelConfig(path="tiny:sdxl", lora=LoraConfig(rank=4), compile=True)
    model = load(config)
    parameters = [p for _, p in prepare_policy(model, config)]
    policy = policy_denoiser(model, config)
    reference = reference_denoiser(model, policy, config)
    sizes = torch.full((2, 2), 32.0)
    cond = {**model.encode_prompts(["a red circle"] * 2), **model.micro_conditions(sizes, 0 * sizes, sizes)}
    batches = [
        Batch(
            torch.randn(2, *model.latent_shape(32, width)),
            cond,
            torch.zeros(2).long(),
            torch.tensor([1.0, 0.0]),
        )
        for width in (32, 64)
    ]
    method, optimizer = build({"type": "dpo", "beta": 1000.0}), torch.optim.AdamW(parameters, 1e-3)
    counts = []
    for number in range(STEPS):
        step = method(policy, reference, batches[number % 2], Streams.at(0, number, 1))
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(len(graphs))
    assert 2 <= counts[WARM - 1] <= 12, "blocks share graphs: two players, two structures, few sizes"
    assert counts[WARM - 1 :] == [counts[WARM - 1]] * (STEPS - WARM + 1)
    assert float(step.metrics["rewards/margins"]) != 0.0, "the players are two"
    assert torch._dynamo.config.recompile_limit >= GRAPHS > counts[-1]


def test_adapter_layers_are_looked_for_once(monkeypatch):
    config = ModelConfig(path="tiny:sdxl", lora=LoraConfig(rank=4))
    model = load(config)
    prepare_policy(model, config)
    policy = policy_denoiser(model, config)
    reference = AdaptersOff(policy, model.network)
    layers = adapter_layers(model.network)
    assert len(layers) > 10 and reference._layers == layers
    sizes = torch.full((1, 2), 32.0)
    cond = {**model.encode_prompts(["a red circle"]), **model.micro_conditions(sizes, 0 * sizes, sizes)}
    x, t = torch.randn(1, *model.latent_shape(32, 32)), torch.full((1,), 0.5)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.normal_()
        monkeypatch.setattr(
            "diffalign.models.denoisers.adapter_layers", lambda network: pytest.fail("walked again")
        )
        before = reference(x, t, cond)
        assert not torch.allclose(policy(x, t, cond), before), "the flags are turned back"
        assert torch.equal(reference(x, t, cond), before)
