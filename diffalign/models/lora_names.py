"""Names that LoRA files give to the modules of a model.

Sources: comfy/lora.py (Comfy-Org/ComfyUI at 17358c8), diffusers/loaders/lora_conversion_utils.py (0.42).
"""

from torch import nn

from diffalign.models.loaded import LoadedModel
from diffalign.models.original_layout import original_modules
from diffalign.models.original_transformers import Place


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolutional modules by name, without the wrappers of adapters."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(part, kinds) and "lora_" not in name:
            plain[name.replace(".base_layer", "")] = part
    return plain


def stems_of(model: LoadedModel) -> dict[str, tuple[str, Place, str]]:
    """Return every name that a LoRA file may give a module of the model: component, modules and layout."""
    stems: dict[str, tuple[str, Place, str]] = {}
    name = model.family.network_name
    modules = list(modules_of(model.network))
    layers = model.network_config.get("layers_per_block", 0)
    table = original_modules(model.family.network_class, modules, layers if isinstance(layers, int) else 0)
    for original, place in table.items():
        for prefix in ("diffusion_model.", "model.diffusion_model.", ""):
            stems[prefix + original] = (name, place, "ComfyUI")
        stems["lora_unet_" + original.replace(".", "_")] = (name, place, "kohya")
    for module in modules:
        place, flat = Place((module,)), module.replace(".", "_")
        old = module.replace(".to_", ".processor.to_").removesuffix(
            ".0" if module.endswith("to_out.0") else "\n"
        )
        for prefix in ("", f"{name}.", "unet.", "transformer."):
            stems[prefix + old] = stems[prefix + module] = (name, place, "diffusers")
        for prefix in ("base_model.model.", f"{name}.base_model.model."):
            stems[prefix + module] = (name, place, "peft")
        stems[f"diffusion_model.{module}"] = (name, place, "ComfyUI")
        stems[f"lora_unet_{flat}"] = (name, place, "kohya")
        stems[f"lora_transformer_{flat}"] = (name, place, "OneTrainer")
        stems[f"lycoris_{flat}"] = (name, place, "SimpleTuner")
    for number, component in enumerate(model.text_encoders, 1):
        for module in modules_of(getattr(model.pipeline, component)):
            place, long = Place((module,)), file_text_name(module)
            for spelt in {module, long}:
                stems[f"{component}.{spelt}"] = (component, place, "diffusers")
                stems[f"lora_te{number}_" + spelt.replace(".", "_")] = (component, place, "kohya")
                if number == 1:
                    stems["lora_te_" + spelt.replace(".", "_")] = (component, place, "kohya")
            old = long
            for part in ("q", "k", "v", "out"):
                old = old.replace(f"self_attn.{part}_proj", f"self_attn.to_{part}")
            stems[f"{component}.{old}"] = (component, place, "diffusers")
    return stems


def file_text_name(module: str) -> str:
    """Return a CLIP module's name as files spell it: with ``text_model``, which transformers 5 dropped."""
    bare = module.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{module}" if bare else module
