"""Gradient checkpointing of every n-th block: gradients, which blocks, and with torch.compile."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from diffalign.config.schema import ModelConfig, TextEncoderConfig, TextLoraConfig
from diffalign.models import gradient_checkpointing, lora
from diffalign.models.compiling import compile_network
from diffalign.models.gradient_checkpointing import EveryNth, disable_checkpointing, enable_checkpointing
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from tests.models.inputs import conditions, states_of


def gradients(folder: Path, every: bool | int, train: str) -> dict[str, torch.Tensor]:
    """Gradients after a forward of the reference between the policy's and its recomputation."""
    config = ModelConfig(path=str(folder), train=train, gradient_checkpointing=every)  # type: ignore[arg-type]
    model = load(config)
    parameters = prepare_policy(model, config)
    policy = policy_denoiser(model, config)
    reference = reference_denoiser(model, policy, config)
    with torch.no_grad():
        for name, parameter in parameters:
            if "lora_B" in name:
                parameter += 0.1
    x_t, t = states_of(model)
    cond = conditions(model, ["a", "b"])
    prediction = policy(x_t, t, cond)
    reference(x_t, t, cond)
    prediction.square().sum().backward()
    return {name: p.grad for name, p in parameters if p.grad is not None}


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "chroma"])
def test_gradients_are_those_without_to_the_bit(folders: dict[str, Path], family: str, train: str) -> None:
    plain, some = gradients(folders[family], False, train), gradients(folders[family], 2, train)
    assert plain.keys() == some.keys() and any(g.any() for g in plain.values())
    assert all(torch.equal(some[name], gradient) for name, gradient in plain.items())


def called(model: LoadedModel, every: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Blocks in the order of a first and a second forward that are called through the function."""
    blocks: list[list[nn.Module]] = []

    def function(block: Any, *inputs: Any) -> Any:
        blocks[-1].append(block)
        return block(*inputs)

    enable_checkpointing(model.network, function, every)
    x_t, t = states_of(model)
    for _ in range(2):
        blocks.append([])
        model.denoiser()(x_t, t, conditions(model, ["a", "b"]))
    disable_checkpointing(model.network)
    return blocks[0], blocks[1]


@pytest.mark.parametrize("every", [2, 3, 100])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_every_nth_block_of_each_class_is_checkpointed(
    folders: dict[str, Path], family: str, every: int
) -> None:
    model = load(ModelConfig(path=str(folders[family])))
    whole, _ = called(model, 1)
    some, again = called(model, every)
    classes = {type(block) for block in whole}
    assert len(classes) == (2 if family == "sdxl" else 1), "a UNet has residual and transformer blocks"
    expected = [[b for b in whole if type(b) is one][::every] for one in classes]
    assert len(some) == sum(map(len, expected)) < len(whole)
    assert {*some} == {block for blocks in expected for block in blocks}
    assert some == again, "a block keeps its number"


def test_blocks_that_diffusers_leaves_out_are_counted_too(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = gradient_checkpointing.checkpoint
    monkeypatch.setattr(
        gradient_checkpointing,
        "checkpoint",
        lambda *given, **named: calls.append(1) or plain(*given, **named),
    )
    for every in (1, 2):
        model = load(ModelConfig(path=str(folders["chroma"])))
        enable_checkpointing(model.network, every=every)
        x_t, t = states_of(model)
        model.denoiser()(x_t, t, conditions(model, ["a", "b"]))
        calls.append(0)
    first = calls.index(0)
    count = [sum(1 for one in model.network.modules() if type(one).__name__ == name) for name in (
        "ChromaTransformerBlock", "ChromaSingleTransformerBlock",
    )]  # fmt: skip
    assert first == sum(count) and len(calls) - first - 2 == sum(-(-n // 2) for n in count) < first


def test_a_network_that_is_copied_counts_its_own_blocks() -> None:
    import copy

    holder = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    holder.function = EveryNth(lambda block, *inputs: block(*inputs), 2)  # type: ignore[assignment]
    assert [holder.function.chosen(b) for b in holder.values()] == [True, False]  # type: ignore[union-attr]
    other = copy.deepcopy(holder)
    assert {*other.function.numbers} == {*other.values()}  # type: ignore[union-attr]


def test_layers_of_text_encoders_are_counted_too(folders: dict[str, Path]) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    from diffalign.models.text_lora import begin_training_text, prepare_text_policy

    config = ModelConfig(
        path=str(folders["sd15"]),
        gradient_checkpointing=2,
        text_encoder=TextEncoderConfig(TextLoraConfig(rank=2)),
    )
    model = load(config)
    begin_training_text(model, config)
    prepare_policy(model, config)
    prepare_text_policy(model, config, 0)
    encoder = model.pipeline.text_encoder
    layers = [m for m in encoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    found = [layer.gradient_checkpointing for layer in layers]
    assert len(found) > 1 and found == [number % 2 == 0 for number in range(len(found))]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["tiny:sdxl", "tiny:sd3"])
def test_a_compiled_network_keeps_its_graphs_after_the_second_step(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL is compiled by blocks, SD3 as a whole, where blocks get their numbers in the first graph."""
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    monkeypatch.setattr(lora, "compile_network", lambda network: compile_network(network, backend=counting))
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        config = ModelConfig(path=path, gradient_checkpointing=2, compile=compiled)
        model = load(config)
        parameters = prepare_policy(model, config)
        x_t, t = states_of(model)
        cond = conditions(model, ["a", "b"])
        counts = []
        for _ in range(5):
            for _, parameter in parameters:
                parameter.grad = None
            with torch.no_grad():
                model.denoiser()(x_t, t, cond)
            model.denoiser()(x_t, t, cond).square().sum().backward()
            counts.append(len(graphs))
        found.append([p.grad for _, p in parameters])
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 4
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other)
