"""Latents of videos: their scale, their frames, and what a frame of them is made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models.families.cogvideox import COGVIDEOX
from diffalign.models.families.ltx import LTX
from diffalign.models.families.registry import get_family
from diffalign.models.families.wan import WAN
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.precision import only_errors
from tests.video_pipelines import CASES


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def video(case: str, videos: dict[str, Path]) -> LoadedModel:
    with only_errors("diffusers"):
        return load(ModelConfig(path=str(videos[case])))


def pixels_of(case: str, count: int = 2) -> Tensor:
    height, width, frames = CASES[case][1]
    return 2 * torch.rand(count, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) - 1


def scale_of(model: LoadedModel) -> tuple[Tensor, Tensor]:
    """(shift, scale) of the family's latents, as its own pipelines of image to video apply them."""
    vae: Any = model.pipeline.vae
    zero, one = torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    if model.family.name == "wan":
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        return mean.view(1, -1, 1, 1, 1), 1 / std.view(1, -1, 1, 1, 1)
    if model.family.name in ("ltx", "ltx2"):
        return vae.latents_mean.view(1, -1, 1, 1, 1), 1 / vae.latents_std.view(1, -1, 1, 1, 1)
    return zero, one * vae.config.scaling_factor


def test_pixels_are_encoded_as_the_stock_autoencoder_does(video: LoadedModel, case: str) -> None:
    pixels, vae = pixels_of(case), video.pipeline.vae
    with torch.no_grad():
        if video.family.name in ("animatediff", "text_to_video"):
            each = [vae.encode(pixels[:, :, f]).latent_dist for f in range(pixels.shape[2])]
            mean = torch.stack([posterior.mean for posterior in each], dim=2)
            std = torch.stack([posterior.std for posterior in each], dim=2)
        else:  # one by one: HunyuanVideo 1.5's attention mask fits one video only
            one_by_one = [vae.encode(one[None]).latent_dist for one in pixels]
            mean = torch.cat([posterior.mean for posterior in one_by_one])
            std = torch.cat([posterior.std for posterior in one_by_one])
    shift, scale = scale_of(video)
    if case == "cogvideox_15":
        mean = torch.cat([mean[:, :, :1], mean], dim=2)
        # noise of its own would make a copy another frame
        std = torch.cat([0 * std[:, :, :1], 0 * std[:, :, :1], std[:, :, 1:]], dim=2)
    ours = video.encode_pixels(pixels)
    assert_close(ours[0], (mean - shift) * scale)
    assert_close(ours[1], std * scale)
    assert ours[0].shape[1:] == video.latent_shape(*CASES[case][1])


def test_wans_autoencoder_stays_in_float32(videos: dict[str, Path]) -> None:
    """As diffusers' examples load it; the other autoencoders of videos are those of the run's dtype."""
    with only_errors("diffusers"):
        half, exact = (
            load(ModelConfig(path=str(videos["wan"]), dtype=name)) for name in ("bfloat16", "float32")
        )
        vae = str(videos["wan"] / "vae")
        swapped = load(ModelConfig(path=str(videos["wan"]), dtype="bfloat16", vae=vae))
        other = load(ModelConfig(path=str(videos["ltx"]), dtype="bfloat16"))
    pixels = pixels_of("wan")
    assert torch.bfloat16 in {p.dtype for p in half.network.parameters()}
    assert other.pipeline.vae.dtype == half.pipeline.text_encoder.dtype == torch.bfloat16
    for model in (half, swapped):
        assert model.pipeline.vae.dtype == torch.float32
        mean, _std = model.encode_pixels(pixels)
        assert torch.equal(mean, exact.encode_pixels(pixels)[0])
        assert torch.equal(model.decode(mean), exact.decode(mean))


def test_decoding_undoes_the_scale(video: LoadedModel, case: str) -> None:
    """Pixels of latents are those that the autoencoder makes of its own latents."""
    latents = torch.randn(1, *video.latent_shape(*CASES[case][1]), generator=torch.Generator().manual_seed(2))
    shift, scale = scale_of(video)
    plain = (latents / scale + shift)[:, :, case == "cogvideox_15" :]
    with torch.no_grad():
        if video.family.name in ("animatediff", "text_to_video"):
            shown = torch.stack([video.pipeline.vae.decode(f).sample for f in plain.unbind(2)], dim=2)
        else:
            shown = video.pipeline.vae.decode(plain).sample
    decoded = video.decode(latents)
    height, width, frames = CASES[case][1]
    assert decoded.shape == (1, 3, frames, height, width)
    assert_close(decoded, ((shown + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_every_frame_is_in_one_latent_frame(video: LoadedModel, case: str) -> None:
    for frames in range(1, 60):
        usable = video.usable_frames(frames)
        assert 0 <= usable <= frames and video.usable_frames(usable) == usable
        latent = [video.frames_of(k) for k in range(video.latent_frames(usable))]
        copies = int(case == "cogvideox_15")
        assert latent[0] == latent[copies] and len(latent[0]) == 1
        assert [frame for part in latent[copies:] for frame in part] == list(range(usable))


@pytest.mark.parametrize("case", ["wan", "wan_ti2v", "ltx"])
def test_a_latent_frame_sees_its_frames_and_earlier_ones_alone(video: LoadedModel, case: str) -> None:
    """The first one sees the first frame only. (CogVideoX's norms look at all frames of a chunk.)"""
    pixels = pixels_of(case, 1)
    before = video.encode_pixels(pixels)[0]
    for k in range(before.shape[2]):
        changed = pixels.clone()
        changed[:, :, video.frames_of(k)[0] :] *= -1
        after = video.encode_pixels(changed)[0]
        assert_close(after[:, :, :k], before[:, :, :k], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(after[:, :, k], before[:, :, k], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "frames", "usable", "latent"),
    [
        (WAN, 83, 81, 21),
        (COGVIDEOX, 50, 49, 13),
        (COGVIDEOX, 48, 41, 11),
        (LTX, 165, 161, 21),
        (LTX, 1, 1, 1),
        (WAN, 0, 0, 0),
    ],
)
def test_published_lengths(family: Any, frames: int, usable: int, latent: int) -> None:
    config = family.configs["vae"]
    assert family.codec.usable_frames(config, frames) == usable
    assert family.codec.latent_frames(config, usable) == (latent if usable else 0)


def test_published_sizes() -> None:
    """Pixels per latent along a side, and channels of the latents."""
    found = {
        name: (get_family(name).codec.downscale(config), get_family(name).codec.channels(config))
        for name in ("wan", "cogvideox", "ltx", "text_to_video", "animatediff")
        if (config := get_family(name).configs["vae"])
    }
    assert found == {
        "wan": (8, 16),
        "cogvideox": (8, 16),
        "ltx": (32, 128),
        "text_to_video": (8, 4),
        "animatediff": (8, 4),
    }


def test_15_of_cogvideox_has_a_copy_of_its_first_latent_frame() -> None:
    """81 frames are 21 latent frames, 22 with the copy, eleven patches of two."""
    codec = COGVIDEOX.codec.fitted({"patch_size_t": 2})
    config = COGVIDEOX.configs["vae"]
    assert (codec.usable_frames(config, 81), codec.latent_frames(config, 81)) == (81, 22)
    assert [codec.frames_of(config, k) for k in (0, 1, 2, 21)] == [
        range(1),
        range(1),
        range(1, 5),
        range(77, 81),
    ]


@pytest.mark.parametrize(
    ("case", "size", "message"),
    [
        ("wan", (32, 48, 6), "data.frames=6; allowed with wan: such as 5"),
        ("cogvideox", (64, 64, 5), "data.frames=5; allowed with cogvideox: such as 1"),
        ("wan", (40, 48, 5), "40 x 48 pixels; allowed with wan: multiples of 16"),
        ("wan_ti2v", (48, 64, 5), "multiples of 32"),
        ("ltx", (48, 64, 9), "multiples of 32"),
        ("text_to_video", (64, 64, 0), "data.frames=0; allowed with text_to_video: such as 1"),
    ],
)
def test_sizes_that_a_model_does_not_take(
    video: LoadedModel, case: str, size: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        video.latent_shape(*size)
