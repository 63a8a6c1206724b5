"""Two steps of DPO on tiny pipelines of each video family, saved, and loaded by plain diffusers; what
checkpointing costs and saves; what real sizes take.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from diffalign.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
)
from diffalign.errors import UserError
from diffalign.estimate.counting import Activations, count
from diffalign.estimate.estimate import estimate
from diffalign.estimate.shapes import Shapes, shapes_of
from diffalign.export.aligned import load_aligned, save_aligned
from diffalign.methods.dpo import DPO
from diffalign.models.families.registry import built_in, get_family
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import has_lora_loader, policy_denoiser, prepare_policy, reference_denoiser
from diffalign.models.precision import only_errors
from diffalign.plane.source import TensorSource
from diffalign.runs.micro_batch import workload_of
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from tests.models.test_stock import listening
from tests.video_pipelines import CASES

LORA = LoraConfig(rank=2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Diffusers warns of what is deprecated whenever it loads."""
    with only_errors("diffusers"):
        yield


def noisy(model: LoadedModel, case: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    x_t = torch.randn(2, *model.latent_shape(*CASES[case][1]), generator=generator)
    return x_t, torch.tensor([0.3, 0.8]), model.encode_prompts(["a", "b"])


# Weights that are mapped from a file lie at other addresses, and the address decides which kernel
# computes: outputs of equal weights differ in their last digits, now and then.
LOADED = 1e-5


def aligned(config: ModelConfig, case: str) -> tuple[LoadedModel, list[float]]:
    """Return a model after two steps of DPO on one pair, and the losses of both."""
    model, losses = load(config), []
    dpo, settings = DPO(beta=100.0), TrainingConfig(steps=2, batch_size=1)
    parameters, policy = prepare_policy(model, config), policy_denoiser(model, config)
    x, _, cond = noisy(model, case)

    def method(*arguments: Any) -> Any:
        step = dpo(*arguments)
        losses.append(float(step.loss))
        return step

    train(
        method=method,
        denoiser_of=lambda network: replace(policy, network=network),
        reference=reference_denoiser(model, policy, config),
        network=model.network,
        parameters=parameters,
        source=TensorSource(
            x[None], torch.tensor([[1.0, 0.0]]), {k: v[None] for k, v in cond.items()}, batch_size=1
        ),
        settings=settings,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        accelerator=accelerator_for(settings),
        hooks=(),
    )
    return model, losses


def plain(base: Path, folder: Path, model: LoadedModel) -> Any:
    """Return the aligned network by diffusers and peft alone."""
    name = model.family.network_name
    if (folder / "model_index.json").is_file():
        return getattr(DiffusionPipeline.from_pretrained(folder), name)
    pipeline = DiffusionPipeline.from_pretrained(base)
    if not has_lora_loader(model.family):
        return PeftModel.from_pretrained(getattr(pipeline, name), folder)
    expert = {"subfolder": "high_noise", "weight_name": "pytorch_lora_weights.safetensors"}
    pipeline.load_lora_weights(folder, **(expert if model.split else {}))
    return getattr(pipeline, name)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_two_steps_saved_and_loaded_by_plain_diffusers(
    videos: dict[str, Path], tmp_path: Path, case: str, kind: str
) -> None:
    config = ModelConfig(path=str(videos[case]), train=kind, lora=LORA)  # type: ignore[arg-type]
    model, losses = aligned(config, case)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    model.network.eval()
    x_t, t, cond = noisy(model, case)
    with listening(model.network) as told, torch.no_grad():
        ours = model.denoiser()(x_t, t, cond)
    save_aligned(model, tmp_path / "aligned", "card")
    base = load(ModelConfig(path=str(videos[case])))
    with torch.no_grad():
        back = replace(base, pipeline=load_aligned(config, tmp_path / "aligned")).denoiser()(x_t, t, cond)
        assert_close(back, ours, rtol=0, atol=LOADED)
        assert not torch.allclose(base.denoiser()(x_t, t, cond), ours, atol=1e-3)
        network = plain(videos[case], tmp_path / "aligned", model).eval()
        theirs = as_told(network, model, told[0], x_t)
    assert_close(theirs, ours, rtol=0, atol=LOADED)


def as_told(network: Any, model: LoadedModel, told: dict[str, Tensor], x_t: Tensor) -> Tensor:
    """Return a network's answer to the same tensors."""
    cond = {k: v for k, v in told.items() if k.startswith("encoder")}
    if model.family.name == "animatediff":
        cond = {"encoder_hidden_states": cond["encoder_hidden_states"][:: x_t.shape[2]]}
    if isinstance(network, PeftModel):
        network = network.base_model.model
    return model.family.call(network, x_t, told["timestep"], cond)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_predicts_the_same(
    videos: dict[str, Path], case: str, dtype: str, tolerance: float
) -> None:
    """Rounding errors alone, and every adapter has a float32 gradient."""
    exact = load(ModelConfig(path=str(videos[case])))
    x_t, t, cond = noisy(exact, case)
    config = ModelConfig(path=str(videos[case]), dtype=dtype, lora=LORA)  # type: ignore[arg-type]
    model = load(config)
    parameters = prepare_policy(model, config)
    prediction = policy_denoiser(model, config)(x_t, t, cond)
    with torch.no_grad():
        expected = exact.denoiser()(x_t, t, cond)
    assert prediction.dtype == getattr(torch, dtype)
    assert_close(prediction.detach().float(), expected, atol=tolerance, rtol=0)
    prediction.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in parameters)


def gradients(config: ModelConfig, case: str) -> tuple[dict[str, Tensor], int]:
    """Of every trained weight, and the bytes kept for them."""
    model = load(config)
    parameters = prepare_policy(model, config)
    x_t, t, cond = noisy(model, case)
    torch.manual_seed(0)
    model.denoiser()(x_t, t, cond).square().mean().backward()
    activations = Activations(model.network, config.gradient_checkpointing)
    with activations.watch():
        model.denoiser()(x_t, t, cond)
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}, activations.bytes


@pytest.mark.parametrize("case", ["wan", "cogvideox_5b", "ltx", "text_to_video", "animatediff"])
def test_checkpointing_changes_no_gradient_and_keeps_less(videos: dict[str, Path], case: str) -> None:
    """And the estimate, on fake tensors, keeps as many bytes as a real forward."""
    config = ModelConfig(path=str(videos[case]), train="full")
    whole, kept = gradients(config, case)
    saving = replace(config, gradient_checkpointing=True)
    again, kept_less = gradients(saving, case)
    assert whole.keys() == again.keys()
    for name, gradient in whole.items():
        assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)
    assert kept_less < 0.8 * kept
    height, width, frames = CASES[case][1]
    for told, real in ((config, kept), (saving, kept_less)):
        run = Run(model=told, data=DataConfig(height=height, width=width, frames=frames))
        assert count(workload_of(run), shapes_of(told)).activations == real


@pytest.mark.parametrize("case", ["wan_ti2v", "cogvideox_15"])
def test_an_estimate_is_of_the_model_that_is_loaded(videos: dict[str, Path], case: str) -> None:
    config = ModelConfig(path=str(videos[case]), lora=LORA)
    model = load(config)
    height, width, frames = CASES[case][1]
    run = Run(model=config, data=DataConfig(height=height, width=width, frames=frames))
    result = estimate(workload_of(run))
    assert result.network_parameters == sum(p.numel() for p in model.network.parameters())
    assert result.trainable_parameters == sum(p.numel() for _, p in prepare_policy(model, config))
    sides = f"{width} x {height} px, {frames} frames"
    assert dict(result.rows())["resolution"] == sides
    assert any(name.startswith("forward of one video") for name, _ in result.rows())
    with pytest.raises(UserError, match=r"data.frames=None; allowed with .*: a number of frames"):
        estimate(workload_of(replace(run, data=DataConfig(height=height, width=width))))


@pytest.mark.parametrize(
    ("name", "hub_id", "parameters"),
    [
        ("wan", None, 1_418_996_800),
        ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 14_288_491_584),
        ("wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", 14_288_491_584),  # of each expert
        ("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", 4_999_787_712),
        ("cogvideox", None, 1_693_783_872),
        ("cogvideox", "THUDM/CogVideoX-5b", 5_570_283_072),
        ("ltx", None, 1_923_385_472),
        ("ltx2", None, 18_876_174_592),
        ("hunyuan_video15", None, 8_326_608_160),
        ("text_to_video", None, 1_411_233_860),
        ("animatediff", None, 859_520_964 + 453_209_280),  # Stable Diffusion's UNet and the motion modules
    ],
)
def test_real_networks_build_without_weights(name: str, hub_id: str | None, parameters: int) -> None:
    with torch.device("meta"):
        network = Shapes(get_family(name), built_in(name, hub_id)).network()
    assert type(network).__name__ == get_family(name).network_class
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("wan", 126_892_531 + 5_680_910_336),  # UMT5-XXL's encoder
        # Gemma 3 12B, and what packs its states
        ("ltx2", 1_222_479_601 + 12_187_325_040 + 1_431_475_200),
        # Qwen2.5-VL-7B's text part and ByT5 small with the tokens of glyphs
        ("hunyuan_video15", 1_260_634_115 + 7_070_619_136 + 219_314_944),
        ("text_to_video", 83_653_863 + 340_387_840),  # CLIP ViT-H/14's text encoder without its last layer
    ],
)
def test_real_encoders(name: str, parameters: int) -> None:
    assert Shapes(get_family(name), built_in(name)).encoder_parameters() == parameters


def test_an_adapter_moves_the_known_shapes_of_stable_diffusion() -> None:
    config = ModelConfig(
        path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        motion_adapter="guoyww/animatediff-motion-adapter-v1-5-2",
    )
    shapes = shapes_of(config)
    assert shapes.family.name == "animatediff"
    assert shapes.latent_shape(512, 512, 16) == (4, 16, 64, 64)
    with torch.device("meta"):
        assert sum(p.numel() for p in shapes.network().parameters()) == 1_312_730_244
    with pytest.raises(UserError, match="with a model of sdxl"):
        shapes_of(replace(config, path="stabilityai/stable-diffusion-xl-base-1.0"))
