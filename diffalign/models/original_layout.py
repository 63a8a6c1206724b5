"""Names of modules and tensors in the layout of each model's original code, by diffusers' names.

ComfyUI, A1111, Forge and kohya's scripts name modules as the original repositories do: CompVis' and
Stability's ``input_blocks`` for Stable Diffusion 1.x and XL; for transformers see
``diffalign.models.original_transformers``. Source: the converters of diffusers/loaders/single_file_utils.py
(0.42), read in the other direction.
"""

import re
from collections.abc import Iterable, Sequence

from diffalign.models.original_transformers import TABLES, Place

_RESNET = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)
_UNET_ENDS = (
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
)


def unet_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """Return the original name of each tensor of a UNet by its diffusers name.

    Args:
        names: all tensor names of the network (``state_dict``'s), since a block's slots depend on its parts.
        layers: ``layers_per_block``.

    Raises:
        KeyError: a name that the original layout has no place for, such as a motion module's.
    """
    names = list(names)
    with_attention = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return {name: _unet_name(name, layers, with_attention) for name in names}


def _unet_name(name: str, layers: int, with_attention: set[str]) -> str:
    for ours, original in _UNET_ENDS:
        if name.startswith(ours):
            return original + name.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = match.groups()
        return (
            f"middle_block.1.{rest}"
            if kind == "attentions"
            else f"middle_block.{2 * int(index)}.{_resnet(rest)}"
        )
    match = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    )
    if match is None:
        raise KeyError(name)
    side, block, kind, index, rest = match.groups()
    before = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + before + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{before + layers}.{2 if block in with_attention else 1}.{rest}"
    place = (
        f"input_blocks.{1 + before + int(index)}"
        if side == "down"
        else f"output_blocks.{before + int(index)}"
    )
    return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def _resnet(rest: str) -> str:
    for ours, original in _RESNET:
        if rest.startswith(ours):
            return original + rest.removeprefix(ours)
    raise KeyError(rest)


_VAE_ATTENTION = (("group_norm.", "norm."), ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."))


def vae_names(names: Iterable[str], blocks: int) -> dict[str, str]:
    """Return the original name of each tensor of an AutoencoderKL by its diffusers name.

    The original keeps the attention's projections as 1 x 1 convolutions: see ``is_vae_projection``.

    Args:
        blocks: number of ``block_out_channels``; the original counts the decoder's blocks from the other end.
    """
    return {name: _vae_name(name, blocks) for name in names}


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", name):
        side, rest = match.groups()
        for ours, original in (*_VAE_ATTENTION, ("to_out.0.", "proj_out.")):
            if rest.startswith(ours):
                rest = original + rest.removeprefix(ours)
                break
        return f"{side}.mid.attn_1.{rest}"
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
    return re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", name
    )


def is_vae_projection(original: str) -> bool:
    """Return whether a tensor of this original name is a 1 x 1 convolution that diffusers keeps as linear."""
    return re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", original) is not None


def original_modules(network_class: str, modules: Sequence[str], layers: int = 0) -> dict[str, Place]:
    """Return where the original layout keeps each module of a network; {} where no layout is known.

    Args:
        network_class: diffusers' class name.
        modules: names of its linear and convolutional modules.
        layers: ``layers_per_block`` of a UNet.

    Returns:
        By original name, the modules that it holds; those without a place are left out.
    """
    if network_class == "UNet2DConditionModel":
        try:
            names = unet_names([f"{module}.weight" for module in modules], layers)
        except KeyError:
            return {}
        return {v.removesuffix(".weight"): Place((k.removesuffix(".weight"),)) for k, v in names.items()}
    make = TABLES.get(network_class)
    if make is None:
        return {}
    there = set(modules)
    return {name: place for name, place in make(modules).items() if there.issuperset(place.modules)}
