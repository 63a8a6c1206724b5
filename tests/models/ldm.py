"""Write a tiny Stable Diffusion 1.x pipeline as a single-file checkpoint with the original repository's
tensor names.
"""

import re

from diffusers import StableDiffusionPipeline
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file_state(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    state = {}
    for name, tensor in pipeline.unet.state_dict().items():
        state[f"model.diffusion_model.{unet_name(name, pipeline.unet.config.layers_per_block)}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        new = vae_name(name, len(pipeline.vae.config.block_out_channels))
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new)
        state[f"first_stage_model.{new}"] = tensor[:, :, None, None] if is_projection else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        text = name if name.startswith("text_model.") else f"text_model.{name}"
        state[f"cond_stage_model.transformer.{text}"] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def unet_name(name: str, layers: int) -> str:
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in fixed.items():
        if name.startswith(f"{old}."):
            return name.replace(old, new)
    if name.startswith("mid_block."):
        _, kind, index, rest = name.split(".", 3)
        if kind == "attentions":
            return f"middle_block.1.{rest}"
        return f"middle_block.{2 * int(index)}.{rename(rest, RESNET)}"
    side, block, kind, index, rest = name.split(".", 4)
    if side == "down_blocks":
        position = 1 + int(block) * (layers + 1) + int(index)
        if kind == "downsamplers":
            return f"input_blocks.{1 + int(block) * (layers + 1) + layers}.0.op.{rest.removeprefix('conv.')}"
        slot = (0, rename(rest, RESNET)) if kind == "resnets" else (1, rest)
        return f"input_blocks.{position}.{slot[0]}.{slot[1]}"
    position = int(block) * (layers + 1) + int(index)
    if kind == "upsamplers":
        position = int(block) * (layers + 1) + layers
        slot_of_upsampler = 2 if block == "0" else 1  # after the attention, where the block has one
        return f"output_blocks.{position}.{slot_of_upsampler}.{rest}"
    slot = (0, rename(rest, RESNET)) if kind == "resnets" else (1, rest)
    return f"output_blocks.{position}.{slot[0]}.{slot[1]}"


def vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.attentions\.0\.", "mid.attn_1.", name)
    if "attn_1" in name:
        return rename(name, VAE_ATTENTION)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    name = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", name
    )
    return name.replace("conv_shortcut", "nin_shortcut")


def rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if f"{old}." in name:
            return name.replace(f"{old}.", f"{new}.")
    return name
