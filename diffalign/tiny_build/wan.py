"""Pre-train the tiny Wan on moving shapes with noisy captions.

The context is that of the pipeline: UMT5's states up to the prompt's end, then zeros up to
``max_sequence_length``, 512 by default. The zeros are equal, so attention to n of them equals attention to
one whose logit is larger by log n. Training computes one and draws n in each step.
"""

import math
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.tiny_build import flow_networks, flow_training, motion_corpus, text
from diffalign.tiny_build.flow_training import Say
from diffalign.tiny_build.video_autoencoder import encode, to_tensor

BATCH, RATE = 32, 2e-3
DROPOUT = 0.1  # share of captions dropped
MOST_ZEROS = 512


class CountedZeros:
    """Wan's attention, in which the last text token represents `count` equal ones."""

    def __init__(self) -> None:
        self.count = 1
        self.inner = WanAttnProcessor()

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Return the new states, as WanAttnProcessor does."""
        if encoder_hidden_states is not None:
            bias = torch.zeros(encoder_hidden_states.shape[1])
            bias[-1] = math.log(self.count)
            attention_mask = bias[None, None, None]
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class Parts(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = text.t5_tokenizer()
        self.encoder = flow_networks.wan_text_encoder(self.tokenizer)
        self.transformer = flow_networks.wan_transformer()

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and masks, (N, 15) each."""
        out = self.tokenizer(
            captions,
            padding="max_length",
            max_length=flow_networks.WAN_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return out.input_ids, out.attention_mask

    def restore(self, pipe: Any) -> None:
        """Load the weights of a pipeline."""
        self.encoder.load_state_dict(pipe.text_encoder.state_dict())
        self.transformer.load_state_dict(pipe.transformer.state_dict())

    def forward(self, z: Tensor, time: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the velocity (B, 16, 5, 4, 4) of noisy latents; one zero token ends the context."""
        states = self.encoder(tokens, mask).last_hidden_state * mask[..., None]
        return self.transformer(
            hidden_states=z, timestep=time, encoder_hidden_states=F.pad(states, (0, 0, 0, 1))
        ).sample


def train(
    parts: Parts, vae: AutoencoderKLWan, plan: flow_training.Plan, say: Say, count: int = 6000
) -> dict[str, float]:
    """Train `parts`, which end as their moving average; return figures for the report."""
    data = motion_corpus.make(count, plan.seed)
    moments = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None, None]
    z = (encode(vae, to_tensor(data.frames)) - moments[0]) / moments[1]
    tokens, mask = parts.tokens(data.captions)
    empty, empty_mask = parts.tokens([""])
    say(f"wan: {sum(p.numel() for p in parts.parameters()) / 1e6:.2f}M parameters, {count} clips encoded")
    zeros = CountedZeros()
    parts.transformer.set_attn_processor(zeros)

    def loss(_: float) -> Tensor:
        i = torch.randint(count, (BATCH,))
        drop = torch.rand(BATCH, 1) < DROPOUT
        ids, attended = torch.where(drop, empty, tokens[i]), torch.where(drop, empty_mask, mask[i])
        zeros.count = round(math.exp(float(torch.empty(1).uniform_(0, math.log(MOST_ZEROS)))))
        t = flow_training.times(BATCH, flow_networks.SHIFT)
        return flow_training.flow_loss(lambda x, time: parts(x, time, ids, attended), z[i], t)

    figures = flow_training.fit(parts.train(), loss, plan, say)
    parts.eval()
    parts.transformer.set_attn_processor(WanAttnProcessor())
    return figures


def pipeline(parts: Parts, vae: AutoencoderKLWan) -> WanPipeline:
    """Return the diffusers pipeline of trained parts."""
    return WanPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.encoder,
        vae=vae,
        scheduler=flow_networks.wan_scheduler(),
        transformer=parts.transformer,
    )


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: list[str],
    seed: int,
    *,
    steps: int = 12,
    guidance: float = 3.0,
    tokens: int = 24,
    batch: int = 64,
) -> np.ndarray:
    """Sample a clip a prompt with the pipeline's own call: (N, 17, 32, 32, 3), uint8; clip i has seed + i."""
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        out = pipe(
            part,
            height=32,
            width=32,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=tokens,
            generator=[torch.Generator().manual_seed(seed + i + k) for k in range(len(part))],
        )
        clips.append((out.frames * 255).round().astype(np.uint8))
    return np.concatenate(clips)
