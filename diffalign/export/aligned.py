"""``aligned/``: what plain diffusers loads, in a process that has never heard of diffalign.

LoRA: ``pipeline.load_lora_weights(folder)``; rank, alpha, rsLoRA and DoRA travel in the file's metadata. A
    network that diffusers has no LoRA loader for (PixArt's) has its LoRA as peft keeps it:
    ``PeftModel.from_pretrained(pipeline.transformer, folder)``. Full fine-tuning:
    ``DiffusionPipeline.from_pretrained(folder)``, the network in float32 and the rest as it was loaded.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import ADAPTER, has_lora_loader
from diffalign.models.precision import only_errors
from diffalign.models.sources import LORA_FILES, holds_lora, user_errors
from diffalign.utils.files import whole_folder


def save_aligned(model: LoadedModel, folder: str | Path, card_text: str) -> None:
    """Write the trained network as adapters, or as a whole pipeline where all of it was trained.

    Args:
        card_text: the README.md (``diffalign.export.card``).

    Raises:
        UserError: the folder cannot be written.
    """
    with whole_folder(Path(folder)) as temporary:
        if is_adapted(model):
            _save_lora(model, temporary)
        else:
            model.pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(card_text, encoding="utf-8")


def load_aligned(base: ModelConfig, folder: str | Path, device: str = "cpu") -> Any:
    """The pipeline of ``open_aligned``."""
    return open_aligned(base, folder, device).pipeline


def open_aligned(base: ModelConfig, folder: str | Path, device: str = "cpu") -> LoadedModel:
    """The model of an ``aligned/`` folder: its own, or ``base`` with the folder's LoRA on it.

    Raises:
        UserError: the folder holds neither, or the LoRA does not fit the base.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        whole = replace(base, path=str(folder), family="auto", revision=None, variant=None)
        return load(replace(whole, vae=None, motion_adapter=None), device)
    if not holds_lora(folder):
        raise UserError(
            f"{folder}: neither {LORA_FILES[0]} nor model_index.json in it; allowed: the aligned/ folder of "
            "a run"
        )
    model = load(base, device)
    attach(model, folder)
    return model


def attach(model: LoadedModel, lora: Path) -> None:
    """Put the LoRA of a folder on the model's network.

    Raises:
        UserError: no LoRA there, or one of another network: diffusers itself would load nothing of it and say
            little.
    """
    if not holds_lora(lora):
        raise UserError(f"{lora}: no {LORA_FILES[0]} in it; allowed: the aligned/ folder of a LoRA run")
    if not has_lora_loader(model.family.network_class):
        _on_plain_network(model, lora)
        return
    # diffusers warns of each text encoder that a LoRA leaves alone, which is what this LoRA is meant to do
    with user_errors("LoRA", str(lora)), only_errors("diffusers"):
        model.pipeline.load_lora_weights(str(lora))
    if not model.pipeline.get_list_adapters().get(model.family.network_name):
        raise UserError(f"{lora}: its LoRA has nothing for the {model.family.network_name} of {model.source}")


def _on_plain_network(model: LoadedModel, lora: Path) -> Any:
    """The network in peft's wrapper; the network itself has the adapters."""
    from peft import PeftModel

    if not (lora / "adapter_config.json").is_file():
        raise UserError(
            f"{lora}: no adapter_config.json in it, by which a LoRA of the {model.family.network_name} of "
            f"{model.source} is loaded; allowed: the aligned/ folder of a LoRA run of this model"
        )
    with user_errors("LoRA", str(lora)):
        return PeftModel.from_pretrained(model.network, str(lora))


def absent_components(model: LoadedModel) -> tuple[str, ...]:
    """What the pipeline is without though its class wants it, such as SD3's T5: plain diffusers must be told,
    ``from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)``.
    """
    optional = model.pipeline._optional_components
    return tuple(
        sorted(k for k, part in model.pipeline.components.items() if part is None and k not in optional)
    )


def is_adapted(model: LoadedModel) -> bool:
    """Whether the network carries LoRA adapters."""
    return ADAPTER in getattr(model.network, "peft_config", {})


def save_merged(base: ModelConfig, lora: str | Path, folder: str | Path, card_text: str) -> None:
    """Write a whole pipeline with a LoRA folded into its weights.

    Args:
        base: the model that the LoRA was trained on; its dtype is that of the result.
        lora: folder with ``pytorch_lora_weights.safetensors``, as ``save_aligned`` writes it.

    Raises:
        UserError: nothing to merge, the LoRA does not fit the base, or the folder cannot be written.
    """
    model = load(base)
    name = model.family.network_name
    if has_lora_loader(model.family.network_class):
        attach(model, Path(lora))
        model.pipeline.fuse_lora(components=[name])
        model.pipeline.unload_lora_weights()
    else:
        setattr(model.pipeline, name, _on_plain_network(model, Path(lora)).merge_and_unload())
    with whole_folder(Path(folder)) as temporary:
        model.pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(card_text, encoding="utf-8")


def _save_lora(model: LoadedModel, folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    network: Any = model.network
    if not has_lora_loader(model.family.network_class):
        _save_as_peft(network, folder)
        return
    values = network.peft_config[ADAPTER].to_dict()
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    name = model.family.network_name
    model.pipeline.save_lora_weights(
        folder,
        **{
            f"{name}_lora_layers": get_peft_model_state_dict(network, adapter_name=ADAPTER),
            f"{name}_lora_adapter_metadata": metadata,
        },
    )


def _save_as_peft(network: Any, folder: Path) -> None:
    """The two files that ``PeftModel.from_pretrained`` reads, its names of the tensors included."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / LORA_FILES[1], metadata={"format": "pt"})
    config = copy.deepcopy(network.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))
