"""Train the tiny autoencoder of a world of images; all families of a world share it."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from diffalign.tiny.worlds import SCENES, WORLDS, World
from diffalign.tiny_build import corpus, networks

Say = Callable[[str], None]
BATCH, IMAGES = {32: 32, 64: 16}, {32: 16000, 64: 8000}  # images a step and in all, by their side
KL = 5e-4  # weight of the posterior's KL divergence per pixel value


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels (N, H, W, 3), uint8, to (N, 3, H, W), float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    seconds: float,
    seed: int,
    say: Say,
    start_from: Path | None = None,
    family: str = "sdxl",
    inner: Path | None = None,
) -> tuple[AutoencoderKL, dict[str, float]]:
    """Train for `seconds` of the processor; return the autoencoder and figures for the report.

    The scaling factor is set. `family` is one of `networks.SIZES`; it determines the world and the sizes.
    With `start_from` only the decoder is trained further, so that networks trained on the latents stay valid.
    With `inner`, the folder of an autoencoder with one level less, training starts from its levels.
    """
    torch.manual_seed(seed)
    world, sizes = WORLDS[family], networks.SIZES[family]
    data = to_tensor(corpus.make(IMAGES[sizes.side], seed, world=world).pixels)
    if start_from:
        vae = AutoencoderKL.from_pretrained(start_from)
    elif inner is not None:
        vae = networks.widened(sizes, AutoencoderKL.from_pretrained(inner))
    else:
        vae = networks.autoencoder(sizes)
    vae.train()
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(start_from is None)
    rate = 3e-3 if start_from is None else 1.5e-3
    weights = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-4, betas=(0.9, 0.98))
    start, step = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * done))
        x = data[torch.randint(len(data), (BATCH[sizes.side],))]
        with torch.autocast("cpu", torch.bfloat16, enabled=done < 0.8):  # twice as fast; float32 at the end
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        # normalises by contrast, so that faint and small things count as much as others
        weight = 0.35 / x.flatten(1).std(1).clamp_min(0.1)[:, None, None, None]
        error = (weight * (y - x).square()).mean()
        loss = error + 0.15 * (weight * (y - x).abs()).mean()
        loss = loss + KL * posterior.kl().float().mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            psnr = 10 * np.log10(4 / error.item())
            say(f"autoencoder step {step} psnr {psnr:.1f} dB, {done:.0%} of {seconds:.0f} s")
    vae.eval().requires_grad_(True)
    if start_from is None:
        vae.register_to_config(scaling_factor=round(1 / float(encode(vae, data[:4000]).std()), 5))
    return vae, {
        "steps": step,
        "seconds": round(time.process_time() - start, 1),
        **measure(vae, seed + 1, world=world),
    }


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return the posterior means (N, C, 8, 8), unscaled, of pixels (N, 3, H, H)."""
    return torch.cat([vae.encode(p).latent_dist.mean for p in pixels.split(256)])


@torch.no_grad()
def measure(vae: AutoencoderKL, seed: int, count: int = 1000, world: World = SCENES) -> dict[str, float]:
    """Measure reconstructions of correct renders: PSNR in dB, mean judge score, share of perfect scores."""
    scenes = corpus.make(count, seed, clean=True, world=world)
    x = to_tensor(scenes.pixels)
    y = torch.cat([vae.decode(z).sample for z in encode(vae, x).split(250)]).clamp(-1, 1)
    shown = [p.permute(1, 2, 0).numpy() / 2 + 0.5 for p in y]
    scores = [world.judge(p, t) for p, t in zip(shown, scenes.truths, strict=True)]
    return {
        "psnr_db": round(float(10 * torch.log10(4 / F.mse_loss(y, x))), 2),
        "judged": round(float(np.mean(scores)), 4),
        "judged_perfect": round(float(np.mean(np.array(scores) == 1)), 4),
    }
