"""Checks of a checkpoint and of the pipeline that was loaded from it."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError
from diffalign.models.families.base import Family
from diffalign.utils.notices import main_logger

logger = main_logger(__name__)


def check_variant(config: ModelConfig, folder: Path) -> None:
    """UserError for a variant that a folder does not have, where diffusers would load other weights."""
    names = [f.name for f in folder.rglob("*.safetensors")] + [f.name for f in folder.rglob("*.bin")]
    if not any(f".{config.variant}." in name or f".{config.variant}-" in name for name in names):
        variants = {m.group(1) for n in names if (m := re.search(r"model\.([A-Za-z]\w*)[.-]", n))} - {
            "safetensors",
            "bin",
        }
        raise UserError(
            f"model.variant={config.variant!r}: {config.path} has no such weights; "
            f"allowed: {', '.join(sorted(variants) or ['none, leave model.variant out'])}"
        )


_WEIGHTS = re.compile(r"^(?:diffusion_pytorch_|pytorch_)?model(?:[.-].*)?\.(?:safetensors|bin)$")
_VARIANT = re.compile(r"model\.([A-Za-z]\w*)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")


def check_variants_alone(config: ModelConfig, folder: Path) -> None:
    """UserError where a component's folder has weights of variants alone, which no variant is asked of."""
    for component in sorted(folder.iterdir()):
        names = [f.name for f in component.glob("*") if _WEIGHTS.match(f.name)] if component.is_dir() else []
        variants = {found.group(1) for name in names if (found := _VARIANT.search(name))}
        if variants and all(map(_VARIANT.search, names)):
            raise UserError(
                f"model.path={config.path!r}: {component.name} has weights of the variant "
                f"{', '.join(sorted(variants))} alone; allowed: model.variant {sorted(variants)[0]}"
            )


def limit_tokenizers(pipeline: Any) -> None:
    """Give tokenizers saved without ``model_max_length`` the number of positions of their text encoder."""
    for name, tokenizer in pipeline.components.items():
        if not name.startswith("tokenizer") or getattr(tokenizer, "model_max_length", 0) < 10**9:
            continue
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if positions:
            tokenizer.model_max_length = positions
            logger.warning("%s has no model_max_length: %d, its text encoder's positions", name, positions)


def check_components(path: str, pipeline: Any, names: tuple[str, ...]) -> None:
    """UserError for components that a pipeline lacks."""
    missing = [name for name in names if getattr(pipeline, name) is None]
    if missing:
        raise UserError(f"model.path={path!r}: the pipeline has no {', '.join(missing)}")


def check_vae(config: ModelConfig, pipeline: Any, family: Family) -> None:
    """UserError for an autoencoder of another width than the network's latents, or without a scale, or
    without the shift that the family's pipeline subtracts.
    """
    latent = family.codec.channels(pipeline.vae.config)
    wanted = family.latent_channels(getattr(pipeline, family.network_name).config)
    where = f"model.vae={config.vae!r}" if config.vae else f"model.path={config.path!r}"
    scale = pipeline.vae.config.get("scaling_factor", 1.0)  # some classes have none, and no pipeline reads it
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UserError(
            f"{where}: scaling_factor of the VAE's config.json is {scale!r}, by which pipelines divide "
            "latents; allowed: a number above 0 (0.18215 of Stable Diffusion 1.5 and 2, 0.13025 of SDXL)"
        )
    if latent != wanted:
        raise UserError(
            f"{where}: the VAE has {latent} latent channels, the {family.network_name} takes {wanted}"
        )
    usual, shift = family.configs["vae"].get("shift_factor"), pipeline.vae.config.get("shift_factor")
    if usual is not None and not (isinstance(shift, int | float) and math.isfinite(shift)):
        raise UserError(
            f"{where}: shift_factor of the VAE's config.json is {shift!r}, which pipelines of {family.name} "
            f"subtract from latents; allowed: a number ({usual:g} of the base models)"
        )


_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def tell_of_other_scale(config: ModelConfig, vae: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Log where ``model.vae`` scales latents unlike the VAE that it replaces: it is of another latent space,
    such as Stable Diffusion 1.5's under XL, whose shapes are equal.

    Args:
        vae: configuration of ``model.vae``.
        own: that of the pipeline's own VAE.
    """
    differing = [name for name in _SCALES if vae.get(name) != own.get(name)]
    if differing:
        facts = ", ".join(f"{name} {vae.get(name)} for {own.get(name)}" for name in differing)
        logger.warning(
            "model.vae=%r is of another latent space than the model's own VAE, unless the network was "
            "trained with it: %s", config.vae, facts,
        )  # fmt: skip


def tell_of_idle_settings(
    config: ModelConfig, source: str, family: Family, network: Mapping[str, Any]
) -> None:
    """Log settings that nothing of this model reads.

    Args:
        source: where it is loaded from.
        network: configuration of its network.
    """
    idle = {
        name: f"{family.name} has none"
        for name in ("max_sequence_length", "embedded_guidance")
        if not hasattr(family, name)
    }
    if network.get("guidance_embeds") is False:
        idle["embedded_guidance"] = "its network is not guidance-distilled (guidance_embeds is false)"
    if Path(source).exists():
        idle["revision"] = "the model is no download of the hub"
    if Path(source).is_file():
        idle["variant"] = "the model is a single file"
    for name, reason in idle.items():
        if (value := getattr(config, name)) is not None:
            logger.warning("no effect of model.%s=%r: %s", name, value, reason)
