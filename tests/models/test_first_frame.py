"""LTX-Video's and Wan TI2V's image to video, whose first latent frame is the source, against the stock
pipelines."""

import json
import math
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffalign.config.schema import (
    LoraConfig,
    ModelConfig,
    ValidationConfig,
)
from diffalign.diffusion import first_frame
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import PerFrame, denoising_error
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import derive
from diffalign.diffusion.samplers import DDIM, trajectory
from diffalign.diffusion.spans import span_of
from diffalign.errors import UserError
from diffalign.estimate.shapes import shapes_of
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.export.aligned import load_aligned
from diffalign.media.sourced import SourcedPrompt
from diffalign.models.families.registry import FAMILIES
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.precision import only_errors
from diffalign.rollout.model import PipelineRolloutModel
from diffalign.runs.align import align
from diffalign.types import Noised
from tests.models.sourced_videos import rows_in, run_of
from tests.models.test_stock import listening
from tests.video_pipelines import make_ltx, make_wan, make_wan_i2v, make_wan_ti2v

SIZES = {"ltx_i2v": (64, 96, 9), "wan_ti2v": (32, 64, 5)}  # height, width, frames
STEPS, PROMPT = 4, "a red circle"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the models as they are published: as pipelines of text to video."""
    root = tmp_path_factory.mktemp("first_frame")
    with only_errors("diffusers"):
        return {"ltx_i2v": make_ltx(root / "ltx"), "wan_ti2v": make_wan_ti2v(root / "wan")}


def config_of(name: str, folders: dict[str, Path], **others: Any) -> ModelConfig:
    return ModelConfig(path=str(folders[name]), family=name, **others)


@pytest.fixture(params=SIZES)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LoadedModel:
    """Return the model, Wan's by Euler's method as the stock pipeline will be."""
    with only_errors("diffusers"):
        loaded = load(config_of(request.param, folders))
    if request.param == "wan_ti2v":
        loaded.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        loaded.path = RectifiedFlow(span=span_of(loaded.path))
    return loaded


def opened(name: str, folder: Path) -> Any:
    with only_errors("diffusers"):
        pipeline = getattr(diffusers, FAMILIES[name].pipeline).from_pretrained(folder)
    if name == "wan_ti2v":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(model: LoadedModel) -> Any:
    return opened(model.family.name, Path(model.source))


def picture(name: str, seed: int) -> Image.Image:
    height, width, _ = SIZES[name]
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def conditions(model: LoadedModel, seed: int = 0) -> dict[str, Tensor]:
    """Return what a cache holds of a prompt and its source."""
    taken = model.sources
    assert taken is not None and taken.needed
    image = np.array(picture(model.family.name, seed))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    return model.encode_prompts([PROMPT]) | taken.encode(pixels, SIZES[model.family.name][2])


def noise_of(model: LoadedModel) -> Tensor:
    shape = model.latent_shape(*SIZES[model.family.name])
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def drawn(pipeline: Any, name: str, noise: Tensor, source: Tensor, guidance: float = 1.0) -> Tensor:
    """Return the stock pipeline's video; LTX's is handed the source's mean, of which it takes a sample."""
    height, width, frames = SIZES[name]
    if name == "ltx_i2v":
        noise = pipeline._pack_latents(torch.cat([source, noise[:, :, 1:]], 2))
    shown: Tensor = pipeline(
        image=picture(name, 0), prompt=PROMPT, latents=noise, num_inference_steps=STEPS, height=height,
        width=width, num_frames=frames, guidance_scale=guidance, output_type="pt",
    ).frames  # fmt: skip
    return shown.transpose(1, 2)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_same_noise_and_source_give_the_stock_pipelines_video(
    model: LoadedModel, guidance: float
) -> None:
    noise, cond = noise_of(model), conditions(model)
    denoiser: Any = model.sampler()
    if guidance != 1:
        denoiser = Guided(denoiser, model.negative(1), guidance)
    times = model.grid(STEPS, tuple(noise.shape[1:]))
    with torch.no_grad():
        final = trajectory(denoiser, DDIM(), noise, times, cond, torch.Generator())[-1].x_s
        shown = model.decode(final)
    assert_close(final[:, :, :1], cond[first_frame.NAME], rtol=1e-5, atol=1e-5)
    expected = drawn(stock(model), model.family.name, noise, cond[first_frame.NAME], guidance)
    assert_close(shown, expected, rtol=1e-4, atol=1e-4)


def test_the_network_is_told_what_the_stock_pipeline_tells_it(model: LoadedModel) -> None:
    pipeline, noise, cond = stock(model), noise_of(model), conditions(model)
    with listening(pipeline.transformer) as expected:
        drawn(pipeline, model.family.name, noise, cond[first_frame.NAME])
    first = model.grid(STEPS, tuple(noise.shape[1:]))[:1].float()
    with listening(model.network) as told, torch.no_grad():
        model.denoiser()(noise, first, cond)
    assert told[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert_close(told[0][name], value, rtol=1e-5, atol=1e-5, check_dtype=False)
    per_frame = told[0]["timestep"].unflatten(1, (noise.shape[2], -1))
    assert not per_frame[:, 0].any() and (per_frame[:, 1:] == 1000 * first.item()).all()
    shapes = model.family.cond_shapes(
        {"transformer": model.network_config, "text_encoder": model.pipeline.text_encoder.config.to_dict()}
    )
    told_of = {first_frame.NAME: (noise.shape[1], 1, *noise.shape[3:])}
    assert {name: tuple(value.shape[1:]) for name, value in cond.items()} == shapes | told_of


def test_another_source_changes_the_other_frames(model: LoadedModel) -> None:
    noise, t = noise_of(model), torch.tensor([0.9])
    with torch.no_grad():
        one, other = (model.denoiser()(noise, t, conditions(model, seed))[:, :, 1:] for seed in (0, 1))
    assert float((one - other).abs().max()) > 1e-4 * float(one.abs().max())


@pytest.mark.parametrize("time", [1e-3, 0.02, 0.7, 1.0])
def test_a_given_frame_has_no_error_and_no_gradient(model: LoadedModel, time: float) -> None:
    cond, eps, t = conditions(model), noise_of(model), torch.tensor([time])
    x0 = first_frame.clean(torch.randn(eps.shape, generator=torch.Generator().manual_seed(4)), cond)
    assert torch.equal(x0[:, :, :1], cond[first_frame.NAME])
    z = Noised(x0=x0, t=t, eps=eps, x_t=(1 - time) * x0 + time * eps)
    errors = denoising_error(model.denoiser(), z, cond, PerFrame())
    assert float(errors[0, 0]) < 1e-6 and float(errors[0, 1:].min()) > 0.1
    model.network.requires_grad_(True)
    errors = denoising_error(model.denoiser(), z, cond, PerFrame())
    weights = list(model.network.parameters())
    given, other = (
        torch.autograd.grad(e, weights, retain_graph=True, allow_unused=True) for e in errors[0, :2]
    )
    assert not any(g is not None and g.any() for g in given)
    assert any(g is not None and g.any() for g in other)


def test_half_precision_ends_at_the_source_as_well(folders: dict[str, Path]) -> None:
    with only_errors("diffusers"):
        model = load(config_of("ltx_i2v", folders, dtype="bfloat16"))
    cond, noise = conditions(model), noise_of(model)
    times = model.grid(STEPS, tuple(noise.shape[1:]))
    with torch.no_grad():
        final = trajectory(model.denoiser(), DDIM(), noise, times, cond, torch.Generator())[-1].x_s
    assert_close(final[:, :, :1], cond[first_frame.NAME], rtol=1e-5, atol=1e-5)


def test_what_is_known_of_a_first_frame_is_for_flows_and_finite_at_time_zero() -> None:
    x, cond = torch.ones(2, 3, 4, 2, 2), {first_frame.NAME: torch.ones(2, 3, 1, 2, 2)}
    prediction, t = torch.full_like(x, 5.0), torch.zeros(2)
    told = first_frame.known(prediction, x, t, cond, "flow")
    assert not told[:, :, 0].any() and (told[:, :, 1:] == 5).all()
    assert first_frame.known(prediction, x, t, {}, "eps") is prediction
    assert first_frame.clean(x, {}) is x
    with pytest.raises(ValueError, match="for flows, and the network predicts v"):
        first_frame.known(prediction, x, t, cond, "v")


def sourced(name: str, seed: int) -> SourcedPrompt:
    stream = BytesIO()
    picture(name, seed).save(stream, "PNG")
    return SourcedPrompt(PROMPT, stream.getvalue())


def test_videos_are_drawn_from_their_own_sources(model: LoadedModel) -> None:
    name = model.family.name
    height, width, frames = SIZES[name]
    settings = SamplingSettings(STEPS, 1.0, height, width, num_frames=frames, fps=8)
    prompts = [sourced(name, 0), sourced(name, 1)]
    samples: Any = generate(model.pipeline, prompts, settings, batch_size=2, progress=False)
    shown = [sample.source.frames for sample in samples]
    for prompt, got in zip(prompts, shown, strict=True):
        generator = torch.Generator().manual_seed(derive(0, PROMPT, prompt.digest, 0))
        rate = {"frame_rate": 8} if name == "ltx_i2v" else {}
        expected = stock(model)(
            image=prompt.image, prompt=PROMPT, num_inference_steps=STEPS, height=height, width=width,
            num_frames=frames, guidance_scale=1.0, generator=generator, output_type="pt", **rate,
        ).frames[0]  # fmt: skip
        assert float((got.float() / 255 - expected).abs().max()) <= 1.5 / 255
    assert int((shown[0].int() - shown[1].int()).abs().max()) > 8
    with pytest.raises(UserError, match="draws nothing without a source image"):
        generate(model.pipeline, [PROMPT], settings, progress=False)


@pytest.mark.parametrize("name", [*SIZES, "wan_i2v"])
def test_rollouts_encode_the_source_for_their_number_of_frames(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """A source among grey frames (Wan 2.1's) is as long as the video."""
    with only_errors("diffusers"):
        config = config_of(name, folders) if name in SIZES else ModelConfig(path=str(make_wan_i2v(tmp_path)))
        model = load(config)
    height, width, frames = SIZES.get(name, (32, 48, 5))
    rolling = PipelineRolloutModel(model, (height, width), frames=frames)
    cond, negative = rolling.encode([sourced(name if name in SIZES else "wan_ti2v", 0)])
    key, length = (first_frame.NAME, 1) if name in SIZES else ("source", rolling.shape[1])
    assert cond[key].shape == (1, rolling.shape[0], length, *rolling.shape[2:]) and key not in negative
    noise = torch.randn(1, *rolling.shape)
    with torch.no_grad():
        assert model.denoiser()(noise, torch.tensor([0.5]), cond).shape == noise.shape


@pytest.mark.parametrize("name", SIZES)
def test_a_model_trained_on_sources_is_loaded_by_plain_diffusers(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    pairs, config = (
        rows_in(tmp_path / "rows", SIZES[name], partial(picture, name)),
        config_of(name, folders, lora=LoraConfig(rank=2)),
    )
    validation = ValidationConfig(every=2, prompts=(str(pairs),), sampling_steps=2, guidance=1.0)
    with only_errors("diffusers"):
        result = align(
            run_of(config, pairs, tmp_path / "run", SIZES[name], validation=validation), lambda line: None
        )
        assert result.aligned is not None
        ours, plain = load_aligned(config, result.aligned), opened(name, folders[name])
        model = load(config)
    first = json.loads((result.output / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(list((result.output / "samples" / "step-000002").glob("*.mp4"))) == 6
    ours.scheduler = plain.scheduler
    ours.set_progress_bar_config(disable=True)
    noise, source = noise_of(model), conditions(model)[first_frame.NAME]
    base = drawn(plain, name, noise, source)
    plain.load_lora_weights(str(result.aligned))
    expected = drawn(ours, name, noise, source)
    assert_close(drawn(plain, name, noise, source), expected, rtol=0, atol=1e-5)
    assert float((expected - base).abs().max()) > 1e-4
    card = (result.aligned / "README.md").read_text()
    assert f"{FAMILIES[name].pipeline}.from_pretrained" in card and "pipeline_tag: image-to-video" in card
    assert 'image=load_image("source.png")' in card


@pytest.mark.parametrize("name", SIZES)
def test_batches_have_the_source_in_the_place_of_the_first_frame(
    folders: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.data.batches import source as batches

    seen: list[Any] = []
    assemble = batches.assemble
    monkeypatch.setattr(batches, "assemble", lambda *a, **k: seen.append(assemble(*a, **k)) or seen[-1])
    pairs = rows_in(tmp_path / "rows", SIZES[name], partial(picture, name))
    config = config_of(name, folders, lora=LoraConfig(rank=2))
    with only_errors("diffusers"):
        align(run_of(config, pairs, tmp_path / "run", SIZES[name]), lambda line: None)
    assert seen
    for batch in seen:
        given = batch.cond[first_frame.NAME]
        assert torch.equal(batch.x[:, :, :1], given) and (given[0::2] == given[1::2]).all()
        assert not torch.equal(batch.x[0::2, :, 1:], batch.x[1::2, :, 1:])


def test_rows_without_a_source_are_refused_and_sources_by_text_to_video(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    name, size = "ltx_i2v", SIZES["ltx_i2v"]
    pairs = rows_in(tmp_path / "without", size, partial(picture, name), sourced=False)
    with pytest.raises(UserError, match=r"no source image, and the model draws nothing without one"):
        align(run_of(config_of(name, folders), pairs, tmp_path / "a", size), lambda line: None)
    pairs, plain = (
        rows_in(tmp_path / "with", size, partial(picture, name)),
        ModelConfig(path=str(folders[name])),
    )
    with pytest.raises(UserError, match=r"the row has a source image.*the model takes none"):
        align(run_of(plain, pairs, tmp_path / "b", size), lambda line: None)
    with pytest.raises(
        UserError, match=r"1 frame with an image-to-video model whose first one is the source"
    ):
        align(run_of(config_of(name, folders), pairs, tmp_path / "c", (64, 96, 1)), lambda line: None)


def test_a_folder_of_text_to_video_is_read_as_it_says_and_as_the_family_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with only_errors("diffusers"):
        for name, usual in (("ltx_i2v", "ltx"), ("wan_ti2v", "wan")):
            assert load(ModelConfig(path=str(folders[name]))).family.name == usual
            own = load(config_of(name, folders))
            assert own.family.name == name and type(own.pipeline).__name__ == FAMILIES[name].pipeline
        own.pipeline.save_pretrained(tmp_path / "saved")
        saved = load(ModelConfig(path=str(tmp_path / "saved"), family="wan_ti2v"))
        assert saved.family.name == "wan_ti2v"
        with pytest.raises(UserError, match=r"without expand_timesteps.*allowed: Wan2.2-TI2V-5B"):
            load(ModelConfig(path=str(make_wan(tmp_path / "wan")), family="wan_ti2v"))
        with pytest.raises(UserError, match=r"model.family='ltx_i2v', but .* is wan"):
            load(ModelConfig(path=str(tmp_path / "wan"), family="ltx_i2v"))


@pytest.mark.parametrize(
    ("path", "family", "parameters", "latents"),
    [
        ("Lightricks/LTX-Video", "ltx_i2v", 1_923_385_472, (128, 16, 16, 22)),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan_ti2v", 4_999_787_712, (48, 31, 44, 80)),
    ],
)
def test_real_networks_build_without_weights(
    path: str, family: str, parameters: int, latents: tuple[int, ...]
) -> None:
    shapes = shapes_of(ModelConfig(path=path, family=family))
    with torch.device("meta"):
        network = shapes.network()
    assert shapes.family.name == family
    assert sum(p.numel() for p in network.parameters()) == parameters
    size = {"ltx_i2v": (512, 704, 121), "wan_ti2v": (704, 1280, 121)}[family]
    assert shapes.latent_shape(*size) == latents
    assert shapes.cond_shapes(latents)[first_frame.NAME] == (latents[0], 1, *latents[2:])
