"""Train the tiny causal video autoencoder."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from torch.nn import functional as F

from diffalign.tiny_build import flow_training, motion_corpus
from diffalign.tiny_build.flow_training import Say

KL = 1e-4  # weight of the posterior's KL divergence per pixel value
RATE = 3e-3
STAGES = ((0.15, 1, 40), (0.4, 5, 16), (0.7, 9, 12), (1.0, 17, 8))  # end as a share of time, frames, clips


def to_tensor(frames: np.ndarray) -> Tensor:
    """Convert frames (N, F, H, W, 3), uint8, to a tensor (N, 3, F, H, W), uint8."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).contiguous()


def scaled(pixels: Tensor) -> Tensor:
    """Scale uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def train(
    vae: AutoencoderKLWan, plan: flow_training.Plan, say: Say, count: int = 4000, decoder_only: bool = False
) -> dict[str, float]:
    """Train the autoencoder, then store the latents' means and stds in its configuration.

    With `decoder_only` the encoder is frozen, so that a network trained on the latents stays valid.
    """
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not decoder_only)
    data = to_tensor(motion_corpus.make(count, plan.seed).frames)
    say(f"wan_vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters, {count} clips drawn")

    def loss(done: float) -> Tensor:
        _, frames, batch = next(stage for stage in STAGES if done <= stage[0])
        begin = int(torch.randint(data.shape[2] - frames + 1, (1,)))
        x = scaled(data[torch.randint(len(data), (batch,)), :, begin : begin + frames])
        posterior = vae.encode(x).latent_dist
        y = decode(vae, posterior.sample())
        weight = near_things(x)
        error = (weight * ((y - x).square() + 0.15 * (y - x).abs())).mean()
        return error + KL * posterior.kl().mean() / x[0].numel()

    figures = flow_training.fit(vae.train(), loss, plan, say)
    vae.eval().requires_grad_(True)
    if not decoder_only:
        z = encode(vae, data[:512])
        vae.register_to_config(
            latents_mean=[round(v, 4) for v in z.mean((0, 2, 3, 4)).tolist()],
            latents_std=[round(v, 4) for v in z.std((0, 2, 3, 4)).tolist()],
        )
    return {**figures, **measure(vae, plan.seed + 1)}


def near_things(x: Tensor) -> Tensor:
    """Return loss weights (N, 1, F, H, W) for pixels in [-1, 1]: 3 near things, 0.3 on the background.

    Without them the background would dominate the loss.
    """
    distance = (x - x[..., :1, :1]).abs().amax(1)
    near = F.max_pool2d((distance > 0.2).float(), 5, stride=1, padding=2)
    return 0.3 + 2.7 * near[:, None]


def decode(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """Decode latents to pixels (N, 3, F, 32, 32) without the autoencoder's clamp.

    The clamp would block the gradient of pixels outside [-1, 1].
    """
    vae.clear_cache()
    z, frames = vae.post_quant_conv(z), []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        cache = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
        frames.append(vae.decoder(z[:, :, i : i + 1], first_chunk=i == 0, **cache))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), patch_size=vae.config.patch_size)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Return the posterior means of pixels (N, 3, F, 32, 32), uint8, in the autoencoder's own scale."""
    return torch.cat([vae.encode(scaled(p)).latent_dist.mean for p in pixels.split(64)])


@torch.no_grad()
def measure(vae: AutoencoderKLWan, seed: int, count: int = 200) -> dict[str, float]:
    """Return the PSNR in dB on clips without defects, of all frames and of the first one."""
    pixels = to_tensor(motion_corpus.make(count, seed, clean=True).frames)
    y = torch.cat([vae.decode(z).sample for z in encode(vae, pixels).split(50)]).clamp(-1, 1)
    error = (y - scaled(pixels)).square()
    return {
        "psnr_db": round(float(10 * torch.log10(4 / error.mean())), 2),
        "psnr_db_first_frame": round(float(10 * torch.log10(4 / error[:, :, 0].mean())), 2),
    }


def load(folder: Path) -> AutoencoderKLWan:
    """Load the autoencoder of a folder, in eval mode."""
    vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(folder).eval()
    return vae
