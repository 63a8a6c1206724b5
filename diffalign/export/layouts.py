"""LoRA files for other programs: diffusers, kohya (A1111, Forge, ComfyUI), ComfyUI's flow models.

Where each reader finds the strength of a module:

| reader | strength of a module |
|---|---|
| diffusers | kohya's alpha tensors; else ``lora_adapter_metadata`` (0.34 and later); else 1 |
| ComfyUI | ``alpha / rank`` of the module's alpha tensor; else 1 |
| A1111, Forge, kohya's scripts | ``alpha / rank`` of the module's alpha tensor; else 1 |
| peft | ``adapter_config.json`` |

So kohya's and ComfyUI's files carry an alpha tensor for each module, and diffusers' files have the scale
folded into the second factor with alpha = rank: every reader then applies the trained strength. rsLoRA's
``alpha / sqrt(rank)`` becomes an alpha of ``alpha sqrt(rank)``, which is exact. DoRA: see ``refuse_dora``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.export.combine import has_dora, uniform
from diffalign.models.experts import FIRST
from diffalign.models.families.registry import FAMILIES, laid_out_as
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora_base import base_metadata
from diffalign.models.lora_formats import Lora, diffusers_state
from diffalign.models.lora_names import file_text_name, modules_of
from diffalign.models.original_layout import original_modules


def kohya_state(lora: Lora, model: LoadedModel) -> dict[str, Tensor]:
    """Return a LoRA in kohya's layout: ``lora_unet_*`` and ``lora_te*``, an alpha per module.

    Blocks are named as kohya's scripts name them: by diffusers' names for Stable Diffusion 1.x, by
    Stability's (``input_blocks``) for SDXL. A1111, Forge, ComfyUI and diffusers read both.

    Raises:
        UserError: an unsupported family, DoRA, or a module without a name in the layout.
    """
    family = model.family.name
    if FAMILIES[family].files.layout != "kohya":
        allowed = ", ".join(laid_out_as("kohya"))
        raise UserError(f"--to kohya with a model of {family}; allowed for: {allowed}; {_others(family)}")
    refuse_dora(lora, "kohya")
    names = _unet_stems(model)
    result = {}
    for component, modules in uniform(lora).items():
        for module, factors in modules.items():
            stem = (
                names.get(module)
                if component == model.family.network_name
                else _text_stem(model, component, module)
            )
            if stem is None:
                raise UserError(
                    f"--to kohya: {component}.{module} has no name there; allowed: --to diffusers or merged"
                )
            result[f"{stem}.lora_down.weight"] = factors.down.contiguous()
            result[f"{stem}.lora_up.weight"] = factors.up.contiguous()
            result[f"{stem}.alpha"] = torch.tensor(factors.scale * factors.rank, dtype=torch.float32)
    return result


def comfyui_state(lora: Lora, model: LoadedModel) -> dict[str, Tensor]:
    """Return a LoRA with ComfyUI's names of a flow model's modules, alpha included.

    ComfyUI maps diffusers' names (``transformer.*``) for SD3, FLUX, Chroma, FLUX.2, Z-Image, Qwen-Image,
    Kandinsky 5 and PixArt, and the original names (``diffusion_model.*``) for Wan, LTX and Krea 2; Stable
    Diffusion models get kohya's layout.

    Raises:
        UserError: an unsupported family, DoRA, or a module without a name.
    """
    family = model.family.name
    files = FAMILIES[family].files
    if files.layout == "kohya":
        return kohya_state(lora, model)
    if files.layout != "comfyui":
        allowed = ", ".join([*laid_out_as("kohya"), *laid_out_as("comfyui")])
        raise UserError(f"--to comfyui with a model of {family}; allowed for: {allowed}; {_others(family)}")
    refuse_dora(lora, "comfyui")
    known = {module: original for original, place in _table(model).items() for module in place.modules}
    result = {}
    for component, modules in uniform(lora).items():
        for module, factors in modules.items():
            if component not in (model.family.network_name, FIRST) or module not in known:
                raise UserError(
                    f"--to comfyui: ComfyUI has no name for {component}.{module}; allowed: --to diffusers or "
                    "merged"
                )
            stem = f"diffusion_model.{known[module]}" if files.original_names else f"transformer.{module}"
            result[f"{stem}.lora_A.weight"] = factors.down.contiguous()
            result[f"{stem}.lora_B.weight"] = factors.up.contiguous()
            result[f"{stem}.alpha"] = torch.tensor(factors.scale * factors.rank, dtype=torch.float32)
    return result


def refuse_dora(lora: Lora, layout: str) -> None:
    """Refuse DoRA, which readers of these layouts interpret differently.

    diffusers drops ``dora_scale`` of a kohya file with a warning, and the norm that ComfyUI, A1111 and
    LyCORIS divide by has changed between versions, so no file has the same effect everywhere.

    Raises:
        UserError: the LoRA is a DoRA.
    """
    if has_dora(lora):
        raise UserError(
            f"--to {layout} of a DoRA: readers of that layout drop its magnitudes or apply them each in "
            "another way; allowed: --to diffusers, merged or single-file, which are exact, or --rank N, "
            "which extracts the nearest plain LoRA"
        )


def train_layout(lora: Lora, model: LoadedModel) -> str:
    """Return the layout that ``train`` writes, in which no reader can apply another strength.

    At scale 1 (alpha = rank) it is diffusers', which needs no alpha: any reader's default is right. Another
    scale goes into kohya's alpha tensors where the family has that layout and diffusers reads all of it back;
    else it is folded in.
    """
    every = [factors for modules in lora.values() for factors in modules.values()]
    kohya = FAMILIES[model.family.name].files.layout == "kohya"
    if not kohya or has_dora(lora) or all(abs(f.scale - 1) < 1e-6 for f in every):
        return "diffusers"
    try:
        state = kohya_state(lora, model)
    except UserError:
        return "diffusers"
    return "kohya" if not dropped_by_diffusers(state, lora, model) else "diffusers"


def dropped_by_diffusers(state: Mapping[str, Tensor], lora: Lora, model: LoadedModel) -> list[str]:
    """Return the modules of a LoRA that diffusers' converter drops or changes."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    pipeline, network = model.pipeline, model.family.network_name
    converted: Any = type(pipeline).lora_state_dict(dict(state), unet_config=model.network.config)[0]
    found = set()
    for component in lora:
        own = {
            k.removeprefix(f"{component}."): v for k, v in converted.items() if k.startswith(f"{component}.")
        }
        if component == network:
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        found |= {(component, key.rpartition(".lora_B.")[0]) for key in own if ".lora_B." in key}
    wanted = {
        (component, module if component == network else file_text_name(module))
        for component, modules in lora.items()
        for module in modules
    }
    return sorted(".".join(pair) for pair in wanted ^ found)


def lora_metadata(lora: Lora, model: LoadedModel, title: str) -> dict[str, str]:
    """Return the header of a kohya or ComfyUI file: that of its base, and ``ss_*`` of its adapter as kohya's
    scripts write them (kohya-ss/sd-scripts train_network.py).
    """
    first = next(iter(next(iter(uniform(lora).values())).values()))
    return {
        **base_metadata(model, title),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": str(first.scale * first.rank),
        "ss_output_name": title,
    }


def to_diffusers(lora: Lora) -> dict[str, Tensor]:
    """Return a LoRA in diffusers' layout, with one rank and every scale folded in."""
    return diffusers_state(uniform(lora))


def _table(model: LoadedModel) -> Mapping[str, Any]:
    layers = model.network_config.get("layers_per_block", 0)
    modules = list(modules_of(model.network))
    return original_modules(model.family.network_class, modules, layers if isinstance(layers, int) else 0)


def _unet_stems(model: LoadedModel) -> dict[str, str]:
    """Return kohya's stem of each module; for Stable Diffusion 1.x by diffusers' names, as kohya's scripts
    do."""
    stems = {}
    original_names = FAMILIES[model.family.name].files.original_names
    for original, place in _table(model).items():
        ours = place.modules[0]
        plain = not original_names and not ours.startswith("add_embedding")
        stems[ours] = "lora_unet_" + (ours if plain else original).replace(".", "_")
    return stems


def _text_stem(model: LoadedModel, component: str, module: str) -> str | None:
    if component not in model.text_encoders:
        return None
    number = model.text_encoders.index(component) + 1
    prefix = "lora_te" if len(model.text_encoders) == 1 else f"lora_te{number}"
    return f"{prefix}_{file_text_name(module)}".replace(".", "_")


def _others(family: str) -> str:
    return (
        "this one: --to comfyui, diffusers or merged"
        if FAMILIES[family].files.layout == "comfyui"
        else "this one: --to diffusers or merged"
    )
