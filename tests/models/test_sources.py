"""Families that take a source image: own loop and stock pipeline agree, and the source is in every call."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffalign.cli import main
from diffalign.config.schema import ModelConfig
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.randomness import derive
from diffalign.diffusion.samplers import DDIM, trajectory
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import SamplingSettings, generate
from diffalign.evaluation.drawing.sources import source_arguments
from diffalign.media.sourced import SourcedPrompt
from diffalign.models.families.registry import FAMILIES, get_family
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.rollout.model import PipelineRolloutModel
from tests.models.test_stock import listening, stock

HEIGHT, WIDTH, STEPS = 64, 96, 3
PROMPT = "make it red"
TAKING = ("flux_kontext", "flux2_klein")


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def conditions(model: LoadedModel, image: Image.Image, prompt: str = PROMPT) -> dict[str, Tensor]:
    """Return what a cache holds of a prompt and its source."""
    taken, pixels = model.sources, pixels_of(image)
    assert taken is not None
    unit = pixels[None].float() / 127.5 - 1
    text = taken.encode_prompts([prompt], [pixels]) if taken.read else model.encode_prompts([prompt])
    return text | taken.encode(unit, 1)


def noise_of(model: LoadedModel) -> Tensor:
    shape = model.latent_shape(HEIGHT, WIDTH)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def drawn(model: LoadedModel, pipeline: Any, noise: Tensor, image: Image.Image, guidance: float) -> Tensor:
    arguments: dict[str, Any] = {"guidance_scale": guidance}
    if model.family.name == "flux_kontext":
        arguments = {"guidance_scale": 3.5, "true_cfg_scale": guidance, "negative_prompt": ""}
        arguments |= {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
        noise = pipeline._pack_latents(noise, *noise.shape)
    images: Tensor = pipeline(
        prompt=PROMPT, image=image, latents=noise, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH,
        output_type="pt", **arguments,
    ).images  # fmt: skip
    return images


@pytest.fixture(params=TAKING)
def editor(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LoadedModel:
    return load(ModelConfig(path=str(folders[request.param])))


def test_the_cards_say_which_families_take_a_source() -> None:
    for name, card in FAMILIES.items():
        taken = get_family(name).sources
        assert card.source == ("" if taken is None else "needed" if taken.needed else "taken"), name
    assert {name for name, card in FAMILIES.items() if card.source} >= set(TAKING)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sdxl", "source image: refused"),
        ("flux2_klein", "source image: taken, the image that is edited; also trained from text alone"),
        ("qwen_image_edit", "source image: needed, the image that is edited"),
        ("wan_i2v", "source image: needed, the first frame of the video"),
        ("wan_ti2v", "source image: needed, the first frame of the video"),
        ("ltx_i2v", "source image: needed, the first frame of the video"),
        ("wan", "source image: refused"),
        ("ltx", "source image: refused"),
    ],
)
def test_models_says_whether_and_as_what_a_source_is_taken(
    name: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", name]) == 0
    assert any(one.startswith(line) for one in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_same_seed_and_source_give_the_stock_pipelines_image(
    editor: LoadedModel, folders: dict[str, Path], guidance: float
) -> None:
    pipeline, noise, image = stock(editor, folders[editor.family.name]), noise_of(editor), picture(0)
    denoiser: Any = editor.denoiser()
    if guidance != 1:
        denoiser = Guided(denoiser, editor.negative(1), guidance)
    times = editor.grid(STEPS, tuple(noise.shape[1:]))
    with torch.no_grad():
        steps = trajectory(denoiser, DDIM(), noise, times, conditions(editor, image), torch.Generator())
    shown = drawn(editor, pipeline, noise, image, guidance)
    assert_close(editor.decode(steps[-1].x_s), shown, rtol=1e-4, atol=1e-4)


def test_the_network_is_told_what_the_stock_pipeline_tells_it_of_a_source(
    editor: LoadedModel, folders: dict[str, Path]
) -> None:
    pipeline, noise, image = stock(editor, folders[editor.family.name]), noise_of(editor), picture(0)
    with listening(pipeline.transformer) as expected:
        drawn(editor, pipeline, noise, image, 1.0)
    first = editor.grid(STEPS, tuple(noise.shape[1:]))[:1].float()
    with listening(editor.network) as told, torch.no_grad():
        editor.denoiser()(noise, first, conditions(editor, image))
    assert told[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert_close(told[0][name], value.expand_as(told[0][name]), rtol=1e-5, atol=1e-5, check_dtype=False)


def test_another_source_or_none_changes_the_prediction(editor: LoadedModel) -> None:
    noise, t = noise_of(editor), torch.tensor([0.7])
    with torch.no_grad():
        told = [editor.denoiser()(noise, t, conditions(editor, picture(seed))) for seed in (0, 1)]
        alone = editor.denoiser()(noise, t, editor.encode_prompts([PROMPT]))
    assert told[0].shape == noise.shape
    for one, other in ((told[0], told[1]), (told[0], alone)):
        assert float((one - other).abs().max()) > 1e-4 * float(one.abs().max())


SETTINGS = SamplingSettings(num_inference_steps=STEPS, height=HEIGHT, width=WIDTH)


def sourced(seed: int, text: str = PROMPT, scale: int = 1) -> SourcedPrompt:
    stream, image = BytesIO(), picture(seed)
    image.resize((scale * WIDTH, scale * HEIGHT)).save(stream, "PNG")
    return SourcedPrompt(text, stream.getvalue())


def pixels_drawn(pipeline: Any, prompts: list[Any], **options: Any) -> list[np.ndarray]:
    drawn = generate(pipeline, prompts, SETTINGS, progress=False, **options)
    return [np.asarray(sample.image, dtype=np.int16) for sample in drawn]


def test_images_are_drawn_from_their_own_sources(editor: LoadedModel) -> None:
    """As the stock pipeline draws each alone; an equal instruction about another source has other noise."""
    prompts = [sourced(0), sourced(1), sourced(2, "make it blue")]
    together = pixels_drawn(editor.pipeline, prompts, batch_size=3)
    assert together[0].shape == (HEIGHT, WIDTH, 3)
    for prompt, shown in zip(prompts, together, strict=True):
        assert np.abs(pixels_drawn(editor.pipeline, [prompt])[0] - shown).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 8
    seed = derive(0, PROMPT, prompts[0].digest, 0)
    arguments: dict[str, Any] = {"image": prompts[0].image, "num_inference_steps": STEPS}
    if editor.family.name == "flux_kontext":
        arguments |= {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
    generator = torch.Generator().manual_seed(seed)
    stock_image = editor.pipeline(prompt=PROMPT, height=HEIGHT, width=WIDTH, generator=generator, **arguments)
    assert np.abs(np.asarray(stock_image.images[0], dtype=np.int16) - together[0]).max() <= 1


def test_a_source_of_another_size_is_cut_as_in_training(editor: LoadedModel) -> None:
    large = sourced(0, scale=2)
    cut = large.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    stream = BytesIO()
    cut.save(stream, "PNG")
    expected = SourcedPrompt(PROMPT, stream.getvalue())
    told = [source_arguments(editor.pipeline, [one], HEIGHT, WIDTH)["image"] for one in (large, expected)]
    first, other = (one[0] if isinstance(one, list) else one for one in told)
    assert first.size == (WIDTH, HEIGHT) and np.array_equal(np.asarray(first), np.asarray(other))


def test_a_rollout_is_told_the_source(editor: LoadedModel) -> None:
    studio = PipelineRolloutModel(editor, (64, 64))
    image = picture(0).resize((64, 64))
    stream = BytesIO()
    image.save(stream, "PNG")
    prompts = [SourcedPrompt(PROMPT, stream.getvalue()), sourced(1)]
    cond, negative = studio.encode(prompts)
    for name, value in conditions(editor, image).items():
        assert_close(cond[name][:1], value, rtol=1e-5, atol=1e-5)
    assert "source" in cond and "source" not in negative
    assert not torch.allclose(cond["source"][0], cond["source"][1])
    assert studio.encode(prompts)[0]["source"].equal(cond["source"]) and studio.encoded == 2


def test_a_pipeline_that_takes_no_source_refuses_it(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["sd15"])))
    with pytest.raises(UserError, match="StableDiffusionPipeline takes none"):
        pixels_drawn(model.pipeline, [sourced(0)])
    with pytest.raises(UserError, match="has a source image, and sd15 takes none"):
        PipelineRolloutModel(model, (64, 64)).encode([sourced(0)])
