from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from diffalign.config.schema import ModelConfig
from diffalign.models.loaded import LoadedModel, tensor_digest
from diffalign.models.loading import load
from diffalign.models.precision import vae_precision
from tests.tiny_pipelines import make_sdxl


def pixels(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_the_scaled_posterior(model: LoadedModel) -> None:
    if model.family.name in ("flux2", "flux2_klein", "qwen_image", "sana", "krea2", "kandinsky5"):
        pytest.skip("packed, of one frame, without a posterior or a shift: see test_stock")
    x = pixels()
    with torch.no_grad():
        posterior = model.pipeline.vae.encode(x).latent_dist
    mean, std = model.encode_pixels(x)
    config = model.pipeline.vae.config
    assert_close(mean, (posterior.mean - (config.shift_factor or 0)) * config.scaling_factor)
    assert_close(std, posterior.std * config.scaling_factor)
    assert mean.shape == std.shape == (2, config.latent_channels, 8, 8)
    with torch.no_grad():
        expected = (model.pipeline.vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    assert_close(model.decode(mean), expected, atol=1e-5, rtol=1e-4)
    assert mean.dtype == std.dtype == torch.float32


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "kolors"])
def test_a_shift_that_the_stock_pipeline_leaves_out_is_left_out(folders: dict[str, Path], name: str) -> None:
    model = load(ModelConfig(path=str(folders[name])))
    before, _ = model.encode_pixels(pixels())
    shown = model.decode(before)
    model.pipeline.vae.register_to_config(shift_factor=0.25)
    assert_close(model.encode_pixels(pixels())[0], before, rtol=0, atol=0)
    assert_close(model.decode(before), shown, rtol=0, atol=0)


def test_decoding_undoes_the_scale_of_encoding(sdxl: LoadedModel) -> None:
    sdxl.pipeline.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    mean, _ = sdxl.encode_pixels(pixels())
    with torch.no_grad():
        plain = sdxl.pipeline.vae.encode(pixels()).latent_dist.mean
        expected = (sdxl.pipeline.vae.decode(plain).sample / 2 + 0.5).clamp(0, 1)
    assert_close(sdxl.decode(mean), expected)


@pytest.mark.parametrize(("upcast", "inside"), [(True, torch.float32), (False, torch.bfloat16)])
def test_a_vae_that_overflows_is_computed_in_float32(
    folders: dict[str, Path], upcast: bool, inside: torch.dtype
) -> None:
    model = load(ModelConfig(path=str(folders["sdxl"]), dtype="bfloat16"))
    model.pipeline.vae.register_to_config(force_upcast=upcast)
    with vae_precision(model.pipeline.vae) as vae:
        assert vae.dtype == inside
    mean, _ = model.encode_pixels(pixels())
    assert model.pipeline.vae.dtype == torch.bfloat16
    assert mean.dtype == torch.float32


def test_fingerprint_is_of_the_encoders_and_survives_reloading(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    path = str(folders["sdxl"])
    first = load(ModelConfig(path=path)).fingerprint
    assert load(ModelConfig(path=path)).fingerprint == first
    other_seed = make_sdxl(tmp_path / "other", seed=1)
    assert load(ModelConfig(path=str(other_seed))).fingerprint != first
    assert load(ModelConfig(path=path, dtype="bfloat16")).fingerprint != first
    assert load(ModelConfig(path=path, vae=str(folders["sd15"]))).fingerprint != first


@pytest.mark.parametrize(
    "name", ["sd3", "flux", "pixart", "z_image", "flux2_klein", "qwen_image", "sana", "lumina2", "krea2"]
)
def test_the_number_of_tokens_is_in_the_fingerprint(folders: dict[str, Path], name: str) -> None:
    config = ModelConfig(path=str(folders[name]))
    usual, fewer = (load(replace(config, max_sequence_length=n)).fingerprint for n in (None, 20))
    assert usual != fewer


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_one_changed_weight_changes_the_fingerprint(folders: dict[str, Path], part: str) -> None:
    model = load(ModelConfig(path=str(folders["sdxl"])))
    with torch.no_grad():
        next(getattr(model.pipeline, part).parameters()).view(-1)[1] += 1e-3
    assert model.fingerprint != load(ModelConfig(path=str(folders["sdxl"]))).fingerprint


def test_the_trained_network_is_not_in_the_fingerprint(sdxl: LoadedModel, folders: dict[str, Path]) -> None:
    with torch.no_grad():
        next(sdxl.network.parameters()).add_(1)
    assert sdxl.fingerprint == load(ModelConfig(path=str(folders["sdxl"]))).fingerprint


def test_a_tensor_digest_sees_every_element_and_their_order() -> None:
    x = torch.arange(1000.0)
    for changed in (x.flip(0), x.clone().index_fill_(0, torch.tensor([501]), 0.5)):
        assert tensor_digest(changed) != tensor_digest(x)
    assert tensor_digest(x.view(10, 100)) == tensor_digest(x)


def test_encoders_move_without_the_network(sdxl: LoadedModel) -> None:
    sdxl.move_encoders("meta")
    parts = (sdxl.pipeline.vae, sdxl.pipeline.text_encoder, sdxl.pipeline.text_encoder_2)
    assert {p.device.type for part in parts for p in part.parameters()} == {"meta"}
    assert sdxl.device.type == "cpu"
