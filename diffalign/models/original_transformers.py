"""Names of the modules of transformers in the layout of each model's original code, by diffusers' names:
``joint_blocks`` for SD3, ``double_blocks`` for FLUX, ``self_attn`` for Wan, ``wq`` for Krea 2.

Sources: the key tables of comfy/utils.py (Comfy-Org/ComfyUI at 09708ea; FLUX.2, Z-Image and Krea 2: of 2026)
and the converters of diffusers/loaders (single_file_utils.py, lora_conversion_utils.py, 0.42), read in the
other direction.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


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
    embedded = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    table = _of_flux(modules, "time_text_embed", embedded, ("net.0.proj", "net.2"))
    for i in range(_count(modules, "transformer_blocks")):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        table[f"{theirs}.img_mod.lin"] = _of(ours, "norm1.linear")
        table[f"{theirs}.txt_mod.lin"] = _of(ours, "norm1_context.linear")
    for i in range(_count(modules, "single_transformer_blocks")):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        table |= {
            f"{theirs}.linear1": _of(ours, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            f"{theirs}.linear2": _of(ours, "proj_out"),
            f"{theirs}.modulation.lin": _of(ours, "norm.linear"),
        }
    return table


def _flux2(modules: Sequence[str]) -> dict[str, Place]:
    embedded = {"time_in": "timestep", "guidance_in": "guidance"}
    table = _of_flux(modules, "time_guidance_embed", embedded, ("linear_in", "linear_out"))
    for part in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        table[f"{part}.lin"] = Place((f"{part}.linear",))
    for i in range(_count(modules, "single_transformer_blocks")):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        table[f"{theirs}.linear1"] = _of(ours, "attn.to_qkv_mlp_proj")
        table[f"{theirs}.linear2"] = _of(ours, "attn.to_out")
    return table


def _of_flux(
    modules: Sequence[str], embedder: str, embedded: Mapping[str, str], mlp: tuple[str, str]
) -> dict[str, Place]:
    """Return the part of the table that FLUX and FLUX.2 have in common.

    Args:
        modules: names in diffusers.
        embedder: diffusers' module of times and vectors.
        embedded: diffusers' stem of each of its parts, by the original's name.
        mlp: the two linear layers of a block's ``ff`` in diffusers.
    """
    table = {
        "img_in": Place(("x_embedder",)),
        "txt_in": Place(("context_embedder",)),
        "final_layer.linear": Place(("proj_out",)),
        "final_layer.adaLN_modulation.1": Place(("norm_out.linear",), swapped=True),
    }
    for theirs, ours in embedded.items():
        table[f"{theirs}.in_layer"] = Place((f"{embedder}.{ours}_embedder.linear_1",))
        table[f"{theirs}.out_layer"] = Place((f"{embedder}.{ours}_embedder.linear_2",))
    for i in range(_count(modules, "transformer_blocks")):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        table |= {
            f"{theirs}.img_attn.qkv": _of(ours, "attn.to_q", "attn.to_k", "attn.to_v"),
            f"{theirs}.txt_attn.qkv": _of(ours, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            f"{theirs}.img_attn.proj": _of(ours, "attn.to_out.0"),
            f"{theirs}.txt_attn.proj": _of(ours, "attn.to_add_out"),
            f"{theirs}.img_mlp.0": _of(ours, f"ff.{mlp[0]}"),
            f"{theirs}.img_mlp.2": _of(ours, f"ff.{mlp[1]}"),
            f"{theirs}.txt_mlp.0": _of(ours, f"ff_context.{mlp[0]}"),
            f"{theirs}.txt_mlp.2": _of(ours, f"ff_context.{mlp[1]}"),
        }
    return table


def _z_image(modules: Sequence[str]) -> dict[str, Place]:
    table = {}
    for module in modules:
        block, _, part = module.rpartition(".attention.")
        if part == "to_q":
            table[f"{block}.attention.qkv"] = _of(block, "attention.to_q", "attention.to_k", "attention.to_v")
        elif part not in ("to_k", "to_v"):
            name = re.sub(r"^all_(x_embedder|final_layer)\.2-1", r"\1", module)
            table[name.replace("attention.to_out.0", "attention.out")] = Place((module,))
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
_KREA2 = (
    (r"^img_in$", "first"),
    (r"^final_layer\.", "last."),
    (r"^time_embed\.linear_1$", "tmlp.0"),
    (r"^time_embed\.linear_2$", "tmlp.2"),
    (r"^time_mod_proj$", "tproj.1"),
    (r"^txt_in\.linear_1$", "txtmlp.1"),
    (r"^txt_in\.linear_2$", "txtmlp.3"),
    (r"^text_fusion\.", "txtfusion."),
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn\.to_([qkv])$", r".attn.w\1"),
    (r"\.attn\.to_out\.0$", ".attn.wo"),
    (r"\.attn\.to_gate$", ".attn.gate"),
    (r"\.ff\.(gate|up|down)$", r".mlp.\1"),
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


TABLES: Mapping[str, Callable[[Sequence[str]], dict[str, Place]]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "ZImageTransformer2DModel": _z_image,
    "QwenImageTransformer2DModel": _renamed(()),
    "Kandinsky5Transformer3DModel": _renamed(()),
    "Krea2Transformer2DModel": _renamed(_KREA2),
    "PixArtTransformer2DModel": _pixart,
    "WanTransformer3DModel": _renamed(_WAN),
    "LTXVideoTransformer3DModel": _renamed(_LTX),
}
"""By diffusers' class name, the table of a network's modules: original name, place."""


def _of(block: str, *modules: str) -> Place:
    return Place(tuple(f"{block}.{module}" for module in modules))


def _count(modules: Sequence[str], name: str) -> int:
    return 1 + max((int(m.split(".")[1]) for m in modules if m.startswith(f"{name}.")), default=-1)
