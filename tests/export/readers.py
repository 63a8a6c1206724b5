"""Independent readers of exported LoRAs, written from the key tables that the programs publish.

kohya: kohya-ss/sd-scripts names a module ``lora_unet_`` or ``lora_te[12]_`` plus its path with underscores;
SD1.5's paths are diffusers', SDXL's Stability's. ComfyUI (comfy/lora.py, comfy/utils.py at 09708ea):
``transformer.`` plus diffusers' path for SD3, FLUX and PixArt, ``diffusion_model.`` plus the original path
for Wan and LTX. A key that no table knows is one that the program would drop: an error here.
"""

import re
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from torch import Tensor

from tests.models import ldm

SUFFIXES = ("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha")
TEXT_MODULES = r"(self_attn)_(q_proj|k_proj|v_proj|out_proj)|(mlp)_(fc1|fc2)"

SD3_BLOCK = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_out.0",
    "attn.to_add_out",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "norm1.linear",
    "norm1_context.linear",
)
FLUX_BLOCK = SD3_BLOCK[:8] + SD3_BLOCK[12:]
FLUX_SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear")
PIXART_BLOCK = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)


def merge_kohya(state: dict[str, Tensor], pipeline: Any) -> None:
    """Add a kohya file to a pipeline's weights, as A1111, ComfyUI and kohya's scripts do."""
    sdxl = hasattr(pipeline, "text_encoder_2")
    stems: dict[str, Any] = {}
    for name, module in pipeline.unet.named_modules():
        if not hasattr(module, "weight") or module.weight is None:
            continue
        fixed = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
        original = fixed.get(name) or ldm.unet_name(f"{name}.weight", 1).removesuffix(".weight")
        stems["lora_unet_" + (original if sdxl else name).replace(".", "_")] = module
    for number, encoder in enumerate(["text_encoder", "text_encoder_2"][: 1 + sdxl], 1):
        prefix = f"lora_te{number}" if sdxl else "lora_te"
        for name, module in getattr(pipeline, encoder).named_modules():
            path = re.fullmatch(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(\w+)\.(\w+)", name)
            if path and re.fullmatch(TEXT_MODULES, f"{path[2]}_{path[3]}"):
                stems[f"{prefix}_text_model_encoder_layers_{path[1]}_{path[2]}_{path[3]}"] = module
    merge(state, stems)


def merge_comfyui(state: dict[str, Tensor], network: Any, family: str) -> None:
    """Add a ComfyUI file to a flow model's weights."""
    stems: dict[str, Any] = {}
    modules = {name: m for name, m in network.named_modules() if getattr(m, "weight", None) is not None}
    if family in ("wan", "ltx"):
        convert = {
            "wan": convert_wan_transformer_to_diffusers,
            "ltx": convert_ltx_transformer_checkpoint_to_diffusers,
        }[family]
        for stem in {
            key.rsplit(f".{suffix}", 1)[0] for key in state for suffix in SUFFIXES if key.endswith(suffix)
        }:
            assert stem.startswith("diffusion_model.")
            (name,) = convert({stem.removeprefix("diffusion_model.") + ".weight": torch.zeros(1)})
            stems[stem] = modules[name.removesuffix(".weight")]
    else:
        blocks = {
            "sd3": [("transformer_blocks", SD3_BLOCK)],
            "flux": [("transformer_blocks", FLUX_BLOCK), ("single_transformer_blocks", FLUX_SINGLE)],
            "pixart": [("transformer_blocks", PIXART_BLOCK)],
        }[family]
        for name, module in modules.items():
            for block, parts in blocks:
                ends = (
                    "proj_out",
                    "x_embedder",
                    "context_embedder",
                )  # a map of single names beside the blocks
                if name in ends and family == "flux":
                    stems[f"transformer.{name}"] = module
                if re.fullmatch(rf"{block}\.\d+\.({'|'.join(map(re.escape, parts))})", name):
                    stems[f"transformer.{name}"] = module
    merge(state, stems)


@torch.no_grad()
def merge(state: dict[str, Tensor], stems: dict[str, Any]) -> None:
    """W += alpha / rank * up @ down for each stem; every key must be used."""
    left = set(state)
    for stem, module in stems.items():
        names = [n for n in ("lora_down", "lora_A") if f"{stem}.{n}.weight" in state]
        if not names:
            continue
        down_key = f"{stem}.{names[0]}.weight"
        up_key = down_key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
        down, up = state[down_key], state[up_key]
        alpha = state[f"{stem}.alpha"].item() if f"{stem}.alpha" in state else down.shape[0]
        product = (up.flatten(1) @ down.flatten(1)) * (alpha / down.shape[0])
        module.weight += product.reshape(module.weight.shape)
        left -= {down_key, up_key, f"{stem}.alpha"}
    assert not left, f"keys that the program would drop: {sorted(left)[:3]} of {len(left)}"
