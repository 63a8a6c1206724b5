"""What the stock pipelines do, done by our own parts: the same seed, the same image."""

import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from torch.testing import assert_close

from diffalign.config.schema import ModelConfig
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.samplers import DDIM, trajectory
from diffalign.export.aligned import absent_components
from diffalign.models.families.flux2_klein import empirical_mu
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from tests.tiny_pipelines import make_flux, make_sd3

PROMPTS = ["a red circle", "two"]
HEIGHT, WIDTH = 64, 96
STEPS = 4


def stock(model: LoadedModel, folder: Path) -> Any:
    """Load the pipeline by diffusers; DPM-Solver of order 1, which is DDIM, and ends as DDIM does."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent_components(model)))
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
        changes = {"solver_order": 1, "final_sigmas_type": "sigma_min"}
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **changes)
    return pipeline


def drawn(model: LoadedModel, pipeline: Any, noise: Tensor, guidance: float, output: str) -> Tensor:
    """Return the stock pipeline's samples from the noise; its latents as (B, C, h, w)."""
    arguments: dict[str, Any] = {"guidance_scale": guidance}
    if model.family.name == "flux":  # whose guidance_scale is the embedded one
        arguments = {"guidance_scale": 3.5, "true_cfg_scale": guidance, "negative_prompt": ""}
        noise = pipeline._pack_latents(noise, *noise.shape)
    elif model.family.name == "z_image":  # which counts what is added to the prediction with the prompt
        arguments["guidance_scale"] = guidance - 1
    elif model.family.name == "qwen_image":
        arguments = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(PROMPTS)}
        noise = pipeline._pack_latents(noise, *noise.shape)
    elif model.family.name.startswith("pixart"):
        arguments["use_resolution_binning"] = False
    images: Tensor = pipeline(
        prompt=list(PROMPTS), latents=noise, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH,
        output_type=output, **arguments,
    ).images  # fmt: skip
    if output == "latent" and model.family.name == "flux":
        images = pipeline._unpack_latents(images, HEIGHT, WIDTH, 8)
    elif output == "latent" and model.family.name == "qwen_image":
        images = pipeline._unpack_latents(images, HEIGHT, WIDTH, 8).squeeze(2)
    elif output == "latent" and model.family.name == "flux2_klein":  # which hands out the autoencoder's own
        mean, variance = (value.view(1, -1, 1, 1) for value in pipeline.vae.bn.buffers() if value.ndim)
        images = (pipeline._patchify_latents(images) - mean) / (variance + 1e-4).sqrt()
    return images


def conditions(model: LoadedModel) -> dict[str, Tensor]:
    sizes = torch.tensor([[HEIGHT, WIDTH]] * len(PROMPTS), dtype=torch.float32)
    return model.encode_prompts(PROMPTS) | model.micro_conditions(sizes, torch.zeros_like(sizes), sizes)


def noise_of(model: LoadedModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(PROMPTS), *model.latent_shape(HEIGHT, WIDTH), generator=generator)


def ours(model: LoadedModel, noise: Tensor, guidance: float) -> Tensor:
    denoiser: Any = model.denoiser()
    if guidance != 1:
        denoiser = Guided(denoiser, model.negative(len(PROMPTS)), guidance)
    times = model.grid(STEPS, tuple(noise.shape[1:]))
    with torch.no_grad():
        steps = trajectory(denoiser, DDIM(), noise, times, conditions(model), torch.Generator())
    return steps[-1].x_s


@contextmanager
def listening(network: nn.Module) -> Any:
    """Record the tensors of each call of a network, by the names of its forward's arguments."""
    heard: list[dict[str, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given |= given.pop("added_cond_kwargs", None) or {}
        for name in [name for name, value in given.items() if isinstance(value, list)]:
            given |= {f"{name}.{i}": value for i, value in enumerate(given[name])}
        heard.append({name: value for name, value in given.items() if isinstance(value, Tensor)})

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()


def test_the_network_is_told_what_the_stock_pipeline_tells_it(
    model: LoadedModel, folders: dict[str, Path]
) -> None:
    pipeline, noise = stock(model, folders[model.family.name]), noise_of(model)
    with listening(getattr(pipeline, model.family.network_name)) as expected:
        drawn(model, pipeline, noise, 1.0, "latent")
    first = model.grid(STEPS, tuple(noise.shape[1:]))[:1].float().expand(len(noise))
    with listening(model.network) as told, torch.no_grad():
        model.denoiser()(noise, first, conditions(model))
    assert told[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert_close(told[0][name], value.expand_as(told[0][name]), rtol=0, atol=0, check_dtype=False)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_same_seed_gives_the_stock_pipelines_image(
    model: LoadedModel, folders: dict[str, Path], guidance: float
) -> None:
    pipeline, noise = stock(model, folders[model.family.name]), noise_of(model)
    latents = ours(model, noise, guidance)
    assert_close(latents, drawn(model, pipeline, noise, guidance, "latent"), rtol=1e-4, atol=1e-4)
    shown = drawn(model, pipeline, noise, guidance, "pt")
    assert_close(model.decode(latents), shown, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents, ours(model, noise, 5.0 - guidance), atol=1e-2)


@pytest.mark.parametrize("t5_too", [False, True])
def test_sd3_as_it_was_first(tmp_path: Path, t5_too: bool) -> None:
    """A static shift, no norms of queries and keys, one attention a block; with and without its T5."""
    plain = {"qk_norm": None, "dual_attention_layers": ()}
    folder = make_sd3(tmp_path / "sd3", t5_too=t5_too, dynamic=False, **plain)
    model = load(ModelConfig(path=str(folder)))
    assert model.text_encoders == ("text_encoder", "text_encoder_2", "text_encoder_3")[: 2 + t5_too]
    assert model.encode_prompts(["a"])["encoder_hidden_states"].shape == (1, 16 + 256, 32)
    noise = noise_of(model)
    expected = drawn(model, stock(model, folder), noise, 4.0, "latent")
    assert_close(ours(model, noise, 4.0), expected, rtol=1e-4, atol=1e-4)


def test_flux_schnell_has_no_guidance_embedded_and_no_shift(tmp_path: Path) -> None:
    folder = make_flux(tmp_path / "flux", guided=False)
    model = load(ModelConfig(path=str(folder)))
    noise = noise_of(model)
    assert model.grid(STEPS, tuple(noise.shape[1:])).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    expected = drawn(model, stock(model, folder), noise, 1.0, "latent")
    assert_close(ours(model, noise, 1.0), expected, rtol=1e-4, atol=1e-4)


def test_a_dynamic_shift_grows_with_the_image(model: LoadedModel) -> None:
    """exp(mu) t / (1 + (exp(mu) - 1) t), mu on a line through (256 tokens, 0.5) and (4096, 1.15)."""
    if not model.pipeline.scheduler.config.get("use_dynamic_shifting"):
        pytest.skip("no dynamic shift")
    if model.family.name in ("flux2_klein", "qwen_image"):
        pytest.skip("a shift that depends on the number of steps, or is stretched to an end of its own")
    for side, mu in ((32, 0.5), (128, 1.15)):
        first = 1.0 if model.family.name == "flux" else None
        grid = model.grid(4, (16, side, side))
        factor = torch.tensor(mu, dtype=torch.float64).exp()
        unshifted = grid / (factor - (factor - 1) * grid)
        if first is not None:
            assert_close(unshifted[:4], torch.tensor([1, 0.75, 0.5, 0.25]).double(), atol=1e-6, rtol=0)
        assert_close(unshifted.diff()[:3], unshifted.diff()[:1].expand(3), atol=1e-6, rtol=0)


def test_flux_is_told_the_guidance_of_the_run(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["flux"]), embedded_guidance=7.0))
    with listening(model.network) as told, torch.no_grad():
        model.denoiser()(noise_of(model), torch.tensor([0.5, 0.25]), conditions(model))
    assert told[0]["guidance"].tolist() == [7.0, 7.0]
    assert told[0]["timestep"].tolist() == [0.5, 0.25]


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("side", [16, 64, 96])
def test_flux2s_shift_depends_on_the_steps(side: int, steps: int) -> None:
    assert empirical_mu(side**2, steps) == pytest.approx(compute_empirical_mu(side**2, steps), rel=1e-12)


def test_flux2s_latents_are_the_stock_pipelines(folders: dict[str, Path]) -> None:
    """Encoded, packed and normalised as a reference image of the pipeline is; decoded they are the image."""
    model = load(ModelConfig(path=str(folders["flux2_klein"])))
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_pixels(pixels)
    assert mean.shape == (2, *model.latent_shape(32, 64)) == (2, 16, 2, 4)
    with torch.no_grad():
        assert_close(mean, model.pipeline._encode_vae_image(pixels, None), rtol=1e-5, atol=1e-5)
        own = model.pipeline.vae.encode(pixels).latent_dist
        shown = model.pipeline.vae.decode(own.mean).sample / 2 + 0.5
    packed = model.pipeline._patchify_latents(own.std)
    assert_close(std * (model.pipeline.vae.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1), packed)
    assert_close(model.decode(mean), shown.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_qwens_latents_are_those_of_a_video_of_one_frame(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["qwen_image"])))
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_pixels(pixels)
    assert mean.shape == (2, *model.latent_shape(32, 64)) == (2, 16, 4, 8)
    vae = model.pipeline.vae
    center, width = (torch.tensor(vae.config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        own = vae.encode(pixels[:, :, None]).latent_dist
        shown = vae.decode(own.mean).sample[:, :, 0] / 2 + 0.5
    assert_close(mean, (own.mean[:, :, 0] - center) / width)
    assert_close(std, own.std[:, :, 0] / width)
    assert_close(model.decode(mean), shown.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_qwens_guidance_keeps_the_length_of_each_token(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["qwen_image"])))
    noise, t, cond = noise_of(model), torch.tensor([0.5, 0.25]), conditions(model)
    with torch.no_grad():
        plain = model.denoiser()(noise, t, cond)
        guided = Guided(model.denoiser(), model.negative(len(PROMPTS)), 4.0)(noise, t, cond)
    first, second = (value[1, :, 2:4, 4:6].norm() for value in (plain, guided))
    assert_close(first, second)
    assert not torch.allclose(plain, guided, atol=1e-2)
