"""Wan's image to video against the stock pipeline, on tiny random pipelines of 2.1's and A14B's forms."""

import json
import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffalign.config.schema import (
    LoraConfig,
    ModelConfig,
    ValidationConfig,
)
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import derive
from diffalign.diffusion.samplers import DDIM, trajectory
from diffalign.diffusion.spans import span_of
from diffalign.errors import UserError
from diffalign.estimate.shapes import shapes_of
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.export.aligned import load_aligned
from diffalign.media.sourced import SourcedPrompt
from diffalign.models.families.registry import get_family
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.precision import only_errors
from diffalign.runs.align import align
from tests.models.sourced_videos import rows_in, run_of
from tests.models.test_stock import listening
from tests.video_pipelines import make_wan, make_wan_i2v

HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 5, 4
SIZE = HEIGHT, WIDTH, FRAMES
PROMPT = "a red circle"
FORMS = ("wan_i2v", "wan_i2v_a14b")


@pytest.fixture(scope="session")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("i2v")
    with only_errors("diffusers"):
        return {name: make_wan_i2v(root / name, a14b=name.endswith("a14b")) for name in FORMS}


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, i2v: dict[str, Path]) -> LoadedModel:
    """Return the model, by Euler's method as the stock pipeline will be."""
    with only_errors("diffusers"):
        loaded = load(ModelConfig(path=str(i2v[request.param])))
    loaded.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    loaded.path = RectifiedFlow(span=span_of(loaded.path))
    return loaded


def stock(model: LoadedModel) -> Any:
    with only_errors("diffusers"):
        pipeline = DiffusionPipeline.from_pretrained(model.source)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def conditions(model: LoadedModel, image: Image.Image) -> dict[str, Tensor]:
    """Return what a cache holds of a prompt and its source."""
    taken = model.sources
    assert taken is not None and taken.needed
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return model.encode_prompts([PROMPT]) | taken.encode(pixels, FRAMES)


def noise_of(model: LoadedModel) -> Tensor:
    shape = model.latent_shape(HEIGHT, WIDTH, FRAMES)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def drawn(pipeline: Any, noise: Tensor, image: Image.Image, guidance: float = 1.0) -> Tensor:
    frames: Tensor = pipeline(
        image=image, prompt=PROMPT, latents=noise, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH,
        num_frames=FRAMES, guidance_scale=guidance, output_type="pt",
    ).frames  # fmt: skip
    return frames.transpose(1, 2)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_same_noise_and_source_give_the_stock_pipelines_video(
    model: LoadedModel, guidance: float
) -> None:
    noise, image = noise_of(model), picture(0)
    denoiser: Any = model.sampler()
    if guidance != 1:
        denoiser = Guided(denoiser, model.negative(1), guidance)
    times = model.grid(STEPS, tuple(noise.shape[1:]))
    with torch.no_grad():
        steps = trajectory(denoiser, DDIM(), noise, times, conditions(model, image), torch.Generator())
        shown = model.decode(steps[-1].x_s)
    assert_close(shown, drawn(stock(model), noise, image, guidance), rtol=1e-4, atol=1e-4)


def test_the_network_is_told_what_the_stock_pipeline_tells_it(model: LoadedModel) -> None:
    pipeline, noise, image = stock(model), noise_of(model), picture(0)
    with listening(pipeline.transformer) as expected:
        drawn(pipeline, noise, image)
    first = model.grid(STEPS, tuple(noise.shape[1:]))[:1].float()
    with listening(model.network) as told, torch.no_grad():
        model.denoiser()(noise, first, conditions(model, image))
    assert told[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert_close(told[0][name], value.expand_as(told[0][name]), rtol=1e-5, atol=1e-5, check_dtype=False)
    shapes = model.family.cond_shapes(
        {
            model.family.network_name: model.network_config,
            **{name: getattr(model.pipeline, name).config.to_dict() for name in model.text_encoders},
        }
    )
    source = {"source": model.latent_shape(HEIGHT, WIDTH, FRAMES)}
    cond = conditions(model, image)
    assert {name: tuple(value.shape[1:]) for name, value in cond.items()} == shapes | source


def test_another_source_changes_the_prediction(model: LoadedModel) -> None:
    noise, t = noise_of(model), torch.tensor([0.9])
    with torch.no_grad():
        one, other = (model.denoiser()(noise, t, conditions(model, picture(seed))) for seed in (0, 1))
    assert one.shape == noise.shape
    assert float((one - other).abs().max()) > 1e-4 * float(one.abs().max())


def test_the_vision_towers_states_alone_change_it(i2v: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(i2v["wan_i2v"])))
    noise, t, cond = noise_of(model), torch.tensor([0.9]), conditions(model, picture(0))
    other = cond | {"source_states": conditions(model, picture(1))["source_states"]}
    with torch.no_grad():
        one, two = (model.denoiser()(noise, t, told) for told in (cond, other))
    assert float((one - two).abs().max()) > 1e-5


def sourced(seed: int) -> SourcedPrompt:
    stream = BytesIO()
    picture(seed).save(stream, "PNG")
    return SourcedPrompt(PROMPT, stream.getvalue())


def test_videos_are_drawn_from_their_own_sources(model: LoadedModel) -> None:
    settings = SamplingSettings(STEPS, 1.0, HEIGHT, WIDTH, num_frames=FRAMES, fps=8)
    prompts = [sourced(0), sourced(1)]
    samples: Any = generate(model.pipeline, prompts, settings, batch_size=2, progress=False)
    shown = [sample.source.frames for sample in samples]
    for prompt, frames in zip(prompts, shown, strict=True):
        generator = torch.Generator().manual_seed(derive(0, PROMPT, prompt.digest, 0))
        expected = stock(model)(
            image=prompt.image, prompt=PROMPT, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH,
            num_frames=FRAMES, guidance_scale=1.0, generator=generator, output_type="pt",
        ).frames[0]  # fmt: skip
        assert float((frames.float() / 255 - expected).abs().max()) <= 1.5 / 255
    assert int((shown[0].int() - shown[1].int()).abs().max()) > 8
    with pytest.raises(UserError, match="draws nothing without a source image"):
        generate(model.pipeline, [PROMPT], settings, progress=False)


@pytest.mark.parametrize("name", FORMS)
def test_a_model_trained_on_sources_is_loaded_by_plain_diffusers(
    i2v: dict[str, Path], tmp_path: Path, name: str
) -> None:
    pairs = rows_in(tmp_path / "rows", SIZE, picture)
    expert: Any = "low" if name.endswith("a14b") else None
    config = ModelConfig(path=str(i2v[name]), expert=expert, lora=LoraConfig(rank=2))
    run = run_of(config, pairs, tmp_path / "run", SIZE)
    if run.model.expert is None:
        run = replace(
            run, validation=ValidationConfig(every=2, prompts=(str(pairs),), sampling_steps=2, guidance=1.0)
        )
    with only_errors("diffusers"):
        result = align(run, lambda line: None)
    assert result.aligned is not None
    first = json.loads((result.output / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    if run.model.expert is None:
        assert len(list((result.output / "samples" / "step-000002").glob("*.mp4"))) == 6
    with only_errors("diffusers"):
        ours = load_aligned(run.model, result.aligned)
        plain = DiffusionPipeline.from_pretrained(i2v[name])
    noise = torch.randn(1, 16, 2, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))
    for pipeline in (ours, plain):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline.set_progress_bar_config(disable=True)
    base = drawn(plain, noise, picture(0))
    if name.endswith("a14b"):
        plain.load_lora_weights(
            str(result.aligned), subfolder="low_noise", weight_name="pytorch_lora_weights.safetensors",
            load_into_transformer_2=True,
        )  # fmt: skip
    else:
        plain.load_lora_weights(str(result.aligned))
    expected = drawn(ours, noise, picture(0))
    assert_close(drawn(plain, noise, picture(0)), expected, rtol=0, atol=1e-5)
    assert float((expected - base).abs().max()) > 1e-4
    card = (result.aligned / "README.md").read_text()
    assert 'image=load_image("source.png")' in card and "pipeline_tag: image-to-video" in card


def test_rows_without_a_source_are_refused_and_sources_by_text_to_video(
    i2v: dict[str, Path], tmp_path: Path
) -> None:
    config = ModelConfig(path=str(i2v["wan_i2v"]), lora=LoraConfig(rank=2))
    pairs = rows_in(tmp_path / "without", SIZE, picture, sourced=False)
    with pytest.raises(UserError, match=r"no source image, and the model draws nothing without one"):
        align(run_of(config, pairs, tmp_path / "a", SIZE), lambda line: None)
    pairs = rows_in(tmp_path / "with", SIZE, picture)
    plain = ModelConfig(path=str(make_wan(tmp_path / "wan")), lora=LoraConfig(rank=2))
    with pytest.raises(UserError, match=r"the row has a source image.*the model takes none"):
        align(run_of(plain, pairs, tmp_path / "b", SIZE), lambda line: None)


def test_forms_that_are_called_in_another_way_are_refused(i2v: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_sequence_length=256 with Wan 2.1 image to video; allowed: 512"):
        load(ModelConfig(path=str(i2v["wan_i2v"]), max_sequence_length=256))
    pipeline = DiffusionPipeline.from_pretrained(i2v["wan_i2v"])
    pipeline.register_to_config(expand_timesteps=True)
    pipeline.save_pretrained(tmp_path / "ti2v")
    with pytest.raises(UserError, match=r"Wan2.2-TI2V-5B, whose first frame is marked by the times"):
        load(ModelConfig(path=str(tmp_path / "ti2v")))


@pytest.mark.parametrize(
    ("path", "expert", "parameters"),
    [
        # 14.29 billion of text to video, 36 channels in place of 16, and keys and values of the vision tower
        (
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            None,
            14_288_491_584 + 20 * 4 * 5120 + 40 * (2 * (5120 * 5120 + 5120) + 5120)
            + (2 * 1280 + 1280 * 1280 + 1280 + 1280 * 5120 + 5120 + 2 * 5120),
        ),
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "high", 14_288_491_584 + 20 * 4 * 5120),
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "low", 14_288_491_584 + 20 * 4 * 5120),
    ],
)  # fmt: skip
def test_real_networks_build_without_weights(path: str, expert: Any, parameters: int) -> None:
    shapes = shapes_of(ModelConfig(path=path, expert=expert))
    with torch.device("meta"):
        network = shapes.network()
    assert shapes.family.name == get_family("wan_i2v").name
    assert sum(p.numel() for p in network.parameters()) == parameters
    tower = {"source_states": (257, 1280)} if expert is None else {}
    assert shapes.cond_shapes((16, 21, 60, 104)) == {
        "encoder_hidden_states": (512, 4096), "source": (16, 21, 60, 104), **tower,
    }  # fmt: skip
    assert ("image_encoder" in shapes.encoders()) == (expert is None)
