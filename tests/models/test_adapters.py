from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.errors import UserError
from diffalign.models.loading import load
from diffalign.models.lora import (
    compile_network,
    load_trainable_state,
    prepare_policy,
    reference_denoiser,
    trainable_state,
)
from tests.models.inputs import conditions, states


def config_of(folder: Path, **changes: object) -> ModelConfig:
    return ModelConfig(path=str(folder), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_float32_over_any_base(folders: dict[str, Path], dtype: str, dora: bool) -> None:
    """Rule 2 of the design."""
    config = config_of(folders["sdxl"], dtype=dtype, lora=LoraConfig(rank=2, dora=dora))
    model = load(config)
    names = dict(prepare_policy(model, config))
    assert {p.dtype for p in names.values()} == {torch.float32}
    assert {p.dtype for n, p in model.network.named_parameters() if n not in names} == {getattr(torch, dtype)}
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        (LoraConfig(rank=4), 1.0),
        (LoraConfig(rank=4, alpha=8), 2.0),
        (LoraConfig(rank=4, alpha=1.0), 0.25),
        (LoraConfig(rank=4, alpha=8, rslora=True), 4.0),
    ],
)
def test_an_adapter_adds_its_scaled_product(folders: dict[str, Path], lora: LoraConfig, scale: float) -> None:
    config = config_of(folders["sdxl"], lora=lora)
    model = load(config)
    prepare_policy(model, config)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = model.network.get_submodule(name)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape[0] == up.shape[1] == 4
    assert not up.any()
    with torch.no_grad():
        up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, down.shape[1], generator=torch.Generator().manual_seed(1))
    assert_close(layer(x), layer.base_layer(x) + scale * x @ down.T @ up.T)


def test_gaussian_init_depends_on_the_seed_alone(folders: dict[str, Path]) -> None:
    config = config_of(folders["sdxl"], lora=LoraConfig(rank=8))

    def initial(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed() % 2**31)  # whatever the global state is
        model = load(config)
        prepare_policy(model, config, seed)
        return trainable_state(model)

    first, again, other = initial(3), initial(3), initial(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    down = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in down)
    values = torch.cat([first[name].flatten() for name in down])
    assert abs(float(values.std()) * 8 - 1) < 0.05  # std 1 / rank


def test_dropout_acts_on_the_adapter_in_training_only(folders: dict[str, Path]) -> None:
    config = config_of(folders["sdxl"], lora=LoraConfig(rank=2, dropout=0.5))
    model = load(config)
    for _, parameter in prepare_policy(model, config):
        torch.nn.init.ones_(parameter)
    layer = model.network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    x = torch.ones(1, layer.in_features)
    assert len({round(float((layer(x) - layer.base_layer(x)).sum().detach()), 3) for _ in range(10)}) > 1
    model.network.eval()
    assert torch.equal(layer(x), layer(x))


def test_targets_choose_the_layers(folders: dict[str, Path]) -> None:
    config = config_of(folders["sdxl"], lora=LoraConfig(rank=2, targets=("attn2.to_k", "conv1")))
    model = load(config)
    adapted = {name.split(".lora_")[0] for name, _ in prepare_policy(model, config)}
    assert adapted
    assert all(name.endswith(("attn2.to_k", "conv1")) for name in adapted)


@pytest.mark.parametrize("targets", [("to_kk",), ("to_k", "nonsense"), ("attn1",), ()])
def test_a_target_that_matches_nothing_is_a_user_error(
    folders: dict[str, Path], targets: tuple[str, ...]
) -> None:
    config = config_of(folders["sdxl"], lora=LoraConfig(targets=targets))
    with pytest.raises(UserError, match=r"model.lora.targets: .* such as .*to_out.0, to_q"):
        prepare_policy(load(config), config)


@pytest.mark.parametrize("lora", [LoraConfig(rank=0), LoraConfig(dropout=1.0), LoraConfig(dropout=-0.1)])
def test_impossible_adapters_are_user_errors(folders: dict[str, Path], lora: LoraConfig) -> None:
    config = config_of(folders["sdxl"], lora=lora)
    with pytest.raises(UserError, match="allowed: "):
        prepare_policy(load(config), config)


def test_full_fine_tuning_is_float32_with_a_frozen_reference(folders: dict[str, Path]) -> None:
    config = config_of(folders["sdxl"], dtype="bfloat16", train="full")
    model = load(config)
    parameters = prepare_policy(model, config)
    assert len(parameters) == len(list(model.network.parameters()))
    assert {p.dtype for _, p in parameters} == {torch.float32}
    reference = reference_denoiser(model, model.denoiser(), config, autocast=torch.bfloat16)
    held = list(reference.network.parameters())  # type: ignore[attr-defined]
    halved = sum(p.numel() for p in held if p.dtype == torch.bfloat16)
    assert halved > 0.95 * sum(p.numel() for p in held)  # what is multiplied; norms stay float32
    assert {p.dtype for p in held} == {torch.bfloat16, torch.float32}
    assert not any(p.requires_grad for p in held)
    before = [p.clone() for p in held]
    with torch.no_grad():
        for _, parameter in parameters:
            parameter += 1
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_trainable_state_round_trip(folders: dict[str, Path], train: str) -> None:
    config = config_of(folders["sdxl"], train=train, lora=LoraConfig(rank=2))
    source, target = load(config), load(config)
    for _, parameter in prepare_policy(source, config, seed=1):
        torch.nn.init.normal_(parameter)
    prepare_policy(target, config, seed=2)
    load_trainable_state(target, trainable_state(source))
    saved, restored = trainable_state(source), trainable_state(target)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)


def test_a_state_of_another_run_is_a_user_error(folders: dict[str, Path]) -> None:
    def prepared(lora: LoraConfig) -> object:
        config = config_of(folders["sdxl"], lora=lora)
        model = load(config)
        prepare_policy(model, config)
        return model

    here = prepared(LoraConfig(rank=2))
    with pytest.raises(UserError, match=r"same model.lora.rank"):
        load_trainable_state(here, trainable_state(prepared(LoraConfig(rank=4))))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is in only one of them"):
        load_trainable_state(here, trainable_state(prepared(LoraConfig(rank=2, targets=("to_q",)))))  # type: ignore[arg-type]


def test_compilation_takes_place_and_changes_nothing(folders: dict[str, Path]) -> None:
    config = config_of(folders["sdxl"], lora=LoraConfig(rank=2), gradient_checkpointing=True)
    x_t, t = states()
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = load(config)
        parameters = prepare_policy(model, config)
        if compiled:
            compile_network(model.network, backend="eager")
        prediction = model.denoiser()(x_t, t, conditions(model, ["a", "b"]))
        prediction.square().sum().backward()
        results.append((prediction.detach(), [p.grad for _, p in parameters], [n for n, _ in parameters]))
        assert (torch._dynamo.utils.counters["frames"]["ok"] > 0) == compiled
    (plain, gradients, names), (compiled_prediction, compiled_gradients, compiled_names) = results
    assert names == compiled_names
    assert_close(compiled_prediction, plain)
    assert_close(compiled_gradients, gradients)


def test_repeated_blocks_are_compiled_or_else_the_whole(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folders["sdxl"])
    regional, whole = load(config).network, load(config).network
    compile_network(regional)
    compiled = {type(m).__name__ for m in regional.modules() if m._compiled_call_impl is not None}
    assert compiled == {"BasicTransformerBlock"}
    monkeypatch.setattr(type(whole), "_repeated_blocks", [])
    compile_network(whole)
    assert [m for m in whole.modules() if m._compiled_call_impl is not None] == [whole]
