"""Each family in each format, read back by a reader that is not ours; docs/export.md shows this table."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffalign.config.schema import LoraConfig, ModelConfig
from diffalign.errors import UserError
from diffalign.export.adapters import live_lora
from diffalign.export.aligned import save_aligned
from diffalign.export.job import FORMATS, Export, export
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import add_lora, trainable
from diffalign.models.lora_formats import read_lora
from tests import flow_pipelines, kolors_pipeline, language_video_pipelines, tiny_pipelines, video_pipelines
from tests.export.readers import merge_comfyui, merge_kohya
from tests.models.inputs import conditions

UNET = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FLUX2 = (
    *ATTENTION,
    "add_q_proj",
    "to_add_out",
    "to_qkv_mlp_proj",
    "single_transformer_blocks.0.attn.to_out",
    "ff.linear_in",
    "norm_out.linear",
)
FLOW = ("diffusers", "comfyui", "merged")


@dataclass(frozen=True)
class Case:
    make: Callable[[Path], Path]
    targets: tuple[str, ...]
    formats: tuple[str, ...]


def make_sdxl(folder: Path) -> Path:
    """Return an SDXL whose text encoders differ in width, as diffusers needs to load a single file."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    tiny_pipelines.make_sdxl(folder)
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wide = tiny_pipelines.text_config(pipeline.tokenizer_2)
        wide.hidden_size = 24
        pipeline.text_encoder_2 = CLIPTextModelWithProjection(wide)
        changes = {"cross_attention_dim": tiny_pipelines.WIDTH + 24}
        pipeline.unet = type(pipeline.unet).from_config({**pipeline.unet.config, **changes})
    pipeline.save_pretrained(folder)
    return folder


CASES = {
    "sd15": Case(tiny_pipelines.make_sd15, UNET, FORMATS),
    "sdxl": Case(make_sdxl, (*UNET, "add_embedding.linear_1", "add_embedding.linear_2"), FORMATS),
    "sd3": Case(
        tiny_pipelines.make_sd3,
        (*ATTENTION, "add_q_proj", "to_add_out", "ff.net.2"),
        ("diffusers", "comfyui", "merged"),
    ),
    "flux": Case(
        tiny_pipelines.make_flux,
        (*ATTENTION, "add_q_proj", "proj_mlp", "proj_out", "norm.linear"),
        ("diffusers", "comfyui", "merged"),
    ),
    "kolors": Case(kolors_pipeline.make_kolors, ATTENTION, ("diffusers", "merged")),
    "flux2": Case(flow_pipelines.make_flux2, FLUX2, FLOW),
    "flux2_klein": Case(tiny_pipelines.make_flux2_klein, FLUX2, FLOW),
    "chroma": Case(
        flow_pipelines.make_chroma,
        (*ATTENTION, "add_q_proj", "proj_mlp", "proj_out", "ff_context.net.2"),
        FLOW,
    ),
    "z_image": Case(
        tiny_pipelines.make_z_image,
        (*ATTENTION, "feed_forward.w2", "layers.0.adaLN_modulation.0", "cap_embedder.1", "t_embedder.mlp.0"),
        FLOW,
    ),
    "qwen_image": Case(
        tiny_pipelines.make_qwen_image,
        (*ATTENTION, "add_q_proj", "to_add_out", "img_mlp.net.2", "img_mod.1", "proj_out"),
        FLOW,
    ),
    "krea2": Case(
        flow_pipelines.make_krea2,
        (
            *ATTENTION,
            "to_gate",
            "ff.down",
            "img_in",
            "time_mod_proj",
            "txt_in.linear_1",
            "final_layer.linear",
        ),
        FLOW,
    ),
    "kandinsky5": Case(
        flow_pipelines.make_kandinsky5,
        ("to_query", "to_key", "to_value", "self_attention.out_layer", "feed_forward.in_layer"),
        FLOW,
    ),
    "lumina2": Case(
        flow_pipelines.make_lumina2, (*ATTENTION, "feed_forward.linear_2"), ("diffusers", "merged")
    ),
    "sana": Case(flow_pipelines.make_sana, ATTENTION, ("diffusers", "merged")),
    "pixart": Case(tiny_pipelines.make_pixart, (*ATTENTION, "ff.net.2"), ("comfyui", "merged")),
    "animatediff": Case(video_pipelines.make_animatediff, ATTENTION, ("diffusers", "merged")),
    "wan": Case(
        video_pipelines.make_wan,
        (*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
        ("diffusers", "comfyui", "merged"),
    ),
    "ltx": Case(
        video_pipelines.make_ltx, (*ATTENTION, "ff.net.2", "proj_in"), ("diffusers", "comfyui", "merged")
    ),
    "ltx2": Case(
        language_video_pipelines.make_ltx2,
        ("attn1.to_q", "attn1.to_v", "attn2.to_out.0", "ff.net.2"),
        ("diffusers", "merged"),
    ),
    "hunyuan_video15": Case(
        language_video_pipelines.make_hunyuan_video15, (*ATTENTION, "add_q_proj", "ff.net.2"), ("merged",)
    ),
    "cogvideox": Case(video_pipelines.make_cogvideox, ATTENTION, ("diffusers", "merged")),
    "text_to_video": Case(video_pipelines.make_text_to_video, ATTENTION, ("merged",)),
}


@dataclass
class World:
    base: ModelConfig
    aligned: Path
    expected: Tensor
    plain: Tensor


@torch.no_grad()
def prediction(model: LoadedModel) -> Tensor:
    """Return the network's output on fixed noise and prompts, text encoders included."""
    frames = model.usable_frames(5) if model.codec.video else 1
    shape = model.latent_shape(32, 32, frames)
    g = torch.Generator().manual_seed(3)
    x_t, t = torch.randn(2, *shape, generator=g), torch.tensor([0.4, 0.8])
    if model.codec.video:
        cond = model.encode_prompts(["a red circle", "a"])
    else:
        cond = conditions(model, ["a red circle", "a"])
    return model.denoiser()(x_t, t, cond)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    root, made = tmp_path_factory.mktemp("worlds"), dict[str, World]()

    def world(name: str) -> World:
        if name not in made:
            case = CASES[name]
            base = ModelConfig(path=str(case.make(root / name)))
            model = load(base)
            plain = prediction(model)
            lora = LoraConfig(rank=3, alpha=6.0, targets=case.targets)
            add_lora(model.network, lora)
            g = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, parameter in trainable(model.network):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=g)
            model.network.eval()
            save_aligned(model, root / f"{name}-aligned", "card")
            made[name] = World(base, root / f"{name}-aligned", prediction(model), plain)
        return made[name]

    return world


def read_back(to: str, path: Path, world: World, family: str) -> LoadedModel:
    """Return the base with the exported weights, loaded by other code than ours."""
    if to == "merged":
        return load(ModelConfig(path=str(path)))
    model = load(world.base)
    if to == "diffusers":
        model.pipeline.load_lora_weights(str(path))
    elif to == "single-file":
        kind: Any = type(model.pipeline)
        model.pipeline = (
            kind.from_single_file(str(path), config=world.base.path, safety_checker=None)
            if (family == "sd15")
            else kind.from_single_file(str(path), config=world.base.path)
        )
    elif family in ("sd15", "sdxl"):
        merge_kohya(load_file(path), model.pipeline)
    else:
        merge_comfyui(load_file(path), model.network, family)
    return model


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("family", CASES)
def test_the_table(worlds: Callable[[str], World], tmp_path: Path, family: str, to: str) -> None:
    world, said = worlds(family), list[str]()
    settings = Export(to, tmp_path / "out", title="mine", dtype="float32")
    if to not in CASES[family].formats:
        with pytest.raises(UserError, match="allowed"):
            export(world.base, world.aligned, settings, say=said.append)
        assert not (tmp_path / "out").exists()
        return
    path = export(world.base, world.aligned, settings, say=said.append)
    found = prediction(read_back(to, path, world, family))
    assert (found - world.expected).abs().max() <= 1e-4
    assert (world.plain - world.expected).abs().max() > 1e-3
    with pytest.raises(UserError, match="--overwrite"):
        export(world.base, world.aligned, settings, say=said.append)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_kohya_file_is_read_by_diffusers_and_back_to_the_same_weights(
    worlds: Callable[[str], World], tmp_path: Path, family: str
) -> None:
    world = worlds(family)
    path = export(
        world.base, world.aligned, Export("kohya", tmp_path / "x.safetensors"), say=lambda line: None
    )
    model = load(world.base)
    ours, _ = read_lora(world.aligned, model)
    again, _ = read_lora(path, model)
    for name, factors in ours["unet"].items():
        assert torch.equal(again["unet"][name].product(), factors.product())
    model.pipeline.load_lora_weights(str(path))
    assert (prediction(model) - world.expected).abs().max() <= 1e-4
    assert set(live_lora(model, "default_0")["unet"]) == set(ours["unet"])


def test_strength_rank_and_mixtures(worlds: Callable[[str], World], tmp_path: Path) -> None:
    world, said = worlds("sd15"), list[str]()

    def output(name: str, *others: tuple[Path, float], **changes: Any) -> Tensor:
        settings = Export("kohya", tmp_path / f"{name}.safetensors", **changes)
        path = export(world.base, world.aligned, settings, others, said.append)
        return prediction(read_back("kohya", path, world, "sd15"))

    assert torch.allclose(output("zero", strength=0.0), world.plain, atol=1e-5)
    both = output("both", (world.aligned, -0.5), strength=1.5)
    assert torch.allclose(both, world.expected, atol=1e-4)
    assert torch.allclose(output("same", rank=3), world.expected, atol=1e-4)
    low = output("low", rank=1)
    assert 1e-4 < (low - world.expected).abs().max() < (world.plain - world.expected).abs().max()
    assert any("rank 1" in line and "lost" in line for line in said)


def test_the_lora_that_a_run_started_from_is_in_the_file(
    worlds: Callable[[str], World], tmp_path: Path
) -> None:
    """The base of another program is without ``model.adapter``: the run's network was W + 2 changes."""
    world, said = worlds("sd15"), list[str]()
    base = replace(world.base, adapter=(str(world.aligned),))
    path = export(base, world.aligned, Export("kohya", tmp_path / "x.safetensors"), say=said.append)
    twice = Export("kohya", tmp_path / "y.safetensors", strength=2.0)
    expected = export(world.base, world.aligned, twice, say=said.append)
    found, wanted = (prediction(read_back("kohya", file, world, "sd15")) for file in (path, expected))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert any("started from" in line for line in said)
    with pytest.raises(UserError, match="allowed: --to merged"):
        export(
            replace(base, adapter=("gone",)), world.aligned, Export("kohya", tmp_path / "z"), say=said.append
        )


def test_full_fine_tuning_is_extracted(worlds: Callable[[str], World], tmp_path: Path) -> None:
    world, said = worlds("sdxl"), list[str]()
    whole = export(world.base, world.aligned, Export("merged", tmp_path / "whole"), say=said.append)
    path = export(world.base, whole, Export("kohya", tmp_path / "x.safetensors", rank=3), say=said.append)
    found = prediction(read_back("kohya", path, world, "sdxl"))
    assert (found - world.expected).abs().max() <= 1e-3
    assert any("extracted a LoRA of rank 3" in line and "0 changed tensors" in line for line in said)
    half = export(world.base, whole, Export("merged", tmp_path / "half", strength=0.5), say=said.append)
    same = export(world.base, world.aligned, Export("merged", tmp_path / "h2", strength=0.5), say=said.append)
    one, two = (load(ModelConfig(path=str(p))) for p in (half, same))
    assert torch.allclose(prediction(one), prediction(two), atol=1e-4)


def test_dora_is_exact_or_refused(worlds: Callable[[str], World], tmp_path: Path) -> None:
    base = worlds("sdxl").base
    model = load(base)
    add_lora(model.network, LoraConfig(rank=2, dora=True, targets=("to_q", "conv1")))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable(model.network):
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    save_aligned(model, tmp_path / "aligned", "card")
    expected = prediction(model)
    for to in ("kohya", "comfyui"):
        with pytest.raises(UserError, match=r"DoRA.*allowed"):
            export(base, tmp_path / "aligned", Export(to, tmp_path / to), say=lambda line: None)
    for to in ("diffusers", "merged", "single-file"):
        path = export(base, tmp_path / "aligned", Export(to, tmp_path / to), say=lambda line: None)
        world = World(base, path, expected, expected)
        assert (prediction(read_back(to, path, world, "sdxl")) - expected).abs().max() <= 1e-4, to
    full = Export("kohya", tmp_path / "extracted", rank=16)
    path = export(base, tmp_path / "aligned", full, say=lambda line: None)
    found = prediction(read_back("kohya", path, World(base, path, expected, expected), "sdxl"))
    assert (found - expected).abs().max() <= 1e-3


def test_markers_of_v_prediction_are_kept(worlds: Callable[[str], World], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    world = worlds("sdxl")
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(world.base.path)
    changed = DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pipeline.scheduler = changed
    pipeline.save_pretrained(tmp_path / "v")
    base = ModelConfig(path=str(tmp_path / "v"))
    path = export(
        base, world.aligned, Export("single-file", tmp_path / "v.safetensors"), say=lambda line: None
    )
    with safe_open(path, framework="pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())
        assert file.metadata()["modelspec.prediction_type"] == "v"
    plain = export(
        world.base, world.aligned, Export("single-file", tmp_path / "e.safetensors"), say=lambda line: None
    )
    with safe_open(plain, framework="pt") as file:
        assert not {"v_pred", "ztsnr"} & set(file.keys())


def test_a_scale_of_latents_that_a_single_file_does_not_hold_is_told(
    worlds: Callable[[str], World], tmp_path: Path
) -> None:
    world = worlds("sdxl")
    other = shutil.copytree(world.base.path, tmp_path / "other")
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    for path, told in ((world.base.path, False), (other, True)):
        said: list[str] = []
        settings = Export("single-file", tmp_path / f"{told}.safetensors")
        export(ModelConfig(path=str(path)), world.aligned, settings, say=said.append)
        assert any("scaling_factor is 0.5" in line and "take 0.13025" in line for line in said) == told


def test_merged_images_are_the_adapters_images(worlds: Callable[[str], World], tmp_path: Path) -> None:
    from tests.export.test_aligned import image

    world = worlds("sdxl")
    merged = export(world.base, world.aligned, Export("merged", tmp_path / "m"), say=lambda line: None)
    adapted = load(world.base)
    adapted.pipeline.load_lora_weights(str(world.aligned))
    difference = abs(image(load(ModelConfig(path=str(merged))).pipeline) - image(adapted.pipeline))
    assert difference.max() <= 2 / 255


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_adapters_of_text_encoders_travel_with_the_networks(
    worlds: Callable[[str], World], tmp_path: Path, family: str
) -> None:
    from peft import LoraConfig as PeftConfig

    from diffalign.models.lora import ADAPTER, inject

    base = worlds(family).base
    model = load(base)
    g = torch.Generator().manual_seed(1)
    for component in ("unet", *model.text_encoders):
        part = getattr(model.pipeline, component)
        targets = ["to_q", "to_v"] if component == "unet" else ["q_proj", "out_proj", "fc1"]
        inject(part, PeftConfig(r=2, lora_alpha=4, target_modules=targets), ADAPTER)
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    expected = prediction(model)
    save_aligned(model, tmp_path / "aligned", "card")
    file = tmp_path / "aligned" / "pytorch_lora_weights.safetensors"
    prefix = "lora_te_" if family == "sd15" else "lora_te2_"
    assert any(key.startswith(prefix) for key in load_file(file))
    by_diffusers, by_kohya = load(base), load(base)
    by_diffusers.pipeline.load_lora_weights(str(file))
    merge_kohya(load_file(file), by_kohya.pipeline)
    assert (prediction(by_diffusers) - expected).abs().max() <= 1e-4
    assert (prediction(by_kohya) - expected).abs().max() <= 1e-4
    assert (prediction(load(base)) - expected).abs().max() > 1e-3
