"""From a model's name to a LoadedModel."""

import inspect
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError, unknown
from diffalign.models.attention import check_masks, set_attention
from diffalign.models.checks import (
    check_components,
    check_vae,
    check_variant,
    check_variants_alone,
    limit_tokenizers,
    tell_of_idle_settings,
    tell_of_other_scale,
)
from diffalign.models.complete import complete_components
from diffalign.models.experts import FIRST, SECOND, check_expert, spanned
from diffalign.models.families.base import Family
from diffalign.models.families.card import FamilyCard
from diffalign.models.families.registry import FAMILIES, REFUSED, get_family, meant, moved
from diffalign.models.formulation import Formulation, formulation_in, path_of, set_formulation
from diffalign.models.libraries import import_libraries
from diffalign.models.loaded import LoadedModel, no_bars
from diffalign.models.motion_adapter import drop_adapter, load_motion, set_in_motion
from diffalign.models.placing import place, quantize_network
from diffalign.models.precision import only_errors
from diffalign.models.sources import (
    HUB_ID,
    OVER_A_BASE,
    holds_lora,
    is_single_file,
    resolve,
    sniff_family,
    user_errors,
)
from diffalign.models.starting import expanded, merge_adapters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    config: ModelConfig,
    device: torch.device | str = "cpu",
    compute: torch.dtype | None = None,
    network_device: torch.device | str | None = None,
    *,
    trained: bool = False,
    alone: bool = False,
) -> LoadedModel:
    """Load a pipeline, frozen and in evaluation mode, on ``device``.

    Args:
        trained: whether it will be trained: of two experts ``config.expert`` must name one.
        alone: whether the other expert is left out.
        network_device: where its network lies until it is trained; None: on ``device`` too.
        compute: dtype in which the network will run (autocast's, if training autocasts); None:
            ``config.dtype``. The attention back-end is proven in it.

    Raises:
        UserError: whatever is wrong with ``model.path``, ``family``, ``variant``, ``vae``,
            ``motion_adapter`` or ``attention``.
    """
    config, dtype = expanded(config), DTYPES[config.dtype]
    if compute not in (None, dtype) and dtype != torch.float32:
        wanted = str(compute).removeprefix("torch.")
        raise UserError(
            f"model.dtype={config.dtype!r} cannot be autocast to {wanted} (training.mixed_precision); "
            f"allowed: float32, {wanted}"
        )
    source = resolve(config.path)
    import_libraries()
    index = None if is_single_file(source) else _model_index(config, source)
    card = _found(config, source, index)
    formulation = Formulation() if index is not None else formulation_in(config, source, card)
    family = get_family(card.name).configured(config)
    check_masks(config.attention, family)
    split = check_expert(config, index, trained)
    quiet = no_bars() if os.path.exists(source) else nullcontext()
    # transformers warns of an image processor that only the safety checker would use
    with quiet, only_errors("transformers"), complete_components():
        arguments = _arguments(config, family, dtype, without_other=split and alone)
        if index is None:
            pipeline = _from_single_file(config, card, arguments)
        else:
            pipeline = _from_pretrained(config, source, index, card, arguments)
    if config.motion_adapter is not None:
        set_in_motion(pipeline)
    drop_adapter(pipeline)
    check_components(config.path, pipeline, (family.network_name, "vae", "scheduler", *family.text_encoders))
    check_vae(config, pipeline, family)
    if config.vae is not None and index is not None:
        tell_of_other_scale(config, pipeline.vae.config, _vae_config(config, source))
    place(pipeline, family, config, device, network_device)
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
    network = getattr(pipeline, family.network_name)
    tell_of_idle_settings(config, source, family, network.config)
    set_formulation(pipeline, config, formulation)
    family.settle(pipeline)
    patch = family.patch(network.config)
    path, target = path_of(pipeline.scheduler, patch, config.path, family.keeps_length)
    path = spanned(path, pipeline, family.network_name)
    limit_tokenizers(pipeline)
    model = LoadedModel(family, pipeline, path, target, config.path, dtype, tiled=config.vae_tiling)
    for part in model.networks.values():
        set_attention(part, config.attention, device, compute or dtype)
    merge_adapters(model, config.adapter)
    if config.quantize != "none":
        quantize_network(
            model, config, device if network_device is None else network_device, compute or dtype
        )
    return model


def _arguments(
    config: ModelConfig, family: Family, dtype: torch.dtype, without_other: bool
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained``: dtypes, components given by the configuration, and None
    for the other expert where it is left out.
    """
    vae_dtype = torch.float32 if family.codec.exact else dtype
    arguments: dict[str, Any] = {
        "dtype": dtype if vae_dtype == dtype else {"default": dtype, "vae": vae_dtype},
        **family.load_arguments,
    }
    if config.vae is not None:
        arguments["vae"] = load_vae(
            config.vae, vae_dtype, family.configs["vae"].get("_class_name", "AutoencoderKL")
        )
    if config.network is not None:
        arguments[family.network_name] = load_network(config.network, family, dtype)
    if config.motion_adapter is not None:
        arguments["motion_adapter"] = load_motion(config.motion_adapter, dtype)
    if without_other:
        arguments[SECOND if family.network_name == FIRST else FIRST] = None
    return arguments


def find_family(config: ModelConfig, source: str) -> FamilyCard:
    """Return the family of a checkpoint, recognised by its content; ``model.family`` must agree with it.

    Raises:
        UserError: no family fits, or another than the one named.
    """
    return _found(config, source, None if is_single_file(source) else _model_index(config, source))


def _found(config: ModelConfig, source: str, index: dict[str, Any] | None) -> FamilyCard:
    """``find_family``, of a pipeline whose index has been read; None: it is a single file."""
    if config.family not in ("auto", *FAMILIES):
        raise unknown("model family (model.family)", config.family, ["auto", *FAMILIES])
    stored = sniff_family(source) if index is None else _family_of_class(config, source, index)
    found = moved(meant(stored, config.family), config.motion_adapter)
    if config.family not in ("auto", found.name):
        if FAMILIES[config.family].moves == found.name:
            raise UserError(
                f"model.family={config.family!r}, but {config.path!r} is {found.name}; allowed with "
                "model.motion_adapter"
            )
        raise UserError(
            f"model.family={config.family!r}, but {config.path!r} is {found.name} ({found.title}); "
            f"set model.family to {found.name} or auto"
        )
    return found


def load_vae(path: str, dtype: torch.dtype, class_name: str = "AutoencoderKL") -> Any:
    """Return the VAE of ``model.vae``: a hub id, its own folder, or a pipeline folder with ``vae/`` in it.

    Args:
        class_name: of the family's VAE in diffusers.

    Raises:
        UserError: not there, or not a VAE.
    """
    import diffusers

    folder = Path(path).expanduser()
    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else ""
    if folder.is_dir() and not (folder / subfolder / "config.json").is_file():
        raise UserError(
            f"model.vae={path!r}: no config.json in it; allowed: a hub id, or a folder of a diffusers VAE"
        )
    if not folder.exists() and not HUB_ID.fullmatch(path):
        raise UserError(
            f"model.vae={path!r}: no such folder; allowed: a hub id, or a folder of a diffusers VAE"
        )
    with user_errors("model.vae", path):
        source = str(folder) if folder.exists() else path
        cls = getattr(diffusers, class_name)
        return cls.from_pretrained(source, subfolder=subfolder or None, dtype=dtype)


def _vae_config(config: ModelConfig, source: str) -> dict[str, Any]:
    """Return the configuration of a pipeline's own VAE, with its class's defaults where it is silent."""
    import diffusers

    with user_errors("model.path", config.path):
        found: Any = diffusers.AutoencoderKL.load_config(source, subfolder="vae", revision=config.revision)
    cls: Any = getattr(diffusers, found.get("_class_name", "AutoencoderKL"))
    return {name: one.default for name, one in inspect.signature(cls).parameters.items()} | dict(found)


def load_network(path: str, family: Family, dtype: torch.dtype) -> Any:
    """Return the network of ``model.network``: its own folder, or one of that name in a folder or hub id.

    Raises:
        UserError: not there, or of another class than the family's.
    """
    import diffusers

    folder = Path(path).expanduser()
    if not folder.exists() and not HUB_ID.fullmatch(path):
        raise UserError(f"model.network={path!r}: no such folder; allowed: a hub id, or a network's folder")
    own = (folder / "config.json").is_file()
    if folder.exists() and not own and not (folder / family.network_name / "config.json").is_file():
        raise UserError(
            f"model.network={path!r}: neither config.json nor {family.network_name}/config.json in it; "
            f"allowed: the folder of a {family.network_class}, or one with {family.network_name}/ in it"
        )
    source = str(folder) if folder.exists() else path
    with user_errors("model.network", path), no_bars() if folder.exists() else nullcontext():
        cls = getattr(diffusers, family.network_class)
        found = cls.load_config(source, subfolder=None if own else family.network_name).get("_class_name")
        if found not in (None, family.network_class):
            raise UserError(
                f"model.network={path!r} is a {found}; allowed with {family.name}: {family.network_class}"
            )
        return cls.from_pretrained(source, subfolder=None if own else family.network_name, dtype=dtype)


def _model_index(config: ModelConfig, source: str) -> dict[str, Any]:
    """Return the pipeline's model_index.json, of a folder or from the hub."""
    from diffusers import DiffusionPipeline

    if os.path.isdir(source):
        file = Path(source, "model_index.json")
        if not file.is_file():
            absent = "there is no model_index.json in it"
            hint = f"it holds a LoRA: {OVER_A_BASE}" if holds_lora(source) else absent
            raise UserError(f"model.path={config.path!r} is not a diffusers pipeline folder: {hint}")
        try:
            index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(index, dict):
            raise UserError(f"{file} holds a {type(index).__name__}; allowed: a mapping of components")
        missing = [
            name
            for name, value in index.items()
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
            if name not in ("safety_checker", "feature_extractor", "image_encoder")
            and not Path(source, name).is_dir()
        ]
        if missing:
            raise UserError(f"model.path={config.path!r}: component folder missing: {', '.join(missing)}")
        return index
    with user_errors("model.path", config.path):
        hub: Any = DiffusionPipeline.load_config(source, revision=config.revision)
    if not isinstance(hub, dict):
        raise UserError(
            f"model.path={config.path!r}: its model_index.json holds a {type(hub).__name__}; allowed: a "
            "mapping of components"
        )
    return hub


def _has(config: ModelConfig, source: str, card: FamilyCard) -> bool:
    """Whether the configurations by which a card recognises its models are those of a checkpoint."""
    from diffusers import UNet2DConditionModel

    for component, key, value in card.recognised_by:
        with user_errors("model.path", config.path):
            found = UNet2DConditionModel.load_config(source, subfolder=component, revision=config.revision)
            if found.get(key) != value:
                return False
    return True


def _family_of_class(config: ModelConfig, source: str, index: dict[str, Any]) -> FamilyCard:
    name = index.get("_class_name")
    cards = [card for card in FAMILIES.values() if card.pipeline == name]
    decided = [card for card in cards if card.name == config.family]
    if len(cards) > 1 and not decided:
        cards = [card for card in cards if _has(config, source, card)]
    if cards:
        return max(decided or cards, key=lambda c: len(c.recognised_by))
    reason = REFUSED.get(str(name))
    why = f" ({reason})" if reason else ""
    raise UserError(
        f"model.path={config.path!r} is a {name}{why}; allowed: "
        + ", ".join(f"{card.pipeline} ({card.name})" for card in FAMILIES.values())
    )


def _from_single_file(config: ModelConfig, card: FamilyCard, arguments: dict[str, Any]) -> Any:
    import diffusers

    file = os.path.expanduser(config.path)
    try:
        return getattr(diffusers, card.pipeline).from_single_file(file, **arguments)
    except (OSError, ValueError, ConnectionError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.path={config.path!r} cannot be loaded ({first}). A single file has no tokenizer and no "
            f"configuration: diffusers fetches them once from {card.example}; without network, convert the "
            "file to a diffusers folder elsewhere (save_pretrained) and give that folder"
        ) from error


def _from_pretrained(
    config: ModelConfig, source: str, index: dict[str, Any], card: FamilyCard, arguments: dict[str, Any]
) -> Any:
    import diffusers

    with user_errors("model.path", config.path):
        if os.path.isdir(source):
            check = check_variants_alone if config.variant is None else check_variant
            check(config, Path(source))
        # diffusers needs an argument for what a pipeline was saved without, such as SD3's T5
        absent = {name: None for name, value in index.items() if value == [None, None]}
        return getattr(diffusers, card.pipeline).from_pretrained(
            source, revision=config.revision, variant=config.variant, **{**absent, **arguments}
        )
