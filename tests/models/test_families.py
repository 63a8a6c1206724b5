import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.testing import assert_close

from diffalign.errors import UserError
from diffalign.models.family import Family
from diffalign.models.loaded import LoadedModel
from diffalign.models.registry import FAMILIES, get_family
from tests.models.inputs import conditions, states

PROMPTS = ["a red circle", "", "two"]


def stock(model: LoadedModel, folders: dict[str, Path], **changes: bool) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folders[model.family.name], **changes)


def encoded_by_stock(
    pipeline: DiffusionPipeline, prompts: list[str], guidance: bool
) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return pipeline.encode_prompt(
            prompt=prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guidance
        )


def test_registry_needs_no_torch() -> None:
    code = "import sys, diffalign.models, diffalign.models.registry; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def test_every_family_is_found_by_its_card() -> None:
    for name, card in FAMILIES.items():
        family = get_family(name)
        assert isinstance(family, Family)
        assert family.name == name == card.name


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean sdxl"):
        get_family("sdlx")


def test_prompts_are_encoded_as_the_stock_pipeline_does(model: LoadedModel, folders: dict[str, Path]) -> None:
    expected = encoded_by_stock(stock(model, folders), PROMPTS, guidance=False)
    encoded = model.encode_prompts(PROMPTS)
    assert torch.equal(encoded["encoder_hidden_states"], expected[0])
    if "text_embeds" in encoded:
        assert torch.equal(encoded["text_embeds"], expected[2])
    assert all(value.dtype == torch.float32 and len(value) == 3 for value in encoded.values())


def test_negative_is_the_stock_pipelines(model: LoadedModel, folders: dict[str, Path]) -> None:
    expected = encoded_by_stock(stock(model, folders), ["x", "y"], guidance=True)
    negative = model.negative(2)
    assert_close(negative["encoder_hidden_states"], expected[1])
    if "text_embeds" in negative:
        assert torch.equal(negative["text_embeds"], expected[3])


def test_sdxl_negative_is_zero_unless_the_pipeline_says_otherwise(sdxl: LoadedModel) -> None:
    assert all(not value.any() for value in sdxl.negative(1).values())
    sdxl.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    for name, value in sdxl.negative(1).items():
        assert_close(value, sdxl.encode_prompts([""])[name])


def test_micro_conditions_are_the_stock_time_ids(sdxl: LoadedModel) -> None:
    original, crop, target = (1023, 768), (3, 5), (512, 640)
    expected = sdxl.pipeline._get_add_time_ids(
        original, crop, target, dtype=torch.float32, text_encoder_projection_dim=16
    )
    ours = sdxl.micro_conditions(*(torch.tensor([pair]) for pair in (original, crop, target)))
    assert ours.keys() == {"time_ids"}
    assert torch.equal(ours["time_ids"], expected)


def test_denoiser_is_the_stock_network_call(model: LoadedModel) -> None:
    x_t, t = states()
    cond = conditions(model, ["a", "b"])
    added = {k: v for k, v in cond.items() if k != "encoder_hidden_states"}
    extra = {"added_cond_kwargs": added} if added else {}
    with torch.no_grad():
        expected = model.pipeline.unet(
            x_t, (t * 1000).round().long(), encoder_hidden_states=cond["encoder_hidden_states"], **extra
        ).sample
        assert torch.equal(model.denoiser()(x_t, t, cond), expected)


def test_condition_shapes_are_those_of_encoded_prompts(model: LoadedModel) -> None:
    cond = conditions(model, ["a"])
    components = {name: getattr(model.pipeline, name).config.to_dict() for name in model.text_encoders}
    shapes = model.family.cond_shapes({"unet": model.pipeline.unet.config, **components})
    assert {name: tuple(value.shape[1:]) for name, value in cond.items()} == shapes


def test_a_cut_prompt_is_warned_about_once_and_counted(
    sdxl: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    long = "word " * 30
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        sdxl.encode_prompts(["short", long])
        sdxl.encode_prompts([long])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "reads 16" in caplog.text
    assert sdxl.truncated_prompts == 2


def test_folder_configuration_is_the_pipelines(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == FAMILIES[name].pipeline
