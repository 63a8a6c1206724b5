"""Starting points load as the right model: runs, checkpoints, LoRAs, separately published networks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config.io import to_yaml
from diffalign.config.schema import LoraConfig, ModelConfig, Run
from diffalign.errors import UserError
from diffalign.export.aligned import read_lora_of, save_aligned
from diffalign.export.job import Export, export
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser, trainable_state
from diffalign.models.lora_formats import lora_file
from diffalign.models.lora_merge import merge_into
from diffalign.models.starting import expanded, read_checkpoint, run_of
from diffalign.runs.exporting import exportable
from diffalign.runs.load_pipeline import named, open_named
from diffalign.runs.publish import push
from tests.models.inputs import conditions, states_of


def prediction(model: LoadedModel) -> Tensor:
    x_t, t = states_of(model)
    with torch.no_grad():
        return model.denoiser()(x_t, t, conditions(model, ["a", "b"]))


@pytest.fixture(params=[("sd15", "lora"), ("pixart", "lora"), ("sd15", "full")], ids=str)
def run(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> tuple[Path, Tensor]:
    """Finish a run with one checkpoint; return it with its policy's predictions."""
    name, train = request.param
    config = ModelConfig(path=str(folders[name]), train=train, lora=LoraConfig(rank=2, alpha=3.0))
    model = load(config)
    prepare_policy(model, config)
    generator = torch.Generator().manual_seed(1)
    for value in trainable_state(model).values():
        value += 0.05 * torch.randn(value.shape, generator=generator)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    checkpoint.mkdir(parents=True)
    save_file({k: v.clone() for k, v in trainable_state(model).items()}, checkpoint / "trainable.safetensors")
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(Run(model=config)))
    save_aligned(model, tmp_path / "run" / "aligned", "")
    return tmp_path / "run", prediction(model)


def test_a_run_and_its_checkpoint_are_its_policy(run: tuple[Path, Tensor]) -> None:
    """Opened for sampling, and as the start of another run, where policy and reference are equal to it."""
    folder, expected = run
    base = ModelConfig(path=expanded(ModelConfig(path=str(folder))).path)
    for spec in (folder, folder / "checkpoints" / "step-2"):
        opened = prediction(open_named(named(str(spec)), "cpu"))
        torch.testing.assert_close(opened, expected, atol=1e-5, rtol=1e-4)
        config = ModelConfig(path=str(spec), lora=LoraConfig(rank=4))
        model = load(config)
        torch.testing.assert_close(prediction(model), expected, atol=1e-5, rtol=1e-4)
        assert not [name for name in model.network.state_dict() if "lora" in name]
        names = [name for name, _ in prepare_policy(model, config)]
        assert names and all("lora_" in name for name in names)
        policy = policy_denoiser(model, config)
        x_t, t = states_of(model)
        cond = conditions(model, ["a", "b"])
        held = reference_denoiser(model, policy, config)(x_t, t, cond)
        assert torch.equal(policy(x_t, t, cond), held)
        torch.testing.assert_close(held, expected, atol=1e-5, rtol=1e-4)
    if (folder / "aligned" / "model_index.json").is_file():
        return
    assert not torch.allclose(prediction(load(base)), expected, atol=1e-3)
    model = load(replace(base, adapter=(str(folder / "aligned"),)))
    torch.testing.assert_close(prediction(model), expected, atol=1e-5, rtol=1e-4)


def test_runs_stand_on_runs(folders: dict[str, Path], tmp_path: Path) -> None:
    """The third run has the adapters of both before it, and its own settings."""
    for name, path in (("one", str(folders["sd15"])), ("two", str(tmp_path / "one"))):
        (tmp_path / name / "aligned").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(
            to_yaml(Run(model=ModelConfig(path=path, variant="fp16")))
        )
    config = expanded(ModelConfig(path=str(tmp_path / "two"), dtype="bfloat16", lora=LoraConfig(rank=3)))
    assert config.path == str(folders["sd15"]) and config.variant == "fp16"
    assert config.adapter == (str(tmp_path / "one" / "aligned"), str(tmp_path / "two" / "aligned"))
    assert config.dtype == "bfloat16" and config.lora.rank == 3


def test_a_network_alone_stands_on_its_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd15"] / "unet", tmp_path / "dpo" / "unet")
    changed = load(ModelConfig(path=str(folders["sd15"])))
    with torch.no_grad():
        for parameter in changed.network.parameters():
            parameter.mul_(1.5)
    changed.pipeline.unet.save_pretrained(tmp_path / "dpo" / "unet")
    for spec in (tmp_path / "dpo", tmp_path / "dpo" / "unet"):
        found = named(str(spec), str(folders["sd15"]))
        torch.testing.assert_close(prediction(open_named(found, "cpu")), prediction(changed))
    with pytest.raises(UserError, match="give the pipeline that it belongs to as --base"):
        named(str(tmp_path / "dpo"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapter": ("nowhere/at/all",)}, "model.adapter='nowhere/at/all': no such file or folder"),
        ({"adapter": ("HERE",)}, "no LoRA in it"),
        ({"adapter": ("MODEL",)}, "is a whole pipeline; give it as model.path"),
        ({"network": "./nowhere"}, "model.network='./nowhere': no such folder"),
        ({"network": "HERE"}, "neither config.json nor unet/config.json"),
    ],
)
def test_a_wrong_start_is_a_user_error(
    folders: dict[str, Path], tmp_path: Path, config: dict[str, object], message: str
) -> None:
    places = {"HERE": str(tmp_path), "MODEL": str(folders["sd15"])}
    put = lambda v: tuple(places.get(x, x) for x in v) if isinstance(v, tuple) else places.get(v, v)  # noqa: E731
    with pytest.raises(UserError, match=message):
        load(ModelConfig(path=str(folders["sd15"]), **{k: put(v) for k, v in config.items()}))


def test_what_is_not_there_is_told_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "wrong").mkdir()
    with pytest.raises(UserError, match=r"no model_index.json"):
        named(str(tmp_path / "wrong"), str(folders["sd15"]))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint of a known family"):
        named(str(tmp_path / "other.safetensors"), str(folders["sd15"]))


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", ["[]", '"text"', "3", '{"_class_name": 3}'])
def test_a_configuration_of_another_type_is_a_user_error(
    folders: dict[str, Path], tmp_path: Path, part: str, content: str
) -> None:
    folder = Path(shutil.copytree(folders["sd15"], tmp_path / "spoiled"))
    (folder / part).write_text(content)
    with pytest.raises(UserError, match="spoiled"):
        load(ModelConfig(path=str(folder)))


def test_a_tokenizer_without_its_maximum_has_its_encoders(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd15"], tmp_path / "model"))
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("model_max_length")
    file.write_text(json.dumps(config))
    model = load(ModelConfig(path=str(folder)))
    expected = load(ModelConfig(path=str(folders["sd15"]))).encode_prompts(["a red circle"])
    positions = model.pipeline.text_encoder.config.max_position_embeddings
    assert model.pipeline.tokenizer.model_max_length == positions
    states = model.encode_prompts(["a red circle"])["encoder_hidden_states"]
    assert states.shape[1] == positions
    assert torch.equal(states[:, :4], expected["encoder_hidden_states"][:, :4])


def test_sd3_has_no_positions_beyond_its_largest_size(folders: dict[str, Path]) -> None:
    model = load(ModelConfig(path=str(folders["sd3"])))
    most = model.network_config["pos_embed_max_size"] * model.multiple
    assert model.latent_shape(most, most)[1] == most // model.downscale
    with pytest.raises(UserError, match=f"sides of at most {most}"):
        model.latent_shape(most, most + model.multiple)


def test_a_checkpoint_is_read_at_the_scale_of_its_run(run: tuple[Path, Tensor]) -> None:
    """Alpha stands in the run's configuration, not in the checkpoint's file."""
    folder, expected = run
    checkpoint = folder / "checkpoints" / "step-2"
    base = ModelConfig(path=expanded(ModelConfig(path=str(folder))).path)
    if (folder / "aligned" / "model_index.json").is_file():
        model = load(replace(run_model(folder), train="lora"))
        with pytest.raises(UserError, match=r"checkpoint of all weights; allowed: one of a LoRA run"):
            read_checkpoint(model, checkpoint)
        return
    model = load(base)
    lora, words = read_lora_of(checkpoint, model)
    assert {factors.scale for part in lora.values() for factors in part.values()} == {1.5}
    assert "scale 1.5 (metadata)" in words
    merge_into(model, [(lora, 1.0)])
    torch.testing.assert_close(prediction(model), expected, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_is_exported_as_its_run(run: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = run
    found = exportable(str(folder / "checkpoints" / "step-2"))
    assert found.title == "run-step-2" and found.exports == folder / "export" / "step-2"
    assert found.run is not None and found.run.model.path == found.base.path
    export(found.base, found.source, Export("merged", tmp_path / "merged"), say=lambda _: None)
    merged = prediction(load(ModelConfig(path=str(tmp_path / "merged"))))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)


def test_a_run_is_mixed_by_its_aligned(run: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, _ = run
    if (folder / "aligned" / "model_index.json").is_file():
        return
    config = run_model(folder)
    settings = Export("merged", tmp_path / "merged")
    export(config, folder / "checkpoints" / "step-2", settings, [(folder, -1.0)], say=lambda _: None)
    merged = prediction(load(ModelConfig(path=str(tmp_path / "merged"))))
    torch.testing.assert_close(merged, prediction(load(config)), atol=1e-5, rtol=1e-4)


def test_a_file_of_a_checkpoint_is_no_lora(run: tuple[Path, Tensor]) -> None:
    folder, _ = run
    file = folder / "checkpoints" / "step-2" / "trainable.safetensors"
    with pytest.raises(UserError, match=r"step-2/trainable.safetensors is of a checkpoint.*allowed: the "):
        lora_file(file)


def test_a_checkpoint_is_not_pushed(run: tuple[Path, Tensor]) -> None:
    with pytest.raises(UserError, match="is a checkpoint, which diffusers does not load"):
        push(str(run[0] / "checkpoints" / "step-2"), "me/it")


def run_model(folder: Path) -> ModelConfig:
    found = run_of(folder)
    assert found is not None
    return found.model


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_an_exported_lora_has_the_dtype_that_is_asked_for(
    run: tuple[Path, Tensor], tmp_path: Path, to: str
) -> None:
    config = run_model(run[0])
    if config.train == "full" or "pixart" in config.path:
        return
    settings = Export(to, tmp_path / "out", dtype="float16")
    export(config, run[0] / "aligned", settings, say=lambda _: None)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    state = load_file(file)
    assert {tensor.dtype for key, tensor in state.items() if not key.endswith(".alpha")} == {torch.float16}
