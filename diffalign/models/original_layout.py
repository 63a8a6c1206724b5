"""Names of modules and tensors in the layout of each model's original code, by diffusers' names.

ComfyUI, A1111, Forge and kohya's scripts name modules as the original repositories do: CompVis' and
Stability's ``input_blocks`` for Stable Diffusion 1.x and XL, ``joint_blocks`` for SD3, ``double_blocks`` for
FLUX, ``self_attn`` for Wan. Sources: the key tables of comfy/utils.py (Comfy-Org/ComfyUI at 09708ea) and the
converters of diffusers/loaders/single_file_utils.py (0.42), read in the other direction.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Place:
    """Modules of diffusers that one module of the original layout holds, stacked along its output rows.

    Attributes:
        modules: diffusers' names in the order of the rows.
        swapped: whether the original keeps the two halves of the rows (shift, scale) the other way round.
    """

    modules: tuple[str, ...]
    swapped: bool = False


def _sd3(modules: Sequence[str]) -> dict[str, Place]:
    blocks = _count(modules, "transformer_blocks")
    table = {
        "context_embedder": Place(("context_embedder",)),
        "t_embedder.mlp.0": Place(("time_text_embed.timestep_embedder.linear_1",)),
        "t_embedder.mlp.2": Place(("time_text_embed.timestep_embedder.linear_2",)),
        "y_embedder.mlp.0": Place(("time_text_embed.text_embedder.linear_1",)),
        "y_embedder.mlp.2": Place(("time_text_embed.text_embedder.linear_2",)),
        "x_embedder.proj": Place(("pos_embed.proj",)),
        "final_layer.adaLN_modulation.1": Place(("norm_out.linear",), swapped=True),
        "final_layer.linear": Place(("proj_out",)),
    }
    for i in range(blocks):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        table |= {
            f"{theirs}.x_block.attn.qkv": _of(ours, "attn.to_q", "attn.to_k", "attn.to_v"),
            f"{theirs}.context_block.attn.qkv": _of(
                ours, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
            ),
            f"{theirs}.x_block.attn2.qkv": _of(ours, "attn2.to_q", "attn2.to_k", "attn2.to_v"),
            f"{theirs}.x_block.attn.proj": _of(ours, "attn.to_out.0"),
            f"{theirs}.x_block.attn2.proj": _of(ours, "attn2.to_out.0"),
            f"{theirs}.context_block.attn.proj": _of(ours, "attn.to_add_out"),
            f"{theirs}.x_block.mlp.fc1": _of(ours, "ff.net.0.proj"),
            f"{theirs}.x_block.mlp.fc2": _of(ours, "ff.net.2"),
            f"{theirs}.context_block.mlp.fc1": _of(ours, "ff_context.net.0.proj"),
            f"{theirs}.context_block.mlp.fc2": _of(ours, "ff_context.net.2"),
            f"{theirs}.x_block.adaLN_modulation.1": _of(ours, "norm1.linear"),
            f"{theirs}.context_block.adaLN_modulation.1": Place(
                (f"{ours}.norm1_context.linear",), swapped=i == blocks - 1
            ),
        }
    return table


def _flux(modules: Sequence[str]) -> dict[str, Place]:
    table = {
        "img_in": Place(("x_embedder",)),
        "txt_in": Place(("context_embedder",)),
        "final_layer.linear": Place(("proj_out",)),
        "final_layer.adaLN_modulation.1": Place(("norm_out.linear",), swapped=True),
    }
    for theirs, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        table[f"{theirs}.in_layer"] = Place((f"time_text_embed.{ours}_embedder.linear_1",))
        table[f"{theirs}.out_layer"] = Place((f"time_text_embed.{ours}_embedder.linear_2",))
    for i in range(_count(modules, "transformer_blocks")):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        table |= {
            f"{theirs}.img_attn.qkv": _of(ours, "attn.to_q", "attn.to_k", "attn.to_v"),
            f"{theirs}.txt_attn.qkv": _of(ours, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            f"{theirs}.img_attn.proj": _of(ours, "attn.to_out.0"),
            f"{theirs}.txt_attn.proj": _of(ours, "attn.to_add_out"),
            f"{theirs}.img_mod.lin": _of(ours, "norm1.linear"),
            f"{theirs}.txt_mod.lin": _of(ours, "norm1_context.linear"),
            f"{theirs}.img_mlp.0": _of(ours, "ff.net.0.proj"),
            f"{theirs}.img_mlp.2": _of(ours, "ff.net.2"),
            f"{theirs}.txt_mlp.0": _of(ours, "ff_context.net.0.proj"),
            f"{theirs}.txt_mlp.2": _of(ours, "ff_context.net.2"),
        }
    for i in range(_count(modules, "single_transformer_blocks")):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        table |= {
            f"{theirs}.linear1": _of(ours, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            f"{theirs}.linear2": _of(ours, "proj_out"),
            f"{theirs}.modulation.lin": _of(ours, "norm.linear"),
        }
    return table


def _pixart(modules: Sequence[str]) -> dict[str, Place]:
    table = {
        "x_embedder.proj": Place(("pos_embed.proj",)),
        "y_embedder.y_proj.fc1": Place(("caption_projection.linear_1",)),
        "y_embedder.y_proj.fc2": Place(("caption_projection.linear_2",)),
        "t_block.1": Place(("adaln_single.linear",)),
        "final_layer.linear": Place(("proj_out",)),
    }
    for theirs, ours in (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio")):
        for theirs_at, ours_at in ((0, 1), (2, 2)):
            name = f"adaln_single.emb.{ours}_embedder.linear_{ours_at}"
            table[f"{theirs}_embedder.mlp.{theirs_at}"] = Place((name,))
    for i in range(_count(modules, "transformer_blocks")):
        ours, theirs = f"transformer_blocks.{i}", f"blocks.{i}"
        table |= {
            f"{theirs}.attn.qkv": _of(ours, "attn1.to_q", "attn1.to_k", "attn1.to_v"),
            f"{theirs}.attn.proj": _of(ours, "attn1.to_out.0"),
            f"{theirs}.cross_attn.q_linear": _of(ours, "attn2.to_q"),
            f"{theirs}.cross_attn.kv_linear": _of(ours, "attn2.to_k", "attn2.to_v"),
            f"{theirs}.cross_attn.proj": _of(ours, "attn2.to_out.0"),
            f"{theirs}.mlp.fc1": _of(ours, "ff.net.0.proj"),
            f"{theirs}.mlp.fc2": _of(ours, "ff.net.2"),
        }
    return table


_WAN = (
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^proj_out$", "head.head"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0$", ".o"),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
)
_LTX = ((r"^proj_in$", "patchify_proj"), (r"^time_embed\.", "adaln_single."))


def _renamed(rules: Sequence[tuple[str, str]]) -> Callable[[Sequence[str]], dict[str, Place]]:
    def table(modules: Sequence[str]) -> dict[str, Place]:
        result = {}
        for module in modules:
            name = module
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            result[name] = Place((module,))
        return result

    return table


_TABLES: Mapping[str, Callable[[Sequence[str]], dict[str, Place]]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "WanTransformer3DModel": _renamed(_WAN),
    "LTXVideoTransformer3DModel": _renamed(_LTX),
}


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
    make = _TABLES.get(network_class)
    if make is None:
        return {}
    there = set(modules)
    return {name: place for name, place in make(modules).items() if there.issuperset(place.modules)}


def _of(block: str, *modules: str) -> Place:
    return Place(tuple(f"{block}.{module}" for module in modules))


def _count(modules: Sequence[str], name: str) -> int:
    return 1 + max((int(m.split(".")[1]) for m in modules if m.startswith(f"{name}.")), default=-1)
