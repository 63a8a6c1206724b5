from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.paths import path_from_config
from diffalign.models.denoisers import AdaptersOff, NetworkDenoiser, adapters_off
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from diffalign.types import Cond, Denoiser
from tests.helpers import sd_path
from tests.models.inputs import conditions, states, states_of


def test_network_denoisers_are_denoisers(sdxl: LoadedModel) -> None:
    policy = sdxl.denoiser()
    for denoiser in (policy, AdaptersOff(policy, sdxl.network), Guided(policy, {}, 2.0)):
        assert isinstance(denoiser, Denoiser)
        assert denoiser.path is sdxl.path
        assert denoiser.target == "eps"


def test_the_network_is_told_the_paths_time_in_its_own_dtype() -> None:
    def call(network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        assert x_t.dtype == torch.bfloat16
        return model_time

    denoiser = NetworkDenoiser(nn.Identity(), sd_path(), "eps", call, dtype=torch.bfloat16)
    assert denoiser(torch.zeros(3, 1), torch.tensor([0.0, 0.25, 1.0]), {}).tolist() == [0, 250, 999]


def test_guidance_is_extrapolation_from_the_negative(sdxl: LoadedModel) -> None:
    x_t, t = states()
    cond = conditions(sdxl, ["a", "b"])
    policy, negative = sdxl.denoiser(), sdxl.encode_prompts(["z"])
    with torch.no_grad():
        against = cond | {name: value.expand_as(cond[name]) for name, value in negative.items()}
        low, high = policy(x_t, t, against), policy(x_t, t, cond)
        assert_close(Guided(policy, negative, 3.0)(x_t, t, cond), low + 3 * (high - low))
        assert_close(Guided(policy, negative, 1.0)(x_t, t, cond), high)


@dataclass
class Prepared:
    model: LoadedModel
    policy: NetworkDenoiser
    reference: Denoiser
    parameters: list[tuple[str, nn.Parameter]]


def prepare(folder: Path, autocast: torch.dtype | None = None, **changes: object) -> Prepared:
    config = ModelConfig(path=str(folder), **changes)  # type: ignore[arg-type]
    model = load(config)
    parameters = prepare_policy(model, config)
    policy = policy_denoiser(model, config)
    return Prepared(model, policy, reference_denoiser(model, policy, config, autocast), parameters)


def disturb(parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Return a policy after some training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_off_is_the_base_model(folders: dict[str, Path], dora: bool) -> None:
    base = load(ModelConfig(path=str(folders["sdxl"])))
    ours = prepare(folders["sdxl"], lora=LoraConfig(rank=2, dora=dora))
    disturb(ours.parameters)
    x_t, t = states()
    cond = conditions(base, ["a", "b"])
    with torch.no_grad():
        expected = base.denoiser()(x_t, t, cond)
        assert torch.equal(ours.reference(x_t, t, cond), expected)
        assert not torch.allclose(ours.policy(x_t, t, cond), expected)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoraConfig(rank=2)},
        {"lora": LoraConfig(rank=2, dora=True)},
        {"lora": LoraConfig(rank=2, dora=True, dropout=0.5)},
        {"lora": LoraConfig(rank=4, alpha=2.0, rslora=True, dropout=0.5)},
        {"train": "full"},
    ],
    ids=["lora", "dora", "dora-dropout", "rslora-dropout", "full"],
)
def test_before_training_policy_and_reference_agree_exactly(
    folders: dict[str, Path],
    family: str,
    changes: dict[str, object],
    dtype: str,
    autocast: torch.dtype | None,
) -> None:
    """Rule 3 of the design: a margin of exactly 0, in every precision."""
    ours = prepare(folders[family], autocast, dtype=dtype, **changes)
    x_t, t = states_of(ours.model)
    cond = conditions(ours.model, ["a", "b"])
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        prediction = ours.policy(x_t, t, cond)
        held = ours.reference(x_t, t, cond)
    assert prediction.requires_grad
    assert torch.equal(prediction.detach(), held.detach())


def test_the_reference_copy_runs_under_the_policys_autocast_by_itself(folders: dict[str, Path]) -> None:
    """The trainer prepares the policy's network alone."""
    ours = prepare(folders["sdxl"], torch.bfloat16, dtype="bfloat16", train="full")
    x_t, t = states()
    cond = conditions(ours.model, ["a", "b"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = ours.policy(x_t, t, cond)
    with torch.no_grad():
        assert torch.equal(ours.reference(x_t, t, cond), expected)


def gradients(
    folder: Path, checkpointing: bool | int, reference_between: bool, dora: bool = False
) -> dict[str, Tensor]:
    ours = prepare(folder, gradient_checkpointing=checkpointing, lora=LoraConfig(rank=2, dora=dora))
    disturb(ours.parameters)
    x_t, t = states()
    cond = conditions(ours.model, ["a", "b"])
    prediction = ours.policy(x_t, t, cond)
    if reference_between:
        ours.reference(x_t, t, cond)
    prediction.square().sum().backward()
    return {name: p.grad for name, p in ours.parameters if p.grad is not None}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_checkpointing_recomputes_with_the_adapters_on(
    folders: dict[str, Path], family: str, dora: bool
) -> None:
    """The reference forward stands between the policy's forward and its recomputation."""
    plain = gradients(folders[family], checkpointing=False, reference_between=False, dora=dora)
    recomputed = gradients(folders[family], checkpointing=True, reference_between=True, dora=dora)
    assert plain.keys() == recomputed.keys()
    assert all(g.abs().sum() > 0 for g in plain.values())
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient, msg=name)


def test_adapters_off_leaves_no_trace(folders: dict[str, Path]) -> None:
    ours = prepare(folders["sdxl"], lora=LoraConfig(rank=2))
    before = [(n, p.requires_grad) for n, p in ours.model.network.named_parameters()]
    x_t, t = states()
    with pytest.raises(KeyError):
        ours.reference(x_t, t, {})  # fails inside the network call
    assert [(n, p.requires_grad) for n, p in ours.model.network.named_parameters()] == before
    disturb(ours.parameters)
    cond = conditions(ours.model, ["a", "b"])
    with torch.no_grad():
        trained = ours.policy(x_t, t, cond)
        with adapters_off(ours.model.network):
            with adapters_off(ours.model.network):
                base = ours.policy(x_t, t, cond)
            assert torch.equal(ours.policy(x_t, t, cond), base)
        assert torch.equal(ours.policy(x_t, t, cond), trained)


def test_without_gradient_no_process_waits_for_another(tmp_path):
    """An inversion may ask more often on one rank than on another: such calls pass the wrapper by."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        asked = []
        path, target = path_from_config({})
        call = lambda network, x, t, cond: asked.append(network) or network(x)  # noqa: E731
        denoiser = NetworkDenoiser(wrapped, path, target, call)
        with torch.no_grad():
            denoiser(torch.zeros(1, 2), torch.zeros(1), {})
        denoiser(torch.zeros(1, 2), torch.zeros(1), {})
        assert asked == [wrapped.module, wrapped]
    finally:
        torch.distributed.destroy_process_group()
