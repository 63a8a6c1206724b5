"""Our components reproduce the stock pipelines: the same seed gives the same image."""

import inspect
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from torch.testing import assert_close

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.samplers import DDIM, trajectory
from diffalign.export.aligned import absent_components
from diffalign.models.families.flux2_klein import empirical_mu
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import prepare_policy
from tests.flow_pipelines import make_krea2, make_lumina2
from tests.tiny_pipelines import make_flux, make_sd3

PROMPTS = ["a red circle", "two"]
HEIGHT, WIDTH = 64, 96
STEPS = 4


def stock(model: LoadedModel, folder: Path) -> Any:
    """Load the pipeline by diffusers; DPM-Solver of order 1, which is DDIM, and ends as DDIM does."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent_components(model)))
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
        end = {} if pipeline.scheduler.config.use_flow_sigmas else {"final_sigmas_type": "sigma_min"}
        config = pipeline.scheduler.config
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=1, **end)
    return pipeline


PACKING = ("flux", "flux_kontext", "chroma", "qwen_image", "krea2")
"""Families whose pipelines take and give latents in a row."""

NO_GUIDANCE = ("flux2",)
"""Families whose stock pipeline has none but the embedded one."""


def told_guidance(model: LoadedModel, guidance: float) -> dict[str, Any]:
    """Return what the stock pipeline calls a guidance."""
    name = model.family.name
    if name in ("flux", "flux_kontext"):  # whose guidance_scale is the embedded one
        sized = {"max_area": HEIGHT * WIDTH} if name == "flux_kontext" else {}
        return {"guidance_scale": 3.5, "true_cfg_scale": guidance, "negative_prompt": "", **sized}
    if name == "flux2":
        return {"guidance_scale": 4.0}
    if name in ("z_image", "krea2"):  # which counts what is added to the prediction with the prompt
        return {"guidance_scale": guidance - 1}
    if name == "qwen_image":
        return {"true_cfg_scale": guidance, "negative_prompt": [""] * len(PROMPTS)}
    return {"guidance_scale": guidance}


def drawn(model: LoadedModel, pipeline: Any, noise: Tensor, guidance: float, output: str) -> Tensor:
    """Return the stock pipeline's samples from the noise; its latents as (B, C, h, w)."""
    name, arguments = model.family.name, told_guidance(model, guidance)
    if name == "kandinsky5":
        return drawn_alone(pipeline, noise, guidance, output)
    if name in PACKING:
        noise = pipeline._pack_latents(noise, *noise.shape)
    if name.startswith(("pixart", "sana")):
        arguments["use_resolution_binning"] = False
    images: Tensor = pipeline(
        prompt=list(PROMPTS), latents=noise, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH,
        output_type=output, **arguments,
    ).images  # fmt: skip
    if output != "latent":
        return images
    if name in PACKING:
        size = (HEIGHT, WIDTH) if name == "krea2" else (HEIGHT, WIDTH, 8)
        images = pipeline._unpack_latents(images, *size)
        images = images.squeeze(2) if images.ndim == 5 else images
    elif name == "flux2":
        images = images.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))
    elif name == "flux2_klein":  # which hands out the autoencoder's own
        mean, variance = (value.view(1, -1, 1, 1) for value in pipeline.vae.bn.buffers() if value.ndim)
        images = (pipeline._patchify_latents(images) - mean) / (variance + 1e-4).sqrt()
    return images


def drawn_alone(pipeline: Any, noise: Tensor, guidance: float, output: str) -> Tensor:
    """Return Kandinsky's samples of one prompt after the other, in a size that it does not know."""
    pipeline.resolutions = [(WIDTH, HEIGHT)]
    images = [
        pipeline(
            prompt=prompt, latents=x.permute(1, 2, 0)[None, None], num_inference_steps=STEPS, height=HEIGHT,
            width=WIDTH, output_type=output, guidance_scale=guidance,
        ).image
        for prompt, x in zip(PROMPTS, noise, strict=True)
    ]  # fmt: skip
    together = torch.cat(images)
    return together.squeeze(1).permute(0, 3, 1, 2) if output == "latent" else together


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
    if guidance != 1 and model.family.name in NO_GUIDANCE:
        pytest.skip("no guidance but the embedded one")
    pipeline, noise = stock(model, folders[model.family.name]), noise_of(model)
    latents = ours(model, noise, guidance)
    assert_close(latents, drawn(model, pipeline, noise, guidance, "latent"), rtol=1e-4, atol=1e-4)
    shown = drawn(model, pipeline, noise, guidance, "pt")
    assert_close(model.decode(latents), shown, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents, ours(model, noise, 5.0 - guidance), atol=1e-3)


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
    if model.family.name in ("flux2", "flux2_klein", "qwen_image"):
        pytest.skip("a shift that depends on the number of steps, or is stretched to an end of its own")
    high = 160 if model.family.name == "krea2" else 128  # its line ends at 6400 tokens
    for side, mu in ((32, 0.5), (high, 1.15)):
        first = 1.0 if model.family.name in ("flux", "flux_kontext", "chroma", "krea2") else None
        grid = model.grid(4, (16, side, side))
        factor = torch.tensor(mu, dtype=torch.float64).exp()
        unshifted = grid / (factor - (factor - 1) * grid)
        if first is not None:
            assert_close(unshifted[:4], torch.tensor([1, 0.75, 0.5, 0.25]).double(), atol=1e-6, rtol=0)
        assert_close(unshifted.diff()[:3], unshifted.diff()[:1].expand(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "usual"), [("flux", 3.5), ("flux2", 4.0)])
def test_flux_is_told_the_guidance_of_the_run(folders: dict[str, Path], name: str, usual: float) -> None:
    for guidance, expected in ((None, usual), (7.0, 7.0)):
        model = load(ModelConfig(path=str(folders[name]), embedded_guidance=guidance))
        with listening(model.network) as told, torch.no_grad():
            model.denoiser()(noise_of(model), torch.tensor([0.5, 0.25]), conditions(model))
        assert told[0]["guidance"].tolist() == [expected, expected]
        assert told[0]["timestep"].tolist() == [0.5, 0.25]


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("side", [16, 64, 96])
def test_flux2s_shift_depends_on_the_steps(side: int, steps: int) -> None:
    assert empirical_mu(side**2, steps) == pytest.approx(compute_empirical_mu(side**2, steps), rel=1e-12)


def test_kandinskys_latents_have_no_shift(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["kandinsky5"])))
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_pixels(pixels)
    with torch.no_grad():
        own = model.pipeline.vae.encode(pixels).latent_dist
        shown = model.pipeline.vae.decode(own.mean).sample / 2 + 0.5
    assert model.pipeline.vae.config.shift_factor
    assert_close(mean, own.mean * 1.5305)
    assert_close(std, own.std * 1.5305)
    assert_close(model.decode(mean), shown.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_kandinskys_prompts_are_read_alone(folders: dict[str, Path]) -> None:
    """Whatever stands beside a prompt in a batch, its prediction is the same, gradients included."""
    model = load(ModelConfig(path=str(folders["kandinsky5"])))
    noise, t = noise_of(model).requires_grad_(), torch.tensor([0.5, 0.25])
    cond = conditions(model)
    assert len(set(cond["encoder_attention_mask"].sum(1).tolist())) == 2
    both = model.denoiser()(noise, t, cond)
    for i in range(2):
        alone = model.denoiser()(noise[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()})
        assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        (one,) = torch.autograd.grad(alone.square().sum(), noise)
        (part,) = torch.autograd.grad(both[i].square().sum(), noise, retain_graph=True)
        assert_close(part, one, rtol=1e-3, atol=1e-5)


def test_kreas_few_step_model_has_a_fixed_shift(tmp_path: Path) -> None:
    folder = make_krea2(tmp_path / "krea2", distilled=True)
    model = load(ModelConfig(path=str(folder)))
    noise, shift = noise_of(model), math.exp(1.15)
    for side in (8, 64):
        assert model.grid(2, (16, side, side))[1].item() == pytest.approx(shift / (shift + 1), abs=1e-6)
    expected = drawn(model, stock(model, folder), noise, 4.0, "latent")
    assert_close(ours(model, noise, 4.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_flux2s_latents_are_the_stock_pipelines(folders: dict[str, Path], name: str) -> None:
    """Encoded, packed and normalised as a reference image of the pipeline is; decoded they are the image."""
    model = load(ModelConfig(path=str(folders[name])))
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


def test_sanas_latents_are_the_autoencoders_times_its_scale(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["sana"])))
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = model.encode_pixels(pixels)
    assert mean.shape == (2, *model.latent_shape(32, 64)) == (2, 4, 1, 2)
    with torch.no_grad():
        own = model.pipeline.vae.encode(pixels).latent
        shown = model.pipeline.vae.decode(own).sample / 2 + 0.5
    assert_close(mean, own * 0.41407)
    assert not std.any()
    assert_close(model.decode(mean), shown.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_sanas_network_is_told_whole_numbers_times_its_scale(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["sana"])))
    model.network.register_to_config(timestep_scale=0.001)
    with listening(model.network) as told, torch.no_grad():
        model.denoiser()(noise_of(model), torch.tensor([1.0, 0.7505]), conditions(model))
    assert_close(told[0]["timestep"], torch.tensor([0.999, 0.75]))


def test_luminas_guidance_keeps_the_length_of_each_row(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["lumina2"])))
    noise, t, cond = noise_of(model), torch.tensor([0.5, 0.25]), conditions(model)
    with torch.no_grad():
        plain = model.denoiser()(noise, t, cond)
        guided = Guided(model.denoiser(), model.negative(len(PROMPTS)), 4.0)(noise, t, cond)
    assert_close(guided[1, 5, 3].norm(), plain[1, 5, 3].norm())
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_luminas_dynamic_shift_counts_channels(tmp_path: Path) -> None:
    """16 of them on the line through (256, 0.5) and (4096, 1.15)."""
    folder = make_lumina2(tmp_path / "lumina2", dynamic=True)
    model = load(ModelConfig(path=str(folder)))
    noise = noise_of(model)
    grid, mu = model.grid(2, tuple(noise.shape[1:])), 0.5 - 240 * 0.65 / 3840
    assert grid[1].item() == pytest.approx(math.exp(mu) / (math.exp(mu) + 1), abs=1e-6)
    expected = drawn(model, stock(model, folder), noise, 1.0, "latent")
    assert_close(ours(model, noise, 1.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_chromas_checkpoints_keep_the_mask(folders: dict[str, Path], train: Any) -> None:
    """Which diffusers' own leave out of the single blocks: predictions and gradients are the same."""
    results = []
    for checkpointing in (False, True):
        lora = LoraConfig(rank=2, targets=("to_q", "proj_out"))
        config = ModelConfig(
            path=str(folders["chroma"]), train=train, lora=lora, gradient_checkpointing=checkpointing
        )
        model = load(config)
        parameters = prepare_policy(model, config)
        prediction = model.denoiser()(noise_of(model), torch.tensor([0.5, 0.25]), conditions(model))
        prediction.square().mean().backward()
        results.append({n: p.grad for n, p in parameters} | {"prediction": prediction.detach()})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)
