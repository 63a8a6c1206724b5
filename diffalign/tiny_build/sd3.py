"""Pre-train the tiny Stable Diffusion 3 on the noisy captions of the tiny SDXL.

The context is that of the pipeline without T5: the penultimate hidden states of both CLIPs, followed by zero
tokens, 256 by default. Zero tokens have no position, so they are equal in every layer, and attention to n of
them equals attention to one whose logit is larger by log n. Training computes one and draws n in each step,
so that the model works with 256 and with the few that make alignment cheap.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.tiny_build import flow_networks, flow_training, pretrain, text
from diffalign.tiny_build.flow_training import Say

BATCH, RATE = 64, 2e-3
MOST_ZEROS = 512  # largest number of zero tokens, the pipeline's limit; the smallest is 4


class CountedZeros:
    """Joint attention in which the last context token represents `count` equal ones."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new states of both streams, as diffusers' JointAttnProcessor2_0 does."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        x, c = hidden_states, encoder_hidden_states
        query = torch.cat([attn.norm_q(heads(attn.to_q(x))), attn.norm_added_q(heads(attn.add_q_proj(c)))], 2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(x))), attn.norm_added_k(heads(attn.add_k_proj(c)))], 2)
        value = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(c))], 2)
        bias = torch.zeros(key.shape[2])
        bias[-1] = math.log(self.count)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None, None, None])
        image, context = out.transpose(1, 2).flatten(2).split([x.shape[1], c.shape[1]], dim=1)
        return attn.to_out[0](image), context if attn.context_pre_only else attn.to_add_out(context)


class Parts(nn.Module):
    """Transformer and text encoders, trained together."""

    family = "sd3"

    def __init__(self) -> None:
        super().__init__()
        self.tokenizers = [text.tokenizer(pad, flow_networks.SD3_TOKENS) for pad in (text.END, "!")]
        self.encoders = nn.ModuleList(flow_networks.sd3_text_encoders(self.tokenizers[0]))
        self.transformer = flow_networks.sd3_transformer()

    def tokens(self, captions: list[str]) -> list[Tensor]:
        """Return token ids (N, 16) for each encoder."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return [tok(captions, **options).input_ids for tok in self.tokenizers]

    def restore(self, pipe: Any) -> None:
        """Load the weights of a pipeline."""
        for encoder, other in zip(self.encoders, (pipe.text_encoder, pipe.text_encoder_2), strict=True):
            encoder.load_state_dict(other.state_dict())
        self.transformer.load_state_dict(pipe.transformer.state_dict())

    def forward(self, z: Tensor, time: Tensor, tokens: list[Tensor]) -> Tensor:
        """Return the velocity (B, 8, 8, 8) of noisy latents; one zero token ends the context."""
        outs = [e(t, output_hidden_states=True) for e, t in zip(self.encoders, tokens, strict=True)]
        states = torch.cat([o.hidden_states[-2] for o in outs], -1)
        pooled = torch.cat([o.text_embeds for o in outs], -1)
        context = F.pad(states, (0, 0, 0, 1))
        return self.transformer(
            hidden_states=z, timestep=time, encoder_hidden_states=context, pooled_projections=pooled
        ).sample


def borrow_text(parts: Parts, pipe: Any) -> None:
    """Initialise both text encoders from those of the tiny SDXL, truncated to their shapes."""
    for encoder, other in zip(parts.encoders, (pipe.text_encoder, pipe.text_encoder_2), strict=True):
        state = {name.removeprefix("text_model."): value for name, value in other.state_dict().items()}
        with torch.no_grad():
            for name, value in encoder.named_parameters():
                source = state.get(name.removeprefix("text_model."))
                if source is not None:
                    value.copy_(source[: len(value)])


def train(
    parts: Parts, vae: AutoencoderKL, plan: flow_training.Plan, say: Say, count: int = 24000
) -> dict[str, float]:
    """Train `parts`, which end as their moving average; return figures for the report."""
    data = pretrain.Latents(parts, vae, count, plan.seed)  # type: ignore[arg-type]
    data.mean -= vae.config.shift_factor * vae.config.scaling_factor
    size = sum(p.numel() for p in parts.parameters())
    say(f"sd3: {size / 1e6:.2f}M parameters, {count} pictures encoded")
    zeros = CountedZeros()
    parts.transformer.set_attn_processor(zeros)

    def loss(_: float) -> Tensor:
        z, tokens = data.draw(BATCH)[:2]
        zeros.count = round(math.exp(float(torch.empty(1).uniform_(math.log(4), math.log(MOST_ZEROS)))))
        t = flow_training.times(BATCH, 1.0)
        return flow_training.flow_loss(lambda x, time: parts(x, time, tokens), z, t)

    figures = flow_training.fit(parts.train(), loss, plan, say)
    parts.eval()
    return figures


def pipeline(parts: Parts, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Return the diffusers pipeline of trained parts, without T5."""
    fresh = flow_networks.sd3_transformer()  # with diffusers' own attention
    fresh.load_state_dict(parts.transformer.state_dict())
    return StableDiffusion3Pipeline(
        transformer=fresh.eval(),
        scheduler=flow_networks.flow_scheduler(),
        vae=vae,
        text_encoder=parts.encoders[0],
        tokenizer=parts.tokenizers[0],
        text_encoder_2=parts.encoders[1],
        tokenizer_2=parts.tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def centred(folder: Path) -> AutoencoderKL:
    """Load the tiny autoencoder of `folder` and set Stable Diffusion 3's shift factor, the latents' mean."""
    vae = AutoencoderKL.from_pretrained(folder).eval()
    from diffalign.tiny_build import autoencoder, corpus

    pixels = autoencoder.to_tensor(corpus.make(1000, 0).pixels)
    vae.register_to_config(shift_factor=round(float(autoencoder.encode(vae, pixels).mean()), 4))
    return vae
