"""Pre-train the tiny Stable Diffusion pipelines on noisy captions.

UNet and text encoders are trained together on pre-computed latents. The conditioning is that of the
pipelines. SDXL uses the penultimate hidden states of both encoders, the pooled text of the second and the six
time ids, and zeros for a dropped caption. SD 1.5 uses the last hidden state, and that of the empty prompt for
a dropped caption.
"""

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, distributed, multiprocessing, nn

from diffalign.tiny.worlds import WORLDS
from diffalign.tiny_build import autoencoder, corpus, flow_training, networks, text

Say = Callable[[str], None]
DROPOUT = 0.1  # share of captions dropped, for classifier-free guidance
BATCH, RATE, DECAY = 64, 2e-3, 0.998


class Parts(nn.Module):
    """The trained parts of a family: UNet and text encoders, and the family's conditioning."""

    def __init__(self, family: str):
        super().__init__()
        self.family = family
        pads = (text.END,) if family == "sd15" else (text.END, "!")
        self.tokenizers = [text.tokenizer(pad, family=family) for pad in pads]
        self.encoders = nn.ModuleList(networks.text_encoders(family, self.tokenizers[0]))
        self.unet = networks.unet(family).to(memory_format=torch.channels_last)

    def tokens(self, captions: list[str]) -> list[Tensor]:
        """Return token ids (N, 32) for each encoder."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return [tok(captions, **options).input_ids for tok in self.tokenizers]

    def condition(self, tokens: list[Tensor], time_ids: Tensor, drop: Tensor) -> dict[str, Any]:
        """Return the UNet's keyword arguments; `drop` (B,) is 1 where the caption is dropped."""
        if self.family == "sd15":
            # a dropped caption has the tokens of the empty prompt
            return {"encoder_hidden_states": self.encoders[0](tokens[0])[0]}
        outs = [e(t, output_hidden_states=True) for e, t in zip(self.encoders, tokens, strict=True)]
        keep = 1 - drop
        states = torch.cat([o.hidden_states[-2] for o in outs], -1) * keep[:, None, None]
        added = {"text_embeds": outs[1].text_embeds * keep[:, None], "time_ids": time_ids}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

    def forward(self, z: Tensor, t: Tensor, tokens: list[Tensor], time_ids: Tensor, drop: Tensor) -> Tensor:
        """Return the predicted noise (B, C, 8, 8)."""
        return self.unet(z, t, **self.condition(tokens, time_ids, drop)).sample


class Latents:
    """The encoded corpus: scaled posterior means and stds of latents, tokens, time ids."""

    def __init__(self, parts: Parts, vae: AutoencoderKL, count: int, seed: int):
        data = corpus.make(count, seed, world=WORLDS[parts.family])
        pixels = autoencoder.to_tensor(data.pixels)
        with torch.no_grad():
            posteriors = [vae.encode(p).latent_dist for p in pixels.split(256)]
        scale = vae.config.scaling_factor
        self.mean = torch.cat([p.mean for p in posteriors]) * scale
        self.std = torch.cat([p.std for p in posteriors]) * scale
        self.tokens = parts.tokens(data.captions)
        self.empty = [t[0] for t in parts.tokens([""])]
        self.time_ids = torch.from_numpy(data.time_ids)

    def share(self) -> None:
        """Move the tensors to memory shared with worker processes."""
        for tensor in (self.mean, self.std, self.time_ids, *self.tokens, *self.empty):
            tensor.share_memory_()

    def draw(self, batch: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Return a random batch: latents, tokens, time ids, drop flags."""
        i = torch.randint(len(self.mean), (batch,))
        drop = (torch.rand(batch) < DROPOUT).float()
        tokens = [
            torch.where(drop.bool()[:, None], e, t[i]) for t, e in zip(self.tokens, self.empty, strict=True)
        ]
        return self.mean[i] + self.std[i] * torch.randn_like(self.mean[i]), tokens, self.time_ids[i], drop


def times(batch: int) -> Tensor:
    """Draw timesteps (B,): half over all, half over 400 to 999, which determine the layout."""
    low = torch.where(torch.arange(batch) % 2 == 0, 0, 400)
    return low + (torch.rand(batch) * (1000 - low)).long()


def train(
    family: str,
    vae: AutoencoderKL,
    seconds: float,
    seed: int,
    say: Say,
    *,
    count: int = 24000,
    start_from: dict[str, Tensor] | None = None,
    workers: int = 2,
) -> tuple[Parts, dict[str, float]]:
    """Train a family for `seconds`; return the moving average of its parts, and figures for the report.

    `workers` single-threaded processes share the batch, which is faster than threads for networks this small.
    Training starts from the weights `start_from` (see `weights`) if given, at a lower learning rate.
    """
    torch.manual_seed(seed)
    parts = Parts(family)
    if start_from is not None:
        parts.load_state_dict({**parts.state_dict(), **start_from})
    data = Latents(parts, vae, count, seed)
    data.share()
    size = sum(p.numel() for p in parts.parameters())
    say(f"{family}: {size / 1e6:.2f}M parameters, {count} pictures encoded")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rate = RATE if start_from is None else 0.75 * RATE
        job = Job(family, parts.state_dict(), data, seconds, seed, workers, Path(folder), rate)
        multiprocessing.start_processes(_work, args=(job, say), nprocs=workers, start_method="spawn")
        result = torch.load(Path(folder) / "result.pt")
    parts.load_state_dict(result["average"])
    figures = {"steps": result["step"], "seconds": round(time.monotonic() - start, 1), "loss": result["loss"]}
    return parts.eval(), figures


def train_alone(parts: Parts, data: Latents, plan: flow_training.Plan, say: Say) -> dict[str, float]:
    """Train `parts` in this process by a resumable plan; they end as their moving average.

    Returns figures for the report.
    """
    figures = flow_training.fit(parts.train(), lambda _: _loss(parts, data, BATCH), plan, say)
    parts.eval()
    return figures


@dataclass(frozen=True)
class Job:
    """The shared state of a training's processes; `folder` holds their rendezvous file and the result."""

    family: str
    state: dict[str, Tensor]
    data: Latents
    seconds: float
    seed: int
    workers: int
    folder: Path
    rate: float


def _work(rank: int, job: Job, say: Say) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{job.folder}/meet", rank=rank, world_size=job.workers
    )
    parts = Parts(job.family)
    parts.load_state_dict(job.state)
    torch.manual_seed(job.seed * job.workers + rank + 1)
    average = deepcopy(parts).requires_grad_(False)
    weights = [p for p in parts.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=1e-3, betas=(0.9, 0.99))
    start, step, recent, done = time.monotonic(), 0, 0.0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = job.rate * min(1, (step + 1) / 200) * (0.5 + 0.5 * np.cos(np.pi * done))
        loss = _loss(parts, job.data, BATCH // job.workers)
        optimizer.zero_grad()
        loss.backward()
        value, done = _share(weights, loss.item(), (time.monotonic() - start) / job.seconds, rank)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(
            list(average.parameters()), list(parts.parameters()), 1 - min(DECAY, step / (step + 10))
        )
        recent = 0.99 * recent + 0.01 * value if step > 1 else value
        if rank == 0 and step % 200 == 0:
            passed = time.monotonic() - start
            say(f"{job.family} step {step} loss {recent:.4f} {passed:.0f} s of {job.seconds:.0f}")
    if rank == 0:
        result = {"average": average.state_dict(), "step": step, "loss": round(recent, 4)}
        torch.save(result, job.folder / "result.pt")
    distributed.destroy_process_group()


def _loss(parts: Parts, data: Latents, batch: int) -> Tensor:
    """Return the mean squared error of the noise on a random batch."""
    z, tokens, time_ids, drop = data.draw(batch)
    t, eps = times(batch), torch.randn_like(z)
    a = networks.scheduler().alphas_cumprod[t][:, None, None, None]
    return (parts(a.sqrt() * z + (1 - a).sqrt() * eps, t, tokens, time_ids, drop) - eps).square().mean()


def _share(weights: list[nn.Parameter], loss: float, done: float, rank: int) -> tuple[float, float]:
    """Average the gradients over the processes; return the mean loss, and the clock of the first process."""
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([loss, done if rank == 0 else 0.0])])
    distributed.all_reduce(flat)
    flat[:-1] /= distributed.get_world_size()
    for weight, grad, part in zip(weights, grads, flat[:-2].split([g.numel() for g in grads]), strict=True):
        weight.grad = part.view_as(grad)
    return float(flat[-2]), float(flat[-1])


def weights(family: str, pipe: Any) -> dict[str, Tensor]:
    """Return weights of a pipeline as initial weights for `family`.

    From SDXL to SD 1.5 these are the first text encoder and the matching part of the UNet: the slice of the
    cross-attention for that encoder, and linear projections as 1 x 1 convolutions.
    """
    parts = Parts(family)
    state = parts.state_dict()
    sources = {
        "encoders.0": pipe.text_encoder,
        "encoders.1": getattr(pipe, "text_encoder_2", None),
        "unet": pipe.unet,
    }
    given = {f"{n}.{k}": v for n, m in sources.items() if m is not None for k, v in m.state_dict().items()}
    matching = {}
    for name, value in given.items():
        if name not in state:
            continue
        if state[name].ndim == 2 and value.shape != state[name].shape:
            value = value[:, : state[name].shape[1]]
        if value.numel() == state[name].numel():
            matching[name] = value.reshape(state[name].shape).clone()
    return matching


def pipeline(parts: Parts, vae: AutoencoderKL) -> Any:
    """Return the diffusers pipeline of trained parts."""
    common = {"vae": vae, "unet": parts.unet, "scheduler": networks.scheduler()}
    if parts.family == "sd15":
        return StableDiffusionPipeline(
            text_encoder=parts.encoders[0],
            tokenizer=parts.tokenizers[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **common,
        )
    return StableDiffusionXLPipeline(
        text_encoder=parts.encoders[0],
        text_encoder_2=parts.encoders[1],
        tokenizer=parts.tokenizers[0],
        tokenizer_2=parts.tokenizers[1],
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
        **common,
    )


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: list[str],
    seed: int,
    steps: int = 20,
    guidance: float = 2.0,
    batch: int = 128,
    **more: Any,
) -> np.ndarray:
    """Sample one image a prompt with the pipeline's own call: (N, H, H, 3), float in [0, 1].

    Image i has the seed `seed` + i; `more` are arguments of the call.
    """
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        out = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            **more,
        )
        images.append(out.images)
    return np.concatenate(images)
