"""Independent readers of exported LoRAs, written from the key tables that the programs publish.

kohya: kohya-ss/sd-scripts names a module ``lora_unet_`` or ``lora_te[12]_`` plus its path with underscores;
SD1.5's paths are diffusers', SDXL's Stability's. ComfyUI (comfy/lora.py, comfy/utils.py at 09708ea; FLUX.2,
Z-Image, Kandinsky 5 and Krea 2: of 2026): ``transformer.`` plus diffusers' path for SD3, FLUX, FLUX.2,
Chroma, Z-Image, Qwen-Image, Kandinsky 5 and PixArt, ``diffusion_model.`` plus the original path for Wan,
LTX and Krea 2. A key that no table knows is one that the program would drop: an error here.
"""

import re
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_krea2_transformer_checkpoint_to_diffusers,
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
FLUX2_BLOCK = (
    *SD3_BLOCK[:8],
    "ff.linear_in",
    "ff.linear_out",
    "ff_context.linear_in",
    "ff_context.linear_out",
)
FLUX2_SINGLE = ("attn.to_qkv_mlp_proj", "attn.to_out")
FLUX_ENDS = ("proj_out", "x_embedder", "context_embedder", "norm_out.linear")
CHROMA_BLOCK, CHROMA_SINGLE = FLUX_BLOCK[:-2], FLUX_SINGLE[:-1]
Z_IMAGE_BLOCK = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "adaLN_modulation.0",
)
Z_IMAGE_ENDS = ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")
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
    if family in ("wan", "ltx", "krea2"):
        convert = {
            "krea2": convert_krea2_transformer_checkpoint_to_diffusers,
            "wan": convert_wan_transformer_to_diffusers,
            "ltx": convert_ltx_transformer_checkpoint_to_diffusers,
        }[family]
        for stem in {
            key.rsplit(f".{suffix}", 1)[0] for key in state for suffix in SUFFIXES if key.endswith(suffix)
        }:
            assert stem.startswith("diffusion_model.")
            (name,) = convert({stem.removeprefix("diffusion_model.") + ".weight": torch.zeros(1)})
            name = name.removeprefix("transformer.")
            stems[stem] = modules[name.removesuffix(".weight")]
    else:
        double, single = "transformer_blocks", "single_transformer_blocks"
        flux2 = [(double, FLUX2_BLOCK), (single, FLUX2_SINGLE)]
        blocks = {
            "sd3": [(double, SD3_BLOCK)],
            "flux": [(double, FLUX_BLOCK), (single, FLUX_SINGLE)],
            "flux2": flux2,
            "flux2_klein": flux2,
            "chroma": [(double, CHROMA_BLOCK), (single, CHROMA_SINGLE)],
            "pixart": [(double, PIXART_BLOCK)],
            "z_image": [(block, Z_IMAGE_BLOCK) for block in ("layers", "noise_refiner", "context_refiner")],
            "qwen_image": [(double, (r".+",))],  # its modules have diffusers' own names there
            "kandinsky5": [(f"{kind}_transformer_blocks", (r".+",)) for kind in ("text", "visual")],
        }[family]
        ends = {  # single names beside the blocks
            "flux": FLUX_ENDS, "flux2": FLUX_ENDS, "flux2_klein": FLUX_ENDS, "chroma": FLUX_ENDS[:-1],
            "z_image": Z_IMAGE_ENDS, "qwen_image": ("proj_out", "img_in", "txt_in", "norm_out.linear"),
        }.get(family, ())  # fmt: skip
        for name, module in modules.items():
            known = [
                rf"{block}\.\d+\.({'|'.join(p if p == '.+' else re.escape(p) for p in parts)})"
                for block, parts in blocks
            ]
            if name in ends or any(re.fullmatch(pattern, name) for pattern in known):
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
