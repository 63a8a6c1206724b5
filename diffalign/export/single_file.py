"""Stable Diffusion 1.x and XL as one .safetensors file in the original layout.

ComfyUI, A1111, Forge and ``from_single_file`` of diffusers load it. A model of v-prediction is marked by an
empty tensor ``v_pred`` (and ``ztsnr`` where its schedule ends at zero signal), which those programs look for,
and by ``modelspec.prediction_type``. The tensors are written one after the other: no second copy is held.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.paths import EDM
from diffalign.errors import UserError
from diffalign.export.streaming import Entry, write_safetensors
from diffalign.models.families.registry import FAMILIES
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora_base import prediction_metadata
from diffalign.models.lora_names import file_text_name
from diffalign.models.original_layout import is_vae_projection, unet_names, vae_names

Named = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def write_single_file(model: LoadedModel, path: Path, dtype: torch.dtype, title: str) -> int:
    """Write the whole model (see the module) and return its size in bytes.

    Raises:
        UserError: an unsupported family.
    """
    files = FAMILIES[model.family.name].files
    if not files.implementation:
        allowed = ", ".join(name for name, card in FAMILIES.items() if card.files.implementation)
        raise UserError(
            f"--to single-file with a model of {model.family.name}; allowed for: {allowed}; this one: --to "
            "merged"
        )
    if isinstance(model.path, EDM):
        raise UserError(
            "--to single-file with EDM's preconditioning, for which that layout has no marker; allowed: "
            "--to merged"
        )
    named = [*_unet(model), *_vae(model), *_text(model)]
    entries = [Entry(name, shape, dtype, make) for name, shape, make in named]
    entries += [Entry(name, (0,), torch.float32, lambda: torch.zeros(0)) for name in markers(model)]
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": files.architecture,
        "modelspec.implementation": files.implementation,
        "modelspec.title": title,
        **prediction_metadata(model),
    }
    return write_safetensors(path, entries, metadata)


def unheld_scale(model: LoadedModel) -> str:
    """Return what the layout has no place for, and readers take from the family: another scale of latents;
    "" where it is the family's.
    """
    scale, usual = (c["scaling_factor"] for c in (model.pipeline.vae.config, model.family.configs["vae"]))
    if scale == usual:
        return ""
    return (
        f"the VAE's scaling_factor is {scale:g}, which a single file has no place for: programs that load it "
        f"take {usual:g}, and their images are wrong; --to merged keeps it"
    )


def markers(model: LoadedModel) -> list[str]:
    """Return the names of the empty tensors that tell readers about v-prediction and zero terminal SNR."""
    config = model.pipeline.scheduler.config
    if config.get("prediction_type") != "v_prediction":
        return []
    return ["v_pred", *(["ztsnr"] if config.get("rescale_betas_zero_snr") else [])]


def _plain(name: str, tensor: Tensor) -> Named:
    return name, tuple(tensor.shape), lambda: tensor


def _unet(model: LoadedModel) -> list[Named]:
    state = model.network.state_dict()
    names = unet_names(state, model.network_config["layers_per_block"])
    return [_plain(f"model.diffusion_model.{names[name]}", tensor) for name, tensor in state.items()]


def _vae(model: LoadedModel) -> list[Named]:
    state = model.pipeline.vae.state_dict()
    names = vae_names(state, len(model.pipeline.vae.config.block_out_channels))
    named = []
    for name, tensor in state.items():
        original = names[name]
        shaped = tensor[:, :, None, None] if is_vae_projection(original) else tensor
        named.append(_plain(f"first_stage_model.{original}", shaped))
    return named


def _text(model: LoadedModel) -> list[Named]:
    single = len(model.text_encoders) == 1
    first = "cond_stage_model.transformer." if single else "conditioner.embedders.0.transformer."
    state = model.pipeline.text_encoder.state_dict()
    named = [_plain(first + file_text_name(name), tensor) for name, tensor in state.items()]
    return named if single else named + _open_clip(model.pipeline.text_encoder_2.state_dict())


_OPEN_CLIP = (
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("self_attn.out_proj.", "attn.out_proj."),
)
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def _open_clip(state: dict[str, Any]) -> list[Named]:
    """Return SDXL's second encoder in OpenCLIP's layout: q, k and v in one matrix, the projection
    transposed."""
    prefix = "conditioner.embedders.1.model."
    named: list[Named] = []
    for full, tensor in state.items():
        name = full.removeprefix("text_model.")
        if name == "text_projection.weight":
            named.append(_plain(f"{prefix}text_projection", tensor.T))
        elif name in _OPEN_CLIP_ENDS:
            named.append(_plain(prefix + _OPEN_CLIP_ENDS[name], tensor))
        elif name.startswith("encoder.layers."):
            _, _, number, rest = name.split(".", 3)
            block = f"{prefix}transformer.resblocks.{number}."
            if rest.startswith("self_attn.q_proj."):
                kind = rest.rpartition(".")[2]
                parts = [state[full.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                shape = (sum(part.shape[0] for part in parts), *tensor.shape[1:])
                named.append((f"{block}attn.in_proj_{kind}", shape, partial(torch.cat, parts)))
            elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
                old, new = next(pair for pair in _OPEN_CLIP if rest.startswith(pair[0]))
                named.append(_plain(block + new + rest.removeprefix(old), tensor))
        else:
            raise UserError(
                f"--to single-file: the second text encoder's {full} has no place in OpenCLIP's layout"
            )
    return named
