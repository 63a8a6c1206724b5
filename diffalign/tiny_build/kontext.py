"""Pre-train a tiny FLUX.1 Kontext on edits of drawn scenes, a share of which are wrong.

As in the pipeline, the source's packed latents follow those of the noisy image, and the first coordinate of
the position ids distinguishes them. A share of the training targets does not follow the instruction, so that
the base is imperfect and preference pairs can improve it.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from diffalign.tiny.edits import mistaken, sample
from diffalign.tiny.scenes import COLORS, SHAPES, SIZES, render
from diffalign.tiny_build import autoencoder, flow_networks, flow_training, networks, text
from diffalign.tiny_build.flow_training import Say

BATCH, RATE = 32, 2e-3
KINDS = ("color",)  # of edits; without changes of shapes some minutes of one core suffice
TOKENS = 10  # T5 tokens of an instruction; the longest has 9
WRONG = 0.25  # share of targets that do not follow the instruction
COUNT = 8000  # edits that are drawn and encoded
AXES = (8, 12, 12)  # dimensions of a head that rotate by each coordinate: image, row, column
SIDE = 2  # side of a patch, in latent pixels


def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer for the instructions: one token a word; other text is spelt in characters."""
    return text.word_tokenizer({"make", "turn", "the", "into", "a", *SIZES, *COLORS, *SHAPES})


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Return the T5 text encoder for this tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=networks.WIDTH,
            d_kv=24,
            d_ff=2 * networks.WIDTH,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def transformer(heads: int = 3) -> FluxTransformer2DModel:
    """Return a FLUX transformer for packed latents (B, 16, 32) with a zero-initialised output."""
    model = FluxTransformer2DModel(
        in_channels=SIDE**2 * networks.LATENT[0],
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=networks.WIDTH,
        pooled_projection_dim=networks.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=AXES,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        _attend_to_the_source(block.attn.to_q, block.attn.to_k)
    return model


def _attend_to_the_source(query: nn.Linear, key: nn.Linear, size: float = 4.0) -> None:
    """Initialise the biases so that the first head attends to the source at the query's own place.

    Rotary embedding turns the first pair of an axis by the coordinate's difference in radians. The first axis
    is 0 in the noisy image and 1 in its source.
    """
    first = [0, *np.cumsum(AXES)[:-1]]
    with torch.no_grad():
        query.bias[first] = size
        query.bias[first[1:]] = key.bias[first[1:]] = 1.5 * size
        key.bias[first[0]], key.bias[first[0] + 1] = 0.0, -size


class Parts(nn.Module):
    """Transformer and text encoders, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = text.tokenizer(tokens=flow_networks.SD3_TOKENS), t5_tokenizer()
        config = networks.text_config(self.tokenizer)
        config.max_position_embeddings, config.num_hidden_layers = flow_networks.SD3_TOKENS, 1
        self.clip, self.t5 = CLIPTextModel(config), t5(self.tokenizer_2)
        self.transformer = transformer()

    def tokens(self, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Return the token ids of CLIP (N, 16) and of T5 (N, 10)."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        long = self.tokenizer_2(instructions, max_length=TOKENS, **options).input_ids
        return self.tokenizer(instructions, **options).input_ids, long

    def forward(self, x: Tensor, time: Tensor, source: Tensor, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """Return the velocity (B, 16, 32) of packed noisy latents, given those of their sources."""
        places = [FluxKontextPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32) for _ in "xs"]
        places[1][:, 0] = 1
        prediction: Tensor = self.transformer(
            hidden_states=torch.cat([x, source], 1),
            timestep=time / 1000,
            encoder_hidden_states=self.t5(tokens[1]).last_hidden_state,
            pooled_projections=self.clip(tokens[0]).pooler_output,
            img_ids=torch.cat(places),
            txt_ids=torch.zeros(TOKENS, 3),
            return_dict=False,
        )[0]
        return prediction[:, : x.shape[1]]


def packed(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """Return the scaled, packed latents (N, 16, 32) of pixels (N, 32, 32, 3), uint8."""
    mean = autoencoder.encode(vae, autoencoder.to_tensor(pixels))
    scaled = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    result: Tensor = FluxKontextPipeline._pack_latents(scaled, *scaled.shape)
    return result


def train(parts: Parts, vae: AutoencoderKL, plan: flow_training.Plan, say: Say) -> dict[str, float]:
    """Train `parts`, which end as their moving average; return figures for the report."""
    rng = np.random.default_rng(plan.seed)
    edits = [sample(rng, "train", KINDS) for _ in range(COUNT)]
    results = [mistaken(edit, rng, KINDS) if rng.random() < WRONG else edit.target for edit in edits]
    source, target = (
        packed(vae, np.stack([np.asarray(render(scene)) for scene in scenes]))
        for scenes in ([edit.source for edit in edits], results)
    )
    short, long = parts.tokens([edit.instruction for edit in edits])
    say(f"kontext: {sum(p.numel() for p in parts.parameters()) / 1e6:.2f}M parameters, {COUNT} edits encoded")

    def loss(_: float) -> Tensor:
        i = torch.randint(COUNT, (BATCH,))
        t = flow_training.times(BATCH, flow_networks.SHIFT)
        tokens = short[i], long[i]
        return flow_training.flow_loss(lambda x, time: parts(x, time, source[i], tokens), target[i], t)

    figures = flow_training.fit(parts.train(), loss, plan, say)
    parts.eval()
    return figures


def pipeline(parts: Parts, vae: AutoencoderKL) -> FluxKontextPipeline:
    """Return the diffusers pipeline of trained parts."""
    return FluxKontextPipeline(
        transformer=parts.transformer,
        scheduler=flow_networks.flow_scheduler(),
        vae=vae,
        text_encoder=parts.clip,
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.t5,
        tokenizer_2=parts.tokenizer_2,
    )
