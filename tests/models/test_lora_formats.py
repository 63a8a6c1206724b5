"""Every layout that people exchange is read to the same factors; what is not understood is an error."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.export.adapters import put_on
from diffalign.export.aligned import attach
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora_formats import Lora, diffusers_state, parse_lora, read_lora
from diffalign.models.lora_names import modules_of
from diffalign.models.sources import is_lora
from tests import tiny_pipelines
from tests.models import ldm

MAKERS = {
    "sd15": tiny_pipelines.make_sd15,
    "sdxl": tiny_pipelines.make_sdxl,
    "flux": tiny_pipelines.make_flux,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    root = tmp_path_factory.mktemp("models")
    return {name: load(ModelConfig(path=str(make(root / name)))) for name, make in MAKERS.items()}


def drawn(weight: Tensor, rank: int = 2) -> tuple[Tensor, Tensor]:
    """Random factors that fit a weight."""
    kernel = weight.shape[2:]
    down = torch.randn(rank, weight.shape[1], *kernel)
    return down, torch.randn(weight.shape[0], rank, *((1,) * len(kernel)))


def products(lora: Lora) -> dict[str, Tensor]:
    return {f"{c}.{m}": f.product() for c, modules in lora.items() for m, f in modules.items()}


@pytest.mark.parametrize("blocks", ["diffusers", "original"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohya_files_of_every_unet_module(models: dict[str, LoadedModel], family: str, blocks: str) -> None:
    """Names by tests/models/ldm.py, which is written from the original repositories' names."""
    torch.manual_seed(0)
    model = models[family]
    state: dict[str, Tensor] = {}
    expected = {}
    for name, module in modules_of(model.network).items():
        if name.startswith("add_embedding"):
            stem = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}[
                name
            ]
        else:
            tensor = f"{name}.weight" if blocks == "diffusers" else ldm.unet_name(f"{name}.weight", 1)
            stem = tensor.removesuffix(".weight").replace(".", "_")
        down, up = drawn(module.weight)  # type: ignore[arg-type]
        state |= {f"lora_unet_{stem}.lora_down.weight": down, f"lora_unet_{stem}.lora_up.weight": up}
        state[f"lora_unet_{stem}.alpha"] = torch.tensor(8.0)
        expected[f"unet.{name}"] = 4 * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)  # type: ignore[operator,arg-type]
    lora, words = parse_lora(state, {}, model)
    found = products(lora)
    assert found.keys() == expected.keys() and "kohya layout" in words and "scale 4" in words
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_text_encoders_of_kohya_and_of_diffusers_are_the_same_modules(models: dict[str, LoadedModel]) -> None:
    model = models["sdxl"]
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    stem = "text_model_encoder_layers_1_self_attn_q_proj"
    kohya = {}
    for number in (1, 2):
        kohya[f"lora_te{number}_{stem}.lora_down.weight"] = down * number
        kohya[f"lora_te{number}_{stem}.lora_up.weight"] = up
    lora, _ = parse_lora(kohya, {}, model)
    assert set(lora) == {"text_encoder", "text_encoder_2"}
    again, _ = parse_lora(diffusers_state(lora), {}, model)
    for name, value in products(lora).items():
        torch.testing.assert_close(products(again)[name], value)
    torch.testing.assert_close(
        products(lora)["text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj"], 2 * up @ down
    )


def test_stacked_projections_are_cut_as_diffusers_cuts_them(models: dict[str, LoadedModel]) -> None:
    """FLUX by kohya: qkv is one module there; diffusers' own converter is the reference."""
    torch.manual_seed(1)
    model, state = models["flux"], {}
    for stem, rows, columns in (
        ("double_blocks_0_img_attn_qkv", 48, 16),
        ("double_blocks_0_txt_attn_proj", 16, 16),
        ("single_blocks_0_linear2", 16, 16 + 64),
    ):
        state[f"lora_unet_{stem}.lora_down.weight"] = torch.randn(2, columns)
        state[f"lora_unet_{stem}.lora_up.weight"] = torch.randn(rows, 2)
        state[f"lora_unet_{stem}.alpha"] = torch.tensor(1.0)
    lora, words = parse_lora(state, {}, model)
    reference: dict[str, Tensor] = type(model.pipeline).lora_state_dict(dict(state))
    names = {key.rsplit(".lora_", 1)[0] for key in reference}
    found = products(lora)
    assert found.keys() == names and "scale 0.5" in words
    for name in names:
        value = reference[f"{name}.lora_B.weight"] @ reference[f"{name}.lora_A.weight"]
        torch.testing.assert_close(found[name], value)


def test_rows_of_a_single_block(models: dict[str, LoadedModel]) -> None:
    """Diffusers' converter knows the real width alone: the rows are counted here, q, k, v, then the MLP."""
    down, up = torch.randn(2, 16), torch.randn(3 * 16 + 64, 2)
    stem = "diffusion_model.single_blocks.0.linear1"
    lora, words = parse_lora({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, {}, models["flux"])
    found = products(lora)
    order = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    stacked = torch.cat([found[f"transformer.single_transformer_blocks.0.{name}"] for name in order])
    torch.testing.assert_close(stacked, up @ down)
    assert "ComfyUI" in words and "no alpha in the file" in words


def test_scales_of_metadata_and_of_a_peft_folder(models: dict[str, LoadedModel], tmp_path: Path) -> None:
    import json

    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {".lora_A.weight": torch.ones(4, 16), ".lora_B.weight": torch.ones(16, 4)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 16, "unet.use_rslora": True})}
    lora, _ = parse_lora({f"unet.{name}{k}": v for k, v in tensors.items()}, metadata, models["sd15"])
    assert lora["unet"][name].scale == 8.0
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "alpha_pattern": {"to_q": 6}}))
    lora, _ = read_lora(folder, models["sd15"])
    assert lora["unet"][name].scale == 1.5


def test_what_is_not_understood_is_an_error(models: dict[str, LoadedModel]) -> None:
    down, up = torch.ones(2, 16), torch.ones(16, 2)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    good: dict[str, Any] = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    parse_lora(good, {}, models["sd15"])
    with pytest.raises(UserError, match=r"1 of 3 tensors have no module.*to_x"):
        parse_lora(good | {"lora_unet_to_x.alpha": torch.tensor(1.0)}, {}, models["sd15"])
    with pytest.raises(UserError, match="LyCORIS tensors hada_"):
        parse_lora(good | {f"{stem}.hada_w1_a": down}, {}, models["sd15"])
    with pytest.raises(UserError, match=r"has a weight of \(16, 16\) here.*\(16, 8\)"):
        parse_lora(good | {f"{stem}.lora_down.weight": torch.ones(2, 8)}, {}, models["sd15"])
    with pytest.raises(UserError, match="has only alpha, down"):
        parse_lora({f"{stem}.lora_down.weight": down, f"{stem}.alpha": torch.tensor(1.0)}, {}, models["sd15"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(models: dict[str, LoadedModel], value: float) -> None:
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {
        f"{stem}.lora_down.weight": torch.ones(2, 16),
        f"{stem}.lora_up.weight": torch.full((16, 2), value),
    }
    with pytest.raises(UserError, match=r"1 of 2 tensors hold NaN or infinite values, such as .*lora_up"):
        parse_lora(state, {}, models["sd15"])


@pytest.mark.parametrize("part", ["hada_w1_a", "lokr_w1", "lokr_w2_b", "oft_blocks", "lora_A.default.weight"])
def test_adapters_of_other_kinds_are_told_from_models(tmp_path: Path, part: str) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({f"lora_unet_mid_block_attentions_0_proj_in.{part}": torch.ones(2)}, file)
    assert is_lora(file)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, file)
    assert not is_lora(file)


def test_doras_magnitude_of_a_part_of_the_modules_is_refused(models: dict[str, LoadedModel]) -> None:
    """No loader puts such a file on: peft has one setting for all modules."""
    state: dict[str, Tensor] = {}
    for name in ("to_q", "to_k"):
        stem = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_{name}"
        state |= {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(16, 2)}
    lora, _ = parse_lora(state | {f"{stem}.dora_scale": torch.ones(16, 1)}, {}, models["sd15"])
    with pytest.raises(
        UserError, match=r"x: 1 of 2 modules of unet have DoRA's magnitude, and .*to_q has none"
    ):
        put_on(models["sd15"], lora, "x")


def lora_of(model: LoadedModel, file: Path, metadata: dict[str, str], factor: float = 1.0) -> Path:
    """Write a LoRA of one module, with a header."""
    name, module = next(iter(modules_of(model.network).items()))
    down, up = drawn(module.weight)
    stem = f"{model.family.network_name}.{name}"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": factor * up}, file, metadata)
    return file


@pytest.mark.parametrize(("factor", "told"), [(0.0, True), (1.0, False)])
def test_a_lora_that_changes_nothing_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: float, told: bool
) -> None:
    model = load(ModelConfig(path=str(tiny_pipelines.make_sd15(tmp_path / "base"))))
    attach(model, lora_of(model, tmp_path / "a.safetensors", {}, factor))
    assert ("a.safetensors changes no weight: all its factors are 0" in caplog.text) == told


@pytest.mark.parametrize(
    ("family", "metadata", "told"),
    [
        ("sd15", {"ss_base_model_version": "sdxl_base_v1-0"}, "its ss_base_model_version is sdxl_base_v1-0"),
        ("sd15", {"ss_base_model_version": "sd_v2_v"}, "its ss_base_model_version is sd_v2_v"),
        ("sd15", {"ss_base_model_version": "sd_v1"}, ""),
        ("sd15", {"ss_base_model_version": "sd_1.5"}, ""),  # of ai-toolkit, as the next two
        ("sdxl", {"ss_base_model_version": "sdxl_1.0"}, ""),
        ("flux", {"ss_base_model_version": "flux.1"}, ""),
        ("flux", {"ss_base_model_version": "flux2_klein_9b"}, "its ss_base_model_version is flux2_klein_9b"),
        ("sd15", {"modelspec.architecture": "stable-diffusion-v1/lora"}, ""),
        ("sdxl", {"modelspec.architecture": "flux-1-dev/lora"}, "its modelspec.architecture is flux-1-dev/"),
        ("sdxl", {"modelspec.prediction_type": "v"}, "its modelspec.prediction_type is v"),
        ("sdxl", {"modelspec.prediction_type": "epsilon"}, ""),
        ("sdxl", {"ss_sd_model_name": "them/other"}, "its ss_sd_model_name is them/other"),
        ("sdxl", {"ss_sd_model_name": "elsewhere/SDXL.safetensors"}, ""),
        ("sdxl", {"ss_sd_model_name": "other.ckpt", "sshs_model_hash": "12"}, ""),
    ],
)
def test_a_lora_of_another_base_is_told(
    models: dict[str, LoadedModel],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    metadata: dict[str, str],
    told: str,
) -> None:
    read_lora(lora_of(models[family], tmp_path / "a.safetensors", metadata), models[family])
    assert ("was trained on another base" in caplog.text) == bool(told) and told in caplog.text


def test_a_base_in_the_hubs_cache_has_its_name_there(
    models: dict[str, LoadedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = replace(models["sdxl"], source="/x/hub/models--them--base-1.0/snapshots/0f3ab")
    for name, told in (("them/base-1.0", False), ("them/base-2.0", True)):
        caplog.clear()
        read_lora(lora_of(model, tmp_path / "a.safetensors", {"ss_sd_model_name": name}), model)
        assert ("was trained on another base" in caplog.text) == told


def test_the_base_of_a_peft_folder_is_compared(
    models: dict[str, LoadedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = lora_of(models["sdxl"], tmp_path / "adapter_model.safetensors", {})
    for base, told in (("me/sdxl", False), ("/home/x/y", False), ("me/other", True)):
        (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
        caplog.clear()
        read_lora(file, models["sdxl"])
        assert ("its base_model_name_or_path is me/other" in caplog.text) == told
