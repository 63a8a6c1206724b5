"""The video families against the stock pipelines, on tiny random ones of the real classes."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.testing import assert_close

from diffalign.config.schema import ModelConfig
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.samplers import DDIM, clean_and_noise, trajectory
from diffalign.diffusion.times import LogitNormal, fitted
from diffalign.errors import UserError
from diffalign.estimate.shapes import shapes_of
from diffalign.export.aligned import absent_components
from diffalign.models.families.registry import FAMILIES
from diffalign.models.loaded import LoadedModel, plain_config
from diffalign.models.loading import load
from diffalign.models.lora import prepare_policy
from diffalign.models.precision import only_errors
from tests import video_pipelines as made
from tests.models.test_stock import listening
from tests.tiny_pipelines import make_sd15
from tests.video_pipelines import CASES

PROMPTS = ["a red circle", "two"]
STEPS = 4


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def video(case: str, videos: dict[str, Path]) -> LoadedModel:
    """Return the model; Wan's samples by Euler's method, which the stock pipeline can be compared in."""
    with only_errors("diffusers"):
        model = load(ModelConfig(path=str(videos[case])))
    if model.family.name == "wan":
        model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        assert isinstance(model.path, RectifiedFlow)
        model.path = RectifiedFlow(span=model.path.span)
    return model


@pytest.fixture
def stock(case: str, videos: dict[str, Path], video: LoadedModel) -> Any:
    """Return the pipeline as diffusers loads it."""
    with only_errors("diffusers"):
        pipeline = DiffusionPipeline.from_pretrained(videos[case])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(video.pipeline.scheduler).from_config(video.pipeline.scheduler.config)
    return pipeline


def noise_of(model: LoadedModel, case: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(PROMPTS), *model.latent_shape(*CASES[case][1]), generator=generator)


def drawn(pipeline: Any, case: str, noise: Tensor, guidance: float, output: str) -> Tensor:
    """Return the stock pipeline's samples from the noise: latents or frames, (B, C, F, h, w)."""
    height, width, frames = CASES[case][1]
    if case == "ltx2":
        return drawn_without_sound(pipeline, case, noise, guidance, output)
    told = {} if case == "hunyuan_video15" else {"guidance_scale": guidance}
    if case == "hunyuan_video15":
        pipeline.guider = ClassifierFreeGuidance(guidance_scale=guidance)
        pipeline.vae.enable_slicing()  # it decodes no two videos at once
    if case == "ltx":
        latents = pipeline._pack_latents(noise, 1, 1)
    else:
        latents = noise.transpose(1, 2) if case.startswith("cogvideox") else noise
    result: Tensor = pipeline(
        PROMPTS, latents=latents, num_inference_steps=STEPS, height=height, width=width, num_frames=frames,
        output_type=output, **told,
    ).frames  # fmt: skip
    if output == "latent" and case == "ltx":
        return pipeline._unpack_latents(result, *noise.shape[2:])
    return result if output == "latent" and not case.startswith("cogvideox") else result.transpose(1, 2)


def drawn_without_sound(pipeline: Any, case: str, noise: Tensor, guidance: float, output: str) -> Tensor:
    """Return LTX-2's samples with its switch between video and sound off, by classifier-free guidance."""
    height, width, frames = CASES[case][1]
    with pytest.MonkeyPatch.context() as patch:
        forward = pipeline.transformer.forward

        @functools.wraps(forward)
        def isolated(**told: Any) -> Any:
            return forward(**{**told, "isolate_modalities": True})

        patch.setattr(pipeline.transformer, "forward", isolated)
        plain = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
        result: Tensor = pipeline(
            PROMPTS, latents=pipeline._pack_latents(noise, 1, 1), num_inference_steps=STEPS, height=height,
            width=width, num_frames=frames, output_type=output, guidance_scale=guidance,
            spatio_temporal_guidance_blocks=None, **plain,
            **{f"audio_{name}": value for name, value in plain.items()}, audio_guidance_scale=guidance,
        ).frames  # fmt: skip
    if output != "latent":
        return result.transpose(1, 2)
    vae = pipeline.vae
    normal: Tensor = pipeline._normalize_latents(
        result, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    return normal


def ours(model: LoadedModel, noise: Tensor, guidance: float) -> Tensor:
    denoiser: Any = model.sampler()
    if guidance != 1:
        denoiser = Guided(denoiser, model.negative(len(PROMPTS)), guidance)
    times, cond = model.grid(STEPS, tuple(noise.shape[1:])), model.encode_prompts(PROMPTS)
    whole = not model.pipeline.scheduler.config.get("set_alpha_to_one")
    with torch.no_grad():
        steps = trajectory(denoiser, DDIM(), noise, times if whole else times[:-1], cond, torch.Generator())
        last = steps[-1]
        return last.x_s if whole else clean_and_noise(denoiser, last.x_s, last.s, cond)[0]


def test_what_stands_in_quotation_marks_is_read_by_byt5(videos: dict[str, Path]) -> None:
    prompts = ['a sign "two"', "a red circle"]
    model = load(ModelConfig(path=str(videos["hunyuan_video15"])))
    encoded, negative = model.encode_prompts(prompts), model.negative(2)
    names = ("hidden_states", "attention_mask", "hidden_states_2", "attention_mask_2")
    for ours, texts in ((encoded, prompts), (negative, ["", ""])):
        with torch.no_grad():
            expected = model.pipeline.encode_prompt(texts, device="cpu", batch_size=2)
        for name, value in zip(names, expected, strict=True):
            assert_close(ours[f"encoder_{name}"], value.float())
    assert encoded["encoder_attention_mask_2"].any(1).tolist() == [True, False]
    shorter = load(ModelConfig(path=str(videos["hunyuan_video15"]), max_sequence_length=700))
    assert_close(
        shorter.encode_prompts(prompts)["encoder_hidden_states"], encoded["encoder_hidden_states"][:, :700]
    )


def test_prompts_are_encoded_as_the_stock_pipeline_does(video: LoadedModel, stock: Any, case: str) -> None:
    if case == "hunyuan_video15":
        pytest.skip("has a second reader: see above")
    guided = {"do_classifier_free_guidance": True, "device": "cpu"}
    if video.family.name in ("animatediff", "text_to_video"):
        guided["num_images_per_prompt"] = 1
    else:  # what its __call__ asks for
        usual = {"wan": 512, "cogvideox": 226, "ltx": 128, "ltx2": 1024}
        guided["max_sequence_length"] = usual[video.family.name]
    with torch.no_grad():
        expected = stock.encode_prompt(prompt=PROMPTS, **guided)
    encoded, negative = video.encode_prompts(PROMPTS), video.negative(2)
    if video.family.name == "ltx2":  # packed by what stands between encoder and network
        with torch.no_grad():
            positive, _, mask = stock.connectors(*expected[:2], padding_side="left")
            away, _, away_mask = stock.connectors(*expected[2:], padding_side="left")
        expected = (positive, mask, away, away_mask)
    if video.family.name in ("ltx", "ltx2"):
        positive, mask, away, away_mask = expected
        assert torch.equal(encoded["encoder_attention_mask"], mask.float())
        assert torch.equal(negative["encoder_attention_mask"], away_mask.float())
    else:
        positive, away = expected
    assert_close(encoded["encoder_hidden_states"], positive)
    assert_close(negative["encoder_hidden_states"], away)
    components = {name: plain_config(getattr(video.pipeline, name)) for name in video.text_encoders}
    shapes = video.family.cond_shapes({video.family.network_name: video.network_config, **components})
    assert {name: tuple(value.shape[1:]) for name, value in encoded.items()} == shapes
    assert all(value.dtype == torch.float32 for value in (*encoded.values(), *negative.values()))


def test_the_network_is_told_what_the_stock_pipeline_tells_it(
    video: LoadedModel, stock: Any, case: str
) -> None:
    noise = noise_of(video, case)
    with listening(getattr(stock, video.family.network_name)) as expected:
        drawn(stock, case, noise, 1.0, "latent")
    first = video.grid(STEPS, tuple(noise.shape[1:]))[:1].float().expand(len(noise))
    with listening(video.network) as told, torch.no_grad():
        video.denoiser()(noise, first, video.encode_prompts(PROMPTS))
    if case == "ltx2":  # sound, and places that the network computes itself from the sizes told
        expected[0] = {k: v for k, v in expected[0].items() if "audio" not in k and "coords" not in k}
        told[0] = {k: v for k, v in told[0].items() if "audio" not in k}
    for tensors in (told[0], expected[0]):  # an image's, which are masked, and none
        tensors.pop("image_embeds", None)
    assert told[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        if case == "wan_ti2v" and name == "timestep":  # told to every token; equal ones
            value = value.unique().expand(len(noise))
        here = told[0][name]
        assert_close(here, value.expand_as(here), check_dtype=False)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_same_seed_gives_the_stock_pipelines_video(
    video: LoadedModel, stock: Any, case: str, guidance: float
) -> None:
    noise = noise_of(video, case)
    latents = ours(video, noise, guidance)
    assert_close(latents, drawn(stock, case, noise, guidance, "latent"), rtol=1e-4, atol=1e-4)
    shown = drawn(stock, case, noise, guidance, "pt")
    assert shown.shape[2:] == (CASES[case][1][2], *CASES[case][1][:2])
    assert_close(video.decode(latents), shown, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(latents, ours(video, noise, 5.0 - guidance), rtol=0, atol=2e-4)


def test_a_decoder_that_takes_a_time_is_told_the_stock_one(tmp_path: Path) -> None:
    folder = made.make_ltx(tmp_path / "ltx", timed_decoder=True)
    model, pipeline = load(ModelConfig(path=str(folder))), DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_of(model, "ltx")
    shown = drawn(pipeline, "ltx", noise, 1.0, "pt")
    assert_close(model.decode(ours(model, noise, 1.0)), shown, rtol=1e-4, atol=1e-4)


def test_wans_grid_is_unipcs_shifted_sigmas(videos: dict[str, Path]) -> None:
    """s t / (1 + (s - 1) t) of t evenly spaced from 1 to 0.001 and without that end, s = 3."""
    model = load(ModelConfig(path=str(videos["wan"])))
    grid = model.grid(5, model.latent_shape(32, 48, 5))
    t = torch.linspace(1, 0.001, 6, dtype=torch.float64)[:5]
    assert isinstance(model.path, RectifiedFlow) and model.target == "flow"
    assert_close(grid, torch.cat([3 * t / (1 + 2 * t), torch.zeros(1)]).double(), atol=1e-6, rtol=0)
    assert grid[0] == 1


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
def test_wans_network_is_told_unipcs_whole_numbers(videos: dict[str, Path], shift: float) -> None:
    """The stock pipeline says 999 at the start and 964 of 964.3, in rollouts as in training."""
    model = load(ModelConfig(path=str(videos["wan"])))
    kind: Any = type(model.pipeline.scheduler)
    model.pipeline.scheduler = kind.from_config(model.pipeline.scheduler.config, flow_shift=shift)
    for steps in (1, 2, 3, 4, 5, 8, 10, 20, 25, 30, 40, 50):
        grid = model.grid(steps, model.latent_shape(32, 48, 5))
        model.pipeline.scheduler.set_timesteps(steps)
        for dtype in (torch.float32, torch.float64):
            told = model.denoiser().path.model_time(grid[:-1].to(dtype))
            assert told.tolist() == model.pipeline.scheduler.timesteps.tolist()
    assert model.path.model_time(torch.tensor([1.0, 0.75, 0.9643])).tolist() == [999, 750, 964]


@pytest.mark.parametrize("name", ["sd3", "flux", "ltx"])
def test_a_dynamic_shift_is_the_one_that_the_stock_pipeline_samples_by(
    name: str, folders: dict[str, Path], videos: dict[str, Path]
) -> None:
    folder = (folders | videos)[name]
    model = load(ModelConfig(path=str(folder)))
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent_components(model)))
    pipeline.set_progress_bar_config(disable=True)
    frames = 9 if name == "ltx" else 1
    video = {"num_frames": frames} if name == "ltx" else {}
    set_timesteps, told = pipeline.scheduler.set_timesteps, []

    @functools.wraps(set_timesteps)
    def noting(*given: Any, **named: Any) -> None:
        told.append(named["mu"])
        set_timesteps(*given, **named)

    pipeline.scheduler.set_timesteps = noting
    pipeline("a", height=64, width=96, num_inference_steps=2, output_type="latent", **video)
    sampler = fitted(LogitNormal(std=1e-9, shift="dynamic"), model.path, model.latent_shape(64, 96, frames))
    t = sampler(1, torch.Generator().manual_seed(0)).item()  # s / 2 / (1 + (s - 1) / 2)
    assert math.log(t / (1 - t)) == pytest.approx(told[0], abs=1e-6)


def test_what_belongs_to_sound_is_not_trained(videos: dict[str, Path]) -> None:
    """And every other weight of LTX-2 has a gradient."""
    for train in ("lora", "full"):
        config = ModelConfig(path=str(videos["ltx2"]), train=train)  # type: ignore[arg-type]
        model = load(config)
        parameters = prepare_policy(model, config)
        x = noise_of(model, "ltx2")
        model.denoiser()(x, torch.tensor([0.5, 0.5]), model.encode_prompts(PROMPTS)).square().sum().backward()
        assert not [name for name, p in parameters if p.grad is None or "audio" in name]
        assert any("audio" in name for name, _ in model.network.named_parameters())


def test_a_motion_adapter_makes_animatediff_of_stable_diffusion(tmp_path: Path) -> None:
    base, adapter = make_sd15(tmp_path / "sd15"), made.make_motion_adapter(tmp_path / "motion")
    config = ModelConfig(path=str(base), motion_adapter=str(adapter))
    model = load(config)
    assert (model.family.name, load(ModelConfig(path=str(base))).family.name) == ("animatediff", "sd15")
    weights = dict(model.network.named_parameters())
    image = load(ModelConfig(path=str(base)))
    assert all(torch.equal(weights[name], p) for name, p in image.network.named_parameters())
    motion = made.MotionAdapter.from_pretrained(adapter)
    assert all(torch.equal(weights[name], p) for name, p in motion.named_parameters())
    assert len(weights) == len(list(image.network.parameters())) + len(list(motion.parameters()))
    # linear from 0.00085 to 0.012, where the image model's is the square of a line
    assert_close(1 - model.path.alphas_cumprod[0], torch.tensor(0.00085))
    betas = 1 - model.path.alphas_cumprod[1:].double() / model.path.alphas_cumprod[:-1].double()
    assert_close(betas, torch.linspace(0.00085, 0.012, 1000)[1:].double(), rtol=1e-2, atol=1e-6)
    model.pipeline.save_pretrained(tmp_path / "whole")
    again = load(ModelConfig(path=str(tmp_path / "whole")))
    assert again.family.name == "animatediff"
    noise = torch.randn(1, *model.latent_shape(64, 64, 3), generator=torch.Generator().manual_seed(0))
    x = (noise, torch.tensor([0.5]), model.encode_prompts(["a"]))
    with torch.no_grad():
        assert_close(again.denoiser()(*x), model.denoiser()(*x), rtol=0, atol=1e-5)
    shapes = shapes_of(config)
    with torch.device("meta"):
        assert sum(p.numel() for p in shapes.network().parameters()) == sum(
            p.numel() for p in model.network.parameters()
        )


def test_wrong_motion_adapters_are_user_errors(tmp_path: Path, videos: dict[str, Path]) -> None:
    base, adapter = make_sd15(tmp_path / "sd15"), made.make_motion_adapter(tmp_path / "motion")
    for config, message in (
        (ModelConfig(path=str(base), motion_adapter="./nowhere"), "no such folder"),
        (ModelConfig(path=str(base), motion_adapter=str(base)), "no config.json"),
        (ModelConfig(path=str(base), motion_adapter=str(base / "unet")), "is a UNet2DConditionModel"),
        (ModelConfig(path=str(videos["wan"]), motion_adapter=str(adapter)), "model of wan.*a model of sd15"),
        (ModelConfig(path=str(base), family="animatediff"), "is sd15; allowed with model.motion_adapter"),
    ):
        with pytest.raises(UserError, match=message):
            load(config)


def test_animatediff_takes_as_many_frames_as_its_adapter_has_positions(videos: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(videos["animatediff"])))
    assert (model.usable_frames(16), model.usable_frames(5)) == (8, 5)
    with pytest.raises(UserError, match=r"data.frames=9; allowed with animatediff: such as 8"):
        model.latent_shape(64, 64, 9)


def test_a_card_names_its_pipeline(video: LoadedModel, case: str) -> None:
    assert type(video.pipeline).__name__ == FAMILIES[video.family.name].pipeline
    assert case in (
        video.family.name,
        *(f"{video.family.name}_{form}" for form in ("ti2v", "a14b", "5b", "15")),
    )


def test_tiles_are_switched_on_and_make_other_caches(case: str, videos: dict[str, Path]) -> None:
    with only_errors("diffusers"):
        tiled = load(ModelConfig(path=str(videos[case]), vae_tiling=True))
        plain = load(ModelConfig(path=str(videos[case])))
    assert tiled.pipeline.vae.use_tiling and tiled.pipeline.vae.use_slicing
    assert not plain.pipeline.vae.use_tiling and not plain.pipeline.vae.use_slicing
    assert tiled.fingerprint != plain.fingerprint
    noise = noise_of(plain, case)[..., :8, :8]
    assert_close(tiled.decode(noise), plain.decode(noise), rtol=1e-4, atol=1e-4)  # smaller than a tile
