"""The networks of the tiny flow models, as diffusers and transformers classes, and their schedulers."""

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from diffalign.tiny_build import networks

SD3_TOKENS = 16  # CLIP tokens of a caption; the longest has 14
SHIFT = 2.0  # timestep shift, towards the high noise levels that determine the layout


def flow_scheduler(shift: float = SHIFT) -> FlowMatchEulerDiscreteScheduler:
    """Return an Euler scheduler for rectified flow with a static shift."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def sd3_text_encoders(tokenizer: CLIPTokenizer) -> list[CLIPTextModelWithProjection]:
    """Return SD3's two CLIP text encoders with projections."""
    config = networks.text_config(tokenizer)
    config.max_position_embeddings = SD3_TOKENS
    return [CLIPTextModelWithProjection(config) for _ in range(2)]


def sd3_transformer(width: int = 96, layers: int = 4, patch: int = 2) -> SD3Transformer2DModel:
    """Return an SD3 transformer for latents (B, 8, 8, 8) with zero-initialised modulation and output."""
    side = networks.LATENT[1]
    model = SD3Transformer2DModel(
        sample_size=side,
        patch_size=patch,
        in_channels=networks.LATENT[0],
        out_channels=networks.LATENT[0],
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * networks.WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * networks.WIDTH,
        pos_embed_max_size=side // patch,
        qk_norm="rms_norm",
    )
    for block in model.transformer_blocks:
        _zero(block.norm1.linear)
        _zero(block.norm1_context.linear)
    _zero(model.norm_out.linear)
    _zero(model.proj_out)
    return model


def _zero(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()


WAN_LATENT = (16, 5, 4, 4)  # channels, frames, height, width
WAN_TOKENS = 15  # UMT5 tokens of a caption in training; the longest has 14


def wan_vae() -> AutoencoderKLWan:
    """Return a Wan autoencoder: pixels (B, 3, 17, 32, 32) in [-1, 1] to latents (B, 16, 5, 4, 4).

    It compresses 4 times in time and 8 times in space; patches of 2 x 2 pixels contribute a factor of 2, as
    in Wan 2.2.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=WAN_LATENT[0],
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * WAN_LATENT[0],
        latents_std=[1.0] * WAN_LATENT[0],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            _spread(layer, 0.5 if name.endswith(("conv2", "proj")) else 1.0)
    with torch.no_grad():  # a small initial posterior variance, or the decoder gets no signal
        vae.quant_conv.weight[WAN_LATENT[0] :] *= 0.1
        vae.quant_conv.bias[WAN_LATENT[0] :] = -5.0
    return vae


def _spread(layer: nn.Conv2d | nn.Conv3d, gain: float) -> None:
    """Initialise a convolution to preserve variance, mostly from the newest frame, without bias.

    With other initialisations constants dominate, and the network learns only the mean of the images.
    """
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        now = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, -1]
        nn.init.kaiming_normal_(now, nonlinearity="linear")
        now *= gain
        if layer.weight.ndim == 5:
            before = layer.weight[:, :, :-1]
            before.normal_(std=0.3 * float(now.std()))


def wan_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Return Wan's text encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=networks.WIDTH,
            d_kv=24,
            d_ff=2 * networks.WIDTH,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def wan_transformer(heads: int = 4, layers: int = 6) -> WanTransformer3DModel:
    """Return a Wan transformer for latents (B, 16, 5, 4, 4): 80 tokens, heads of width 24."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=24,
        in_channels=WAN_LATENT[0],
        out_channels=WAN_LATENT[0],
        text_dim=networks.WIDTH,
        freq_dim=64,
        ffn_dim=72 * heads,
        num_layers=layers,
    )
    _zero(model.proj_out)
    return model


def wan_scheduler(shift: float = SHIFT) -> UniPCMultistepScheduler:
    """Return Wan's scheduler: UniPC on flow sigmas with a static shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
