"""The weights that training starts from: a base model with the adapters of earlier runs folded in.

``model.path`` may be a run directory or one of its checkpoints, and ``model.adapter`` names LoRAs or LoRA
runs. Adapters are folded into the frozen weights, so that policy and reference both start from them, and
another adapter is trained on top.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffalign.config.files import read_yaml
from diffalign.config.io import from_dict
from diffalign.config.schema import ModelConfig, Run
from diffalign.errors import UserError
from diffalign.models.experts import EXPERTS, changing
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora import ADAPTER, add_lora, load_trainable_state
from diffalign.models.lora_formats import Lora, parse_lora, read_lora
from diffalign.models.lora_merge import merge_into
from diffalign.models.precision import only_errors
from diffalign.models.sources import fetch_lora, is_lora, user_errors
from diffalign.models.text_lora import is_text, load_text_state
from diffalign.training.checkpoint import read_trained
from diffalign.utils.notices import main_logger

logger = main_logger(__name__)


def run_of(folder: str | Path) -> Run | None:
    """Return the configuration of a run directory, or of the run of a checkpoint; None for anything else."""
    folder = Path(folder)
    owner = owner_of(folder) if is_checkpoint(folder) else folder
    file = owner / "config.yaml"
    return from_dict(read_yaml(file), str(file)) if file.is_file() else None


def owner_of(checkpoint: Path) -> Path:
    """Return the run directory of a checkpoint, ``<run>/checkpoints/step-N``."""
    return checkpoint.absolute().parent.parent


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder is a checkpoint of a run."""
    weights = (Path(folder, name) for name in ("trainable.safetensors", "shards"))
    return any(path.exists() for path in weights) and Path(folder, "state.json").is_file()


def expanded(config: ModelConfig) -> ModelConfig:
    """Return the model section with a run in ``model.path`` replaced by the run's base and its adapter.

    The run's base, family, variant, revision, autoencoder, motion adapter and prediction are used; the
    settings of training are this section's.

    Raises:
        UserError: a run that has not finished, a checkpoint of another program, or of a whole network.
    """
    path = os.path.expanduser(config.path)
    run = run_of(path) if config.path and os.path.isdir(path) else None
    if run is None:
        return config
    own = run.model
    adapter = path if is_checkpoint(path) else str(Path(path, "aligned"))
    if not os.path.isdir(adapter):
        raise UserError(
            f"model.path={config.path!r} is a run without aligned/: it has not finished; allowed: a finished "
            "run, or one of its checkpoints"
        )
    if Path(adapter, "model_index.json").is_file():
        return replace(config, path=adapter)
    kept = {
        name: getattr(own, name)
        for name in (
            "family", "revision", "variant", "vae", "motion_adapter", "network", "prediction",
            "zero_terminal_snr",
        )
        if getattr(config, name) == getattr(ModelConfig(), name)
    }  # fmt: skip
    return expanded(replace(config, path=own.path, adapter=(*own.adapter, adapter, *config.adapter), **kept))


def merge_adapters(model: LoadedModel, adapters: tuple[str, ...]) -> None:
    """Fold LoRAs into the model's frozen weights, one after another, and log it.

    What is for the other one of two experts is kept beside it (``LoadedModel.carried``).

    Args:
        adapters: a LoRA's folder, file or hub id, a run directory or a checkpoint, each.

    Raises:
        UserError: nothing of that kind, or an adapter of another network.
    """
    for spec in adapters:
        if spec not in changing((spec,), expert_of(model)):
            _carry(model, spec)
            continue
        before = torch.stack([p.detach().double().sum().cpu() for p in model.network.parameters()])
        _merge(model, os.path.expanduser(spec), spec)
        model.network.requires_grad_(False).eval()
        after = torch.stack([p.detach().double().sum().cpu() for p in model.network.parameters()])
        changed = int((before != after).sum())
        if not changed:
            logger.warning("model.adapter=%r changes no weight: all its factors are 0", spec)
        logger.warning(
            "the adapter %s is folded into the %s (%d tensors): what is trained stands on both",
            spec,
            model.family.network_name,
            changed,
        )


def expert_of(model: LoadedModel) -> str | None:
    """Return ``model.expert`` of a loaded model."""
    own = model.family.network_name
    return next((name for name, part in EXPERTS.items() if model.split and part == own), None)


def _carry(model: LoadedModel, spec: str) -> None:
    """Keep the LoRA of the other expert; it replaces that of an earlier adapter, which it was made with."""
    path = Path(spec).expanduser()
    factors, words = read_lora(path / "aligned" if run_of(path) is not None else path, model)
    model.carried.update(other_part(factors, model))
    logger.warning("model.adapter=%r: %s, of the other expert: saved with what is trained", spec, words)


def other_part(factors: Lora, model: LoadedModel) -> Lora:
    """Return the part of a LoRA that is of the other one of two experts."""
    own = model.family.network_name
    return {name: part for name, part in factors.items() if name in EXPERTS.values() and name != own}


def _merge(model: LoadedModel, path: str, spec: str) -> None:
    if is_checkpoint(path):
        run = run_of(path)
        if run is not None and run.model.expert != expert_of(model):
            raise UserError(
                f"model.adapter={spec!r} is a checkpoint of model.expert={run.model.expert!r}, and here it "
                f"is {expert_of(model)!r}; allowed: a finished run, whose aligned/ is carried over"
            )
        encoders = load_checkpoint(model, path)
        for component in (model.family.network_name, *encoders):
            setattr(model.pipeline, component, _merged(getattr(model.pipeline, component)))
        return
    if run_of(path) is not None:
        path = str(Path(path, "aligned"))
    source = path if os.path.exists(path) else fetch_lora(spec, "model.adapter")
    if Path(source, "model_index.json").is_file():
        raise UserError(f"model.adapter={spec!r} is a whole pipeline; give it as model.path")
    if not is_lora(source):
        raise UserError(
            f"model.adapter={spec!r}: no LoRA in it; allowed: a LoRA's folder, file or hub id, or a run"
        )
    factors, words = read_lora(source, model)
    if not factors.get(model.family.network_name):
        raise UserError(
            f"model.adapter={spec!r} has nothing for the {model.family.network_name} of {model.source}"
        )
    logger.warning("model.adapter=%r: %s", spec, words)
    other = other_part(factors, model)
    model.carried.update(other)
    merge_into(model, [({name: part for name, part in factors.items() if name not in other}, 1.0)])


def _merged(network: Any) -> Any:
    """Return the network with its peft layers folded into their base layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [*network.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    network.__dict__.pop("peft_config", None)
    network._hf_peft_config_loaded = False
    return network


def read_checkpoint(model: LoadedModel, folder: str | Path) -> tuple[Lora, str]:
    """Return a checkpoint's adapters as factors, at the scale of its run, and a line as ``read_lora``'s.

    The weights are the moving average if there is one.

    Raises:
        UserError: it is in no run directory, holds whole weights, or its weights are of another network.
    """
    config = run_of_checkpoint(folder).model
    if config.train != "lora":
        raise UserError(f"{str(folder)!r} is a checkpoint of all weights; allowed: one of a LoRA run")
    with user_errors("checkpoint", str(folder)):
        state = {k: v for k, v in read_trained(Path(folder)).items() if f".{ADAPTER}" in k}
    text = config.text_encoder.lora
    settings: dict[str, Any] = {}
    for component in (model.family.network_name, *model.text_encoders):
        own = text if component in model.text_encoders else config.lora
        settings[f"{component}.lora_alpha"] = own.rank if own.alpha is None else own.alpha
    settings[f"{model.family.network_name}.use_rslora"] = config.lora.rslora
    return parse_lora(state, {"lora_adapter_metadata": json.dumps(settings)}, model, str(folder))


def run_of_checkpoint(folder: str | Path) -> Run:
    """Return the configuration of a checkpoint's run; UserError for a checkpoint that is in none."""
    run = run_of(folder)
    if run is None:
        raise UserError(f"{str(folder)!r} is a checkpoint outside its run; allowed: <run>/checkpoints/step-N")
    return run


def load_checkpoint(model: LoadedModel, folder: str | Path) -> list[str]:
    """Load a checkpoint into the base model of its run: adapters, or the whole network in float32.

    Returns:
        The text encoders that received adapters.

    Raises:
        UserError: it is in no run directory, or its weights are of another network.
    """
    run = run_of_checkpoint(folder)
    with user_errors("checkpoint", str(folder)):
        state: Mapping[str, Any] = read_trained(Path(folder))
    network: Any = model.network
    encoders: list[str] = []
    if run.model.train == "lora":
        add_lora(network, run.model.lora)
        state = {name: value for name, value in state.items() if f".{ADAPTER}" in name}
        encoders = load_text_state(model, run.model, state)
        state = {name: value for name, value in state.items() if not is_text(name)}
    else:
        with only_errors("diffusers"):  # it warns about casting
            network.float()
        network.requires_grad_(True)
    load_trainable_state(model, state)
    for component in (model.family.network_name, *encoders):
        getattr(model.pipeline, component).requires_grad_(False).eval()
    return encoders
