"""Adapters of a loaded pipeline: read as LoRA factors, attached from factors, written to files."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.export.combine import folded, uniform
from diffalign.export.layouts import kohya_state, lora_metadata, to_diffusers, train_layout
from diffalign.models.experts import FIRST, FOLDERS, INTO
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora import ADAPTER, has_lora_loader, inject
from diffalign.models.lora_base import base_metadata
from diffalign.models.lora_formats import Factors, Lora
from diffalign.models.precision import only_errors
from diffalign.models.sources import LORA_FILES, user_errors
from diffalign.utils.files import write_atomic


def live_lora(model: LoadedModel, adapter: str = ADAPTER) -> Lora:
    """Return the factors of the adapters on a pipeline's network and text encoders."""
    lora: Lora = {}
    for component in (*model.networks, *model.text_encoders):
        modules = _live_factors(getattr(model.pipeline, component), adapter)
        if modules:
            lora[component] = modules
    return lora


def put_on(model: LoadedModel, lora: Lora, source: str) -> None:
    """Attach a LoRA to the pipeline as active adapters, by diffusers' loader or, where it has none, by peft.

    Raises:
        UserError: it does not fit.
    """
    lora = uniform(lora)
    _check_magnitudes(lora, source)
    if has_lora_loader(model.family):
        # diffusers warns of each text encoder that the LoRA does not change, which is intended
        with user_errors("LoRA", source), only_errors("diffusers"):
            for part, arguments in by_file(lora, model).values():
                model.pipeline.load_lora_weights(to_diffusers(part), **arguments)
        return
    _inject(model.network, lora[model.family.network_name], source)


def _check_magnitudes(lora: Lora, source: str) -> None:
    """UserError for DoRA's magnitudes of a part of a component's modules, which no loader puts on."""
    for component, modules in lora.items():
        without = [name for name, factors in modules.items() if factors.magnitude is None]
        if 0 < len(without) < len(modules):
            raise UserError(
                f"{source}: {len(modules) - len(without)} of {len(modules)} modules of {component} have "
                f"DoRA's magnitude, and {without[0]} has none; allowed: all of them or none, or "
                "`diffalign export` with --to merged, which merges each as it is"
            )


def attach_carried(model: LoadedModel) -> None:
    """Attach what an earlier run trained of the other one of two experts, where that is loaded."""
    if model.carried and len(model.networks) > 1:
        put_on(model, model.carried, "the other expert's LoRA")


def by_file(lora: Lora, model: LoadedModel) -> dict[str, tuple[Lora, Mapping[str, Any]]]:
    """Return the parts of a LoRA that are a file of their own by folder, each with the further arguments of
    diffusers' loader: the whole LoRA and none, or of two experts one each, named as the first.
    """
    if not model.split:
        return {"": (lora, {})}
    return {FOLDERS[name]: ({FIRST: lora[name]}, INTO[name]) for name in FOLDERS if name in lora}


def set_strength(model: LoadedModel, strength: float) -> None:
    """Multiply the scale of every adapter on the pipeline; 0 disables them, DoRA's magnitudes included.

    Raises:
        UserError: the pipeline has no adapter.
    """
    from peft.tuners.lora import LoraLayer

    layers = [
        layer
        for component in (*model.networks, *model.text_encoders)
        for layer in getattr(model.pipeline, component).modules()
        if isinstance(layer, LoraLayer)
    ]
    if not layers:
        raise UserError(
            f"{model.source} has no LoRA on it whose scale could be set; allowed: a LoRA run or file"
        )
    for layer in layers:
        layer.enable_adapters(strength != 0)
        for adapter in layer.active_adapters:
            layer.set_scale(adapter, strength)


def write_trained(model: LoadedModel, folder: Path, title: str) -> None:
    """Write the trained adapters so that no reader can apply another strength; see ``layouts``."""
    lora = model.carried | live_lora(model)
    if not has_lora_loader(model.family):
        _write_as_peft(model, folder, title)
        return
    if train_layout(lora, model) == "kohya":
        save(kohya_state(lora, model), folder / LORA_FILES[0], lora_metadata(lora, model, title))
    else:
        write_diffusers(lora, model, folder, title)


def write_diffusers(lora: Lora, model: LoadedModel, folder: Path, title: str) -> None:
    """Write ``pytorch_lora_weights.safetensors`` in diffusers' layout with the scale folded in, one for each
    of two experts.

    The metadata says alpha = rank; it keeps the adapters' other settings, and names the base.
    """
    for where, (part, _) in by_file(lora, model).items():
        (folder / where).mkdir(exist_ok=True)
        _write_diffusers_file(part, model, folder / where, title)


def _write_diffusers_file(lora: Lora, model: LoadedModel, folder: Path, title: str) -> None:
    entries: dict[str, Any] = {}
    for component, modules in uniform(lora).items():
        first = next(iter(modules.values()))
        own = component in model.networks or component == FIRST  # a file of either expert names the first
        values = _peft_settings(model.network if own else getattr(model.pipeline, component))
        values |= {
            "r": first.rank,
            "lora_alpha": first.rank,
            "use_rslora": False,
            "use_dora": first.magnitude is not None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": sorted(modules),
        }
        entries |= {f"{component}.{key}": value for key, value in values.items()}
    settings = json.dumps(entries, indent=2, sort_keys=True)
    metadata = {**base_metadata(model, title), "lora_adapter_metadata": settings}
    save(to_diffusers(lora), folder / LORA_FILES[0], metadata)


def save(state: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write tensors with a header; values are copied, so tensors may share storage."""
    from safetensors.torch import save as to_bytes

    write_atomic(file, to_bytes({k: v.detach().cpu().clone() for k, v in state.items()}, metadata))


def _live_factors(network: nn.Module, adapter: str) -> dict[str, Factors]:
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        down: Any = layer.lora_A[adapter]
        up: Any = layer.lora_B[adapter]
        magnitude: Any = layer.lora_magnitude_vector
        mark = magnitude[adapter].weight.detach().flatten() if adapter in magnitude else None
        found[name] = Factors(down.weight.detach(), up.weight.detach(), float(layer.scaling[adapter]), mark)
    return found


def _peft_settings(network: Any) -> dict[str, Any]:
    config = getattr(network, "peft_config", {}).get(ADAPTER)
    if config is None:
        return {"peft_type": "LORA"}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


def _inject(network: nn.Module, modules: dict[str, Factors], source: str) -> None:
    """Attach adapters by peft alone, with the factors as their weights."""
    from peft import LoraConfig, set_peft_model_state_dict

    first = next(iter(modules.values()))
    dora = first.magnitude is not None
    config = LoraConfig(r=first.rank, lora_alpha=first.rank, target_modules=list(modules), use_dora=dora)
    state: dict[str, Tensor] = {}
    for name, factors in modules.items():
        one = folded(factors)
        state |= {f"{name}.lora_A.weight": one.down, f"{name}.lora_B.weight": one.up}
        if one.magnitude is not None:
            state[f"{name}.lora_magnitude_vector"] = one.magnitude
    with user_errors("LoRA", source):
        inject(network, config, ADAPTER)
        result: Any = set_peft_model_state_dict(network, state, adapter_name=ADAPTER)
    if result.unexpected_keys:
        raise UserError(f"{source}: {result.unexpected_keys[0]} has no module in this model")


def _write_as_peft(model: LoadedModel, folder: Path, title: str) -> None:
    """Write the two files that ``PeftModel.from_pretrained`` reads, with its names of tensors; return them.

    The scale is folded in, so that ComfyUI, which ignores the configuration, applies the same strength.
    """
    network: Any = model.network
    state: dict[str, Tensor] = {}
    for name, factors in _live_factors(network, ADAPTER).items():
        one = folded(factors)
        stem = f"base_model.model.{name}"
        state |= {f"{stem}.lora_A.weight": one.down, f"{stem}.lora_B.weight": one.up}
        if one.magnitude is not None:
            state[f"{stem}.lora_magnitude_vector"] = one.magnitude
    metadata = base_metadata(model, title)
    save(state, folder / LORA_FILES[1], metadata)
    config = copy.deepcopy(network.peft_config[ADAPTER])
    config.base_model_name_or_path = metadata["ss_sd_model_name"]
    config.inference_mode = True
    config.lora_alpha, config.use_rslora = config.r, False
    config.save_pretrained(str(folder))
