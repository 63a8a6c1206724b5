import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    ModelMixin,
    StableDiffusionPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.config.schema import ModelConfig
from diffalign.diffusion.paths import RectifiedFlow, VariancePreserving
from diffalign.errors import UserError
from diffalign.export.single_file import write_single_file
from diffalign.models.formulation import formulation_of_file, path_of
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import find_family, load
from diffalign.models.lora import policy_denoiser
from diffalign.models.sources import sniff_family
from tests import tiny_pipelines
from tests.models.ldm import single_file_state
from tests.tiny_pipelines import vae

HUB_NAME = "models--stable-diffusion-v1-5--stable-diffusion-v1-5"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """Copy the sdxl folder, so that a test may change it."""
    return Path(shutil.copytree(folders["sdxl"], tmp_path / "spoiled"))


@pytest.fixture
def hub_cache(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a hub cache that holds the tiny pipeline under SD 1.5's name, as after one download."""
    snapshot = tmp_path / "hub" / HUB_NAME / "snapshots" / ("0" * 40)
    shutil.copytree(folders["sd15"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.utils.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return tmp_path / "hub"


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_loaded_model_is_frozen_and_knows_its_latents(model: LoadedModel) -> None:
    modules = [m for m in model.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)
    name = model.family.name
    flow = name not in ("sd15", "sdxl", "kolors", "pixart", "pixart_alpha")
    downscale = 32 if name == "sana" else 16 if name.startswith("flux2") else 8
    patch = 1 if name in ("sd15", "sdxl", "kolors", "sana") or downscale == 16 else 2
    assert model.codec.channels(model.pipeline.vae.config) == (16 if flow and name != "sana" else 4)
    assert (model.downscale, model.multiple) == (downscale, downscale * patch)
    assert model.target == ("flow" if flow else "eps")
    assert isinstance(model.path, RectifiedFlow if flow else VariancePreserving)
    if isinstance(model.path, VariancePreserving):
        assert torch.equal(model.path.alphas_cumprod, model.pipeline.scheduler.alphas_cumprod)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_every_part(folders: dict[str, Path], name: str) -> None:
    model = load(ModelConfig(path=str(folders["sdxl"]), dtype=name))
    assert {p.dtype for p in model.network.parameters()} == {getattr(torch, name)}
    assert model.pipeline.vae.dtype == model.pipeline.text_encoder_2.dtype == getattr(torch, name)


def test_a_hub_id_loads_from_the_cache(hub_cache: Path, folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path="stable-diffusion-v1-5/stable-diffusion-v1-5"))
    assert same_weights(model.network, load(ModelConfig(path=str(folders["sd15"]))).network)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_holds_the_same_model(
    hub_cache: Path, folders: dict[str, Path], tmp_path: Path, suffix: str
) -> None:
    base = load(ModelConfig(path=str(folders["sd15"])))
    file = tmp_path / f"model{suffix}"
    state = single_file_state(base.pipeline)
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, file)
    else:
        save_file(state, file)
    loaded = load(ModelConfig(path=str(file)))
    assert loaded.family.name == "sd15"
    assert same_weights(loaded.network, base.network)
    assert same_weights(loaded.pipeline.vae, base.pipeline.vae)
    assert same_weights(loaded.pipeline.text_encoder, base.pipeline.text_encoder)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("conditioner.embedders.1.model.ln_final.bias", "sdxl"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "sd15"),
        ("cond_stage_model.model.ln_final.bias", "sd21"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.bias", "sd3"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.bias", "flux"),
        ("double_blocks.0.img_attn.proj.bias", "flux"),
    ],
)
def test_a_single_file_is_told_by_its_keys(tmp_path: Path, key: str, name: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "a.safetensors")
    assert sniff_family(str(tmp_path / "a.safetensors")).name == name


def test_another_vae_takes_the_place_of_the_pipelines(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = vae(scaling_factor=0.5, force_upcast=False)
    other.save_pretrained(tmp_path / "vae")
    model = load(ModelConfig(path=str(folders["sdxl"]), vae=str(tmp_path / "vae")))
    assert same_weights(model.pipeline.vae, other)
    assert model.pipeline.vae.config.scaling_factor == 0.5
    from_pipeline = load(ModelConfig(path=str(folders["sdxl"]), vae=str(folders["sd15"])))
    assert from_pipeline.pipeline.vae.config.scaling_factor == 0.18215
    assert f"model.vae={str(folders['sd15'])!r} is of another latent space" in caplog.text
    assert "scaling_factor 0.18215 for 0.13025" in caplog.text
    caplog.clear()
    load(ModelConfig(path=str(folders["sdxl"]), vae=str(folders["sdxl"])))
    assert "latent space" not in caplog.text


def test_the_safety_checker_stays_out(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["sd15"])))
    assert isinstance(model.pipeline, StableDiffusionPipeline)
    assert model.pipeline.safety_checker is None


def test_family_is_read_off_the_folder(folders: dict[str, Path]) -> None:
    for name, path in folders.items():
        assert find_family(ModelConfig(path=str(path)), str(path)).name == name


def test_families_of_one_pipeline_class_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    """By the width of the text that the UNet attends to; ``model.family`` decides against it."""
    wide = str(shutil.copytree(folders["sd15"], tmp_path / "wide"))
    file = Path(wide, "unet", "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 1024}))
    assert find_family(ModelConfig(path=wide), wide).name == "sd21"
    assert find_family(ModelConfig(path=wide, family="sd15"), wide).name == "sd15"
    usual = str(folders["sd15"])
    assert find_family(ModelConfig(path=usual), usual).name == "sd15"
    assert find_family(ModelConfig(path=usual, family="sd21"), usual).name == "sd21"


def spoil_index(folder: Path, **changes: object) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def remove_network(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def remove_weights(folder: Path) -> None:
    next((folder / "unet").glob("*.safetensors")).unlink()


def truncate_weights(folder: Path) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


def widen_network(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cross_attention_dim": 64}))


def leave_only_a_lora(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (leave_only_a_lora, "holds a LoRA: give its base model"),
        (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda f: spoil_index(f, _class_name="Kandinsky"), r"is a Kandinsky; allowed: .*\(sdxl\)"),
        (
            lambda f: spoil_index(f, _class_name="LTXConditionPipeline"),
            r"is a LTXConditionPipeline \(LTX-Video 0\.9\.5 .*fresh noise.*allowed: .*LTXImageToVideo",
        ),
        (lambda f: spoil_index(f, text_encoder_2=[None, None]), "has no text_encoder_2"),
        (remove_network, "component folder missing: unet"),
        (remove_weights, "cannot be loaded"),
        (truncate_weights, "cannot be loaded"),
        (widen_network, "spoiled"),
    ],
)
def test_a_spoiled_folder_is_a_user_error(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "model.path is empty"),
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("model.safetensors", "no such file"),
        ("tiny:sdlx", "did you mean tiny:sdxl"),
        ("somebody/some-model", "hf download somebody/some-model"),
    ],
)
def test_a_wrong_path_is_a_user_error(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(ModelConfig(path=path))


def test_wrong_files_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="not a checkpoint"):
        load(ModelConfig(path=str(tmp_path / "model.gguf")))
    for name in ("torn.safetensors", "torn.ckpt"):
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(UserError, match="cannot be"):
            load(ModelConfig(path=str(tmp_path / name)))
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="holds a LoRA"):
        load(ModelConfig(path=str(tmp_path / "lora.safetensors")))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint of a known family"):
        load(ModelConfig(path=str(tmp_path / "other.safetensors")))


def test_a_single_file_without_network_says_what_to_do(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    file = tmp_path / "model.safetensors"
    save_file(single_file_state(StableDiffusionPipeline.from_pretrained(folders["sd15"])), file)
    with pytest.raises(UserError, match="convert the file to a diffusers folder"):
        load(ModelConfig(path=str(file)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "sd15"}, "is sdxl .* set model.family to sdxl or auto"),
        ({"family": "sdx"}, "did you mean sdxl"),
        ({"variant": "fp16"}, "model.variant='fp16'.*leave model.variant out"),
        ({"vae": "./nowhere"}, "model.vae='./nowhere': no such folder"),
        ({"vae": "somebody/some-vae"}, "model.vae='somebody/some-vae' is no local folder"),
        (
            {"attention": "cudnn"},
            "model.attention='cudnn' cannot run on cpu .* allowed here: auto, flash, math",
        ),
    ],
)
def test_a_wrong_setting_is_a_user_error(
    folders: dict[str, Path], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(replace(ModelConfig(path=str(folders["sdxl"])), **changes))  # type: ignore[arg-type]


def test_a_vae_that_does_not_fit_is_a_user_error(folders: dict[str, Path], tmp_path: Path) -> None:
    vae(latent_channels=8).save_pretrained(tmp_path / "vae8")
    with pytest.raises(UserError, match="8 latent channels, the unet takes 4"):
        load(ModelConfig(path=str(folders["sdxl"]), vae=str(tmp_path / "vae8")))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no config.json"):
        load(ModelConfig(path=str(folders["sdxl"]), vae=str(tmp_path / "bare")))


def test_half_precision_weights_take_no_other_autocast(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="allowed: float32, bfloat16"):
        load(ModelConfig(path=str(folders["sdxl"]), dtype="float16"), compute=torch.bfloat16)


def test_a_variant_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd15"])
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.fill_(0.5)
    pipeline.save_pretrained(tmp_path / "both", variant="fp16")
    model = load(ModelConfig(path=str(tmp_path / "both"), variant="fp16"))
    assert all(bool((p == 0.5).all()) for p in model.network.parameters())
    with pytest.raises(UserError, match="allowed: fp16"):
        load(ModelConfig(path=str(tmp_path / "both"), variant="bf16"))


@pytest.mark.parametrize(
    ("keys", "metadata", "prediction", "zero"),
    [
        ((), {}, "eps", False),
        (("v_pred",), {}, "v", False),
        (("v_pred", "ztsnr"), {}, "v", True),
        ((), {"modelspec.prediction_type": "v"}, "v", False),
        ((), {"modelspec.prediction_type": "epsilon"}, "eps", False),
    ],
)
def test_a_single_file_names_its_prediction(
    hub_cache: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    keys: tuple[str, ...],
    metadata: dict[str, str],
    prediction: str,
    zero: bool,
) -> None:
    state = single_file_state(StableDiffusionPipeline.from_pretrained(folders["sd15"]))
    file = tmp_path / "model.safetensors"
    save_file(state | {key: torch.zeros(0) for key in keys}, file, metadata or None)
    model = load(ModelConfig(path=str(file)))
    assert model.target == prediction
    last = model.path.coefficients(torch.ones(1))[0].item()
    assert (last == 0) is zero
    scheduler = model.pipeline.scheduler.config
    assert scheduler.prediction_type == ("v_prediction" if prediction == "v" else "epsilon")
    assert scheduler.get("rescale_betas_zero_snr", False) is zero
    assert ("recognised by" in caplog.text) is bool(keys or metadata)
    denoiser = policy_denoiser(model, ModelConfig(path=str(file)))  # what a run trains with
    assert (denoiser.target, denoiser.path) == (prediction, model.path)
    write_single_file(model, tmp_path / "out.safetensors", torch.float32, "mine")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as written:
        markers = {"v_pred", "ztsnr"} & set(written.keys())
    assert markers == {name for name, on in (("v_pred", prediction == "v"), ("ztsnr", zero)) if on}
    overruled = load(ModelConfig(path=str(file), prediction="sample", zero_terminal_snr=False))
    assert overruled.target == "x0" and overruled.path.coefficients(torch.ones(1))[0].item() > 0


def test_a_marked_single_file_trains_and_exports_its_markers(
    hub_cache: Path, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the command line: v-prediction with zero terminal SNR, in the file, the run and its export."""
    state = single_file_state(StableDiffusionPipeline.from_pretrained(folders["sd15"]))
    file, run = tmp_path / "model.safetensors", tmp_path / "run"
    save_file(state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    options = "--data.path tiny:pairs --data.limit 8 --data.resolution 32 --data.holdout 0 --training.steps 2"
    options += " --model.lora.rank 2 --model.lora.targets to_q --logging.every 1"
    assert main(["train", "--model.path", str(file), *options.split(), "--output", str(run)]) == 0
    assert "prediction v_prediction, zero terminal SNR True" in caplog.text
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert main(["export", str(run), "--to", "single-file", "--output", str(tmp_path / "out")]) == 0
    (written,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(written, framework="pt") as exported:
        assert {"v_pred", "ztsnr"} <= set(exported.keys())


@pytest.mark.parametrize(
    ("key", "metadata", "message"),
    [
        ("edm_mean", {}, "edm_mean: EDM"),
        ("edm_vpred.sigma_max", {}, "continuous time"),
        ("x", {"modelspec.prediction_type": "flow"}, "modelspec.prediction_type='flow' is not known"),
    ],
)
def test_a_single_file_of_another_formulation_is_a_user_error(
    key: str, metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        formulation_of_file("model.safetensors", [key], metadata)


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        (
            "model: {target: ldm.LatentDiffusion, params: {parameterization: v, timesteps: 1000}}",
            "v_prediction",
        ),
        ("model: {params: {parameterization: eps}}", "epsilon"),
        (
            "model: {params: {denoiser_config: {params: {scaling_config: {target: a.b.VScaling}}}}}",
            "v_prediction",
        ),
        (
            "model: {params: {denoiser_config: {params: {scaling_config: {target: a.b.EpsScaling}}}}}",
            "epsilon",
        ),
        ("model: {params: {linear_start: 0.00085}}", None),
        ("title: mine", None),
        ("- 1", None),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_configuration_beside_a_single_file_names_its_prediction(
    tmp_path: Path, text: str, prediction: str | None, suffix: str
) -> None:
    """As A1111 reads ``768-v-ema.yaml`` for ``768-v-ema.safetensors``."""
    (tmp_path / "model").with_suffix(suffix).write_text(text)
    found = formulation_of_file(str(tmp_path / "model.safetensors"), ["x"], {})
    assert found.prediction == prediction and (f"model{suffix}" in found.source) is (prediction is not None)
    if prediction == "epsilon":
        with pytest.raises(UserError, match=r"predicts v_prediction by the tensor v_pred, and epsilon by"):
            formulation_of_file(str(tmp_path / "model.safetensors"), ["v_pred"], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {params: {parameterization: flow}}", "parameterization is 'flow'; allowed: eps, v, x0"),
        (
            "model: {params: {denoiser_config: {params: {scaling_config: {target: a.EDMScaling}}}}}",
            "the denoiser's EDMScaling is not trained here",
        ),
        ("model: [", "not valid YAML"),
    ],
)
def test_a_configuration_of_another_formulation_is_a_user_error(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        formulation_of_file(str(tmp_path / "model.ckpt"), ["x"], {})


def test_a_single_file_of_a_family_with_two_predictions_must_say_one(tmp_path: Path) -> None:
    file = tmp_path / "v2-1.safetensors"
    save_file({"cond_stage_model.model.ln_final.bias": torch.zeros(1)}, file)
    with pytest.raises(
        UserError, match=r"does not say what it predicts.*Stable Diffusion 2.*set model.predic"
    ):
        load(ModelConfig(path=str(file)))
    with pytest.raises(UserError, match="cannot be loaded"):  # which comes later
        load(ModelConfig(path=str(file), prediction="epsilon"))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (IPNDMScheduler(), "IPNDMScheduler, whose noising path"),
        (DDPMWuerstchenScheduler(), "DDPMWuerstchenScheduler, whose noising path"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "EulerDiscreteScheduler: .*timestep_type.*continuous.*allowed: discrete",
        ),
        (EulerDiscreteScheduler(beta_schedule="scaled_linear"), ""),
    ],
)
def test_a_scheduler_that_is_not_understood_is_named(scheduler: object, message: str) -> None:
    if not message:
        assert path_of(scheduler, None, "m")[1] == "eps"
        return
    with pytest.raises(UserError, match=message):
        path_of(scheduler, None, "m")


@pytest.mark.parametrize("changes", [{"prediction": "v_prediction"}, {"zero_terminal_snr": True}])
def test_a_flow_has_no_choice_of_prediction(folders: dict[str, Path], changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"FlowMatchEulerDiscreteScheduler.*allowed: auto and null"):
        load(ModelConfig(path=str(folders["sd3"]), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(2), {"state_dict": [1]}])
def test_a_ckpt_that_is_no_mapping_is_a_user_error(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="allowed: a mapping of names to tensors"):
        load(ModelConfig(path=str(tmp_path / "a.ckpt")))


def test_a_pickle_of_other_objects_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": print}}, tmp_path / "a.ckpt")
    with pytest.raises(
        UserError, match=r"other objects, which could run code and is not loaded.*safetensors"
    ):
        load(ModelConfig(path=str(tmp_path / "a.ckpt")))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2"])
def test_tensors_that_the_files_lack_are_named(folder: Path, component: str) -> None:
    """transformers fills them with random numbers, and the pipeline draws noise."""
    file = next((folder / component).glob("*.safetensors"))
    state = dict(load_file(file))
    name = sorted(state)[5]
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"{component}: tensors of .* not in the files .*{name} \(1 in all\)"
    ):
        load(ModelConfig(path=str(folder)))


def test_tensors_that_a_component_does_not_have_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = next((folder / "unet").glob("*.safetensors"))
    save_file({**load_file(file), "more.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    load(ModelConfig(path=str(folder)))
    assert (
        "unet: tensors of the files that a UNet2DConditionModel does not have are left out: more.weight"
        in (caplog.text)
    )


def test_shared_tensors_are_no_missing_ones(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("sdxl", "sd3"):
        load(ModelConfig(path=str(folders[name])))
    assert "are left out" not in caplog.text


def test_a_checkers_patch_ends_with_the_load(folders: dict[str, Path]) -> None:
    before = ModelMixin.__dict__["from_pretrained"]
    load(ModelConfig(path=str(folders["sd15"])))
    assert ModelMixin.__dict__["from_pretrained"] is before


def test_weights_of_a_variant_alone_name_the_setting(folder: Path) -> None:
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match=r"unet has weights of the variant fp16 alone; .*model\.variant fp16"):
        load(ModelConfig(path=str(folder)))
    assert load(ModelConfig(path=str(folder), variant="fp16")).family.name == "sdxl"


@pytest.mark.parametrize("scale", [None, 0, "0.18"])
def test_a_scale_of_latents_that_is_none_is_an_error(folder: Path, scale: object) -> None:
    """diffusers divides by it, and fails after the whole of the sampling."""
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": scale}))
    with pytest.raises(UserError, match=rf"scaling_factor of the VAE's config\.json is {scale!r}.*0\.13025"):
        load(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("changed", [{"shift_factor": None}, {"shift_factor": "0.06"}, {}])
@pytest.mark.parametrize(("family", "usual"), [("sd3", "0.0609"), ("flux", "0.1159")])
def test_a_shift_of_latents_that_the_pipeline_subtracts_is_a_number(
    tmp_path: Path, family: str, usual: str, changed: dict[str, object]
) -> None:
    """It was read as 0; Stable Diffusion 1.5 and XL have none, and their pipelines subtract none."""
    path = getattr(tiny_pipelines, f"make_{family}")(tmp_path / family)
    file = path / "vae" / "config.json"
    config = json.loads(file.read_text())
    del config["shift_factor"]
    file.write_text(json.dumps({**config, **changed}))
    found = changed.get("shift_factor")
    with pytest.raises(UserError, match=rf"shift_factor of the VAE's .* is {found!r}.* {family} .*{usual}"):
        load(ModelConfig(path=str(path)))


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("sdxl", {"max_sequence_length": 128}, "no effect of model.max_sequence_length=128: sdxl has none"),
        ("sdxl", {"embedded_guidance": 2.0}, "no effect of model.embedded_guidance=2.0: sdxl has none"),
        ("sdxl", {"revision": "main"}, "no effect of model.revision='main': the model is no download"),
        (
            "schnell",
            {"embedded_guidance": 2.0},
            "model.embedded_guidance=2.0: its network is not guidance-dist",
        ),
        ("flux", {"embedded_guidance": 2.0, "max_sequence_length": 8}, ""),
    ],
)
def test_settings_that_a_model_does_not_read_are_told(
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    settings: dict[str, Any],
    told: str,
) -> None:
    guided = family == "flux"
    path = folders["sdxl"] if family == "sdxl" else tiny_pipelines.make_flux(tmp_path / "flux", guided=guided)
    load(ModelConfig(path=str(path), **settings))
    assert ("no effect" in caplog.text) == bool(told) and told in caplog.text
