"""``aligned/``: the folder that plain diffusers loads, without diffalign.

LoRA: ``pipeline.load_lora_weights(folder)``. The file is in diffusers' layout at scale 1; a Stable Diffusion
    1.x or XL trained at another scale has kohya's layout, with alphas (``layouts.train_layout``). ``diffalign
    export`` writes what ComfyUI, A1111, Forge and kohya's scripts load. For a network without a LoRA loader
    in diffusers (PixArt's) the LoRA is in peft's format:
    ``PeftModel.from_pretrained(pipeline.transformer, folder)``.
Full fine-tuning: ``DiffusionPipeline.from_pretrained(folder)``, the network in float32 and the rest as it was
    loaded.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.export.adapters import put_on, write_trained
from diffalign.export.combine import is_idle
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.lora import ADAPTER
from diffalign.models.lora_formats import Lora, read_lora
from diffalign.models.lora_merge import merge_into
from diffalign.models.sources import LORA_FILES, holds_lora, is_lora
from diffalign.models.starting import is_checkpoint, read_checkpoint
from diffalign.utils.files import atomic_folder
from diffalign.utils.notices import main_logger

logger = main_logger(__name__)


def save_aligned(model: LoadedModel, folder: str | Path, card_text: str) -> None:
    """Write the trained network as adapters, or as a whole pipeline where all of it was trained.

    Args:
        card_text: the README.md (``diffalign.export.card``).

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_folder(Path(folder)) as temporary:
        if is_adapted(model):
            write_trained(model, temporary, Path(folder).name)
        else:
            model.pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(card_text, encoding="utf-8")


def load_aligned(base: ModelConfig, folder: str | Path, device: str = "cpu") -> Any:
    """Return the pipeline of ``open_aligned``."""
    return open_aligned(base, folder, device).pipeline


def open_aligned(base: ModelConfig, folder: str | Path, device: str = "cpu") -> LoadedModel:
    """Return the model of an ``aligned/`` folder: its own, or ``base`` with the folder's LoRA on it.

    Raises:
        UserError: the folder holds neither, or the LoRA does not fit the base.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        whole = replace(base, path=str(folder), family="auto", revision=None, variant=None)
        return load(replace(whole, vae=None, motion_adapter=None), device)
    if not is_lora(folder):
        raise UserError(
            f"{folder}: neither {LORA_FILES[0]} nor model_index.json in it; allowed: the aligned/ folder of "
            "a run"
        )
    model = load(base, device)
    attach(model, folder)
    return model


def attach(model: LoadedModel, lora: Path) -> str:
    """Attach a LoRA to the model, from a file or a folder, in any layout that ``lora_formats`` reads.

    Returns:
        A line on the recognised layout.

    Raises:
        UserError: there is no LoRA, or it is of another network.
    """
    factors, words = read_lora_of(lora, model)
    put_on(model, factors, str(lora))
    return words


def read_lora_of(lora: Path, model: LoadedModel) -> tuple[Lora, str]:
    """Return ``read_lora``'s result, for a LoRA that must change the model's network.

    Args:
        lora: a LoRA's file or folder, or a checkpoint of a run.

    Raises:
        UserError: there is no LoRA, or it has no weights for the network.
    """
    if is_checkpoint(lora):
        factors, words = read_checkpoint(model, lora)
        return _checked(factors, lora, model), words
    if lora.is_dir() and not holds_lora(lora) and not list(lora.glob("*.safetensors")):
        raise UserError(f"{lora}: no {LORA_FILES[0]} in it; allowed: the aligned/ folder of a LoRA run")
    factors, words = read_lora(lora, model)
    return _checked(factors, lora, model), words


def _checked(factors: Lora, lora: Path, model: LoadedModel) -> Lora:
    """Return a LoRA that changes the network; UserError for one that has nothing for it."""
    if not any(factors.get(name) for name in model.networks):
        raise UserError(f"{lora}: its LoRA has nothing for the {model.family.network_name} of {model.source}")
    if is_idle(factors):
        logger.warning("the LoRA %s changes no weight: all its factors are 0", lora)
    return factors


def absent_components(model: LoadedModel) -> tuple[str, ...]:
    """Return the components that the pipeline lacks though its class has them, such as SD3's T5.

    Plain diffusers takes them as None: ``from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)``.
    """
    optional = model.pipeline._optional_components
    return tuple(
        sorted(k for k, part in model.pipeline.components.items() if part is None and k not in optional)
    )


def is_adapted(model: LoadedModel) -> bool:
    """Whether the network carries LoRA adapters."""
    return ADAPTER in getattr(model.network, "peft_config", {})


def save_merged(
    base: ModelConfig, lora: str | Path, folder: str | Path, card_text: str, strength: float = 1.0
) -> None:
    """Write a whole pipeline with a LoRA folded into its weights.

    Args:
        base: the model that the LoRA was trained on; its dtype is that of the result.
        lora: a LoRA's file or folder.
        strength: factor of its change.

    Raises:
        UserError: nothing to merge, the LoRA does not fit the base, or the folder cannot be written.
    """
    model = load(base)
    factors, _ = read_lora_of(Path(lora), model)
    merge_into(model, [(factors, strength)])
    with atomic_folder(Path(folder)) as temporary:
        model.pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(card_text, encoding="utf-8")
