import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models.families.base import Family
from diffalign.models.families.registry import FAMILIES, get_family
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from tests.models.inputs import conditions

PROMPTS = ["a red circle", "", "two"]


def test_registry_needs_no_torch() -> None:
    code = "import sys, diffalign.models, diffalign.models.families.registry; print('torch' in sys.modules)"
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
    ours = sdxl.micro_conditions(*(torch.tensor([pair]).float() for pair in (original, crop, target)))
    assert ours.keys() == {"time_ids"}
    assert torch.equal(ours["time_ids"], expected)


def test_conditions_are_float32_and_have_a_row_per_prompt(model: LoadedModel) -> None:
    encoded, negative = model.encode_prompts(PROMPTS), model.negative(5)
    assert encoded.keys() == negative.keys()
    assert all(value.dtype == torch.float32 and len(value) == 3 for value in encoded.values())
    assert all(value.dtype == torch.float32 and len(value) == 5 for value in negative.values())
    alone = model.encode_prompts(PROMPTS[2:])
    assert all(torch.allclose(encoded[name][2:], value, atol=1e-5) for name, value in alone.items())


def test_condition_shapes_are_those_of_encoded_prompts(model: LoadedModel) -> None:
    cond = conditions(model, ["a"])
    components = {name: getattr(model.pipeline, name).config.to_dict() for name in model.text_encoders}
    shapes = model.family.cond_shapes({model.family.network_name: model.network_config, **components})
    assert {name: tuple(value.shape[1:]) for name, value in cond.items()} == shapes


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "pixart_alpha"])
def test_the_number_of_t5_tokens_is_the_runs(folders: dict[str, Path], name: str) -> None:
    config = ModelConfig(path=str(folders[name]), max_sequence_length=20)
    model, clip = load(config), 16 if name == "sd3" else 0
    assert model.encode_prompts(["a"])["encoder_hidden_states"].shape[1] == 20 + clip
    assert model.family.reader(model.pipeline)[1] == 20
    for wrong in (0, 513) if name in ("sd3", "flux") else (0,):
        with pytest.raises(UserError, match=f"max_sequence_length={wrong}; allowed"):
            load(replace(config, max_sequence_length=wrong))


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
