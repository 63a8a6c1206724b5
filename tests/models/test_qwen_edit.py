"""Qwen-Image-Edit: the text encoder and the network both see the source, as in the stock pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_module
from torch.testing import assert_close

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.samplers import DDIM, trajectory
from diffalign.errors import UserError
from diffalign.evaluation.drawing.sampling import generate
from diffalign.models.families.qwen_image_edit import QwenImageEdit, SeenTwice, of_area
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.runs.align import align
from tests.models.test_source_runs import edits as edits  # a fixture
from tests.models.test_source_runs import run_of
from tests.models.test_sources import (
    HEIGHT,
    PROMPT,
    SETTINGS,
    STEPS,
    WIDTH,
    conditions,
    noise_of,
    picture,
    pixels_of,
    sourced,
)
from tests.tiny_pipelines import make_qwen_image_edit

AREA, SEEN = 64 * 96, 56 * 84


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_image_edit(tmp_path_factory.mktemp("edit") / "qwen")


@pytest.fixture
def editor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Load a tiny model, whose sources have small areas in the stock pipeline, too."""
    monkeypatch.setattr(stock_module, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(stock_module, "CONDITION_IMAGE_SIZE", SEEN)
    monkeypatch.setattr(QwenImageEdit, "taken", SeenTwice(512, AREA, SEEN))
    return load(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("size", [(1024, 1024), (480, 832), (1360, 768), (33, 97)])
@pytest.mark.parametrize("area", [384 * 384, 1024 * 1024])
def test_areas_are_the_stock_pipelines(size: tuple[int, int], area: int) -> None:
    width, height = stock_module.calculate_dimensions(area, size[1] / size[0])
    assert of_area(area, size) == (height, width)
    kept = SeenTwice().size(size)
    assert of_area(1024 * 1024, kept) == kept  # the stock pipeline leaves it as it is


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_same_seed_and_source_give_the_stock_pipelines_image(
    editor: LoadedModel, folder: Path, guidance: float
) -> None:
    pipeline = QwenImageEditPlusPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise, image = noise_of(editor), picture(0)
    denoiser: Any = editor.denoiser()
    assert editor.sources is not None
    if guidance != 1:
        negative = editor.sources.encode_prompts([""], [pixels_of(image)])
        denoiser = Guided(denoiser, negative, guidance)
    times = editor.grid(STEPS, tuple(noise.shape[1:]))
    with torch.no_grad():
        steps = trajectory(denoiser, DDIM(), noise, times, conditions(editor, image), torch.Generator())
    shown = pipeline(
        prompt=PROMPT, image=image, latents=pipeline._pack_latents(noise, *noise.shape), height=HEIGHT,
        width=WIDTH, num_inference_steps=STEPS, true_cfg_scale=guidance, negative_prompt="", output_type="pt",
    ).images  # fmt: skip
    assert_close(editor.decode(steps[-1].x_s), shown, rtol=1e-4, atol=1e-4)


def test_the_source_reaches_the_text_and_the_network(editor: LoadedModel) -> None:
    first, other = (conditions(editor, picture(seed)) for seed in (0, 1))
    name = "encoder_hidden_states"
    assert not torch.allclose(first[name], other[name], atol=1e-4)
    noise, t = noise_of(editor), torch.tensor([0.7])
    with torch.no_grad():
        told = [
            editor.denoiser()(noise, t, cond)
            for cond in (first, {**first, "source": other["source"]}, {**first, name: other[name]})
        ]
    for changed in told[1:]:
        assert float((told[0] - changed).abs().max()) > 1e-4 * float(told[0].abs().max())


def test_drawing_needs_a_source(editor: LoadedModel) -> None:
    (sample,) = generate(editor.pipeline, [sourced(0)], SETTINGS, progress=False)
    assert sample.image.size == (WIDTH, HEIGHT)
    with pytest.raises(UserError, match="QwenImageEditPlusPipeline draws nothing without a source"):
        generate(editor.pipeline, [PROMPT], SETTINGS, progress=False)


def test_two_steps_on_edits_are_loaded_by_plain_diffusers(
    editor: LoadedModel, folder: Path, edits: Path, tmp_path: Path
) -> None:
    run = run_of(ModelConfig(path=str(folder), lora=LoraConfig(rank=2)), edits, tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.flip is true"):
        align(run, lambda line: None)
    run = replace(run, output=str(tmp_path / "again"), data=replace(run.data, flip=False, limit=6))
    result = align(run, lambda line: None)
    assert result.aligned is not None
    pipeline = QwenImageEditPlusPipeline.from_pretrained(folder)
    noise, cond = noise_of(editor), conditions(editor, picture(0))
    told = editor.path.model_time(torch.tensor([0.7]))
    with torch.no_grad():
        base = editor.family.call(pipeline.transformer.eval(), noise, told, cond)
        pipeline.load_lora_weights(result.aligned)
        aligned = editor.family.call(pipeline.transformer.eval(), noise, told, cond)
    assert float((aligned - base).abs().max()) > 1e-3
