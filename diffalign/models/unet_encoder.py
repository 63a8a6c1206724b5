"""The encoder half of a Stable Diffusion UNet: features of noisy latents.

It is diffusers' own UNet2DConditionModel without its up blocks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models.sources import user_errors


def load_part(field: str, cls: Any, source: str, subfolder: str, dtype: torch.dtype) -> Any:
    """Load a whole network of a pipeline, or of a folder laid out like one; frozen, in eval mode.

    Args:
        field: how errors name the source.
        cls: a class of diffusers or transformers.
        source: folder or hub id.
        subfolder: in it.
        dtype: of the weights.

    Raises:
        UserError: it does not exist or is unreachable, or weights are missing or of another shape.
    """
    with user_errors(field, source):
        loaded: Any = cls.from_pretrained(source, subfolder=subfolder, dtype=dtype, output_loading_info=True)
    network, loading = loaded
    missing = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if missing:
        raise UserError(
            f"{field}={source!r}: {subfolder} holds no whole {cls.__name__}: {len(missing)} weights are "
            f"missing or of another shape, first {missing[0]}"
        )
    return network.eval().requires_grad_(False)


def load_unet_encoder(field: str, source: str, subfolder: str, dtype: torch.dtype) -> Any:
    """Load a UNet2DConditionModel without its up blocks; see ``load_part``."""
    from diffusers import UNet2DConditionModel

    unet = load_part(field, UNet2DConditionModel, source, subfolder, dtype)
    # half of the weights
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, None
    return unet


def load_autoencoder(field: str, source: str) -> Any:
    """Load the AutoencoderKL of a pipeline in float32, which is safe for all; see ``load_part``."""
    from diffusers import AutoencoderKL

    return load_part(field, AutoencoderKL, source, "vae", torch.float32)


def encoder_features(
    unet: Any,
    x_t: Float[Tensor, "B C h w"],
    timestep: Float[Tensor, " B"],
    states: Float[Tensor, "B L D"],
    added: Mapping[str, Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Return the network's features of latents at each level, before downsampling, and in the middle.

    Args:
        unet: a UNet2DConditionModel, whose up blocks are not called.
        x_t: noisy latents in the network's dtype.
        timestep: whole timesteps.
        states: of the text.
        added: further conditions, ``text_embeds`` and ``time_ids`` of an SDXL.

    Returns:
        (B, C_i, h_i, w_i) of each level, and (B, C, h', w') of the middle; differentiable.
    """
    from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D

    time = unet.time_embedding(unet.get_time_embed(x_t, timestep))
    more = unet.get_aug_embed(time, states, added)
    time = time if more is None else time + more
    x, levels = unet.conv_in(x_t), []
    for block in unet.down_blocks:
        arguments = {"encoder_hidden_states": states} if isinstance(block, CrossAttnDownBlock2D) else {}
        x, passed = block(hidden_states=x, temb=time, **arguments)
        levels.append(passed[len(block.resnets) - 1])
    return levels, unet.mid_block(x, time, encoder_hidden_states=states)
