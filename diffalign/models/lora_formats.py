"""LoRA files in the layouts that people exchange, read as factors by diffusers' module names.

Read: diffusers (new and old), peft, kohya (``lora_unet_*``, ``lora_te*``, blocks named as diffusers or as
Stability does), ComfyUI (``diffusion_model.*``, ``transformer.*``), OneTrainer (``lora_transformer_*``) and
SimpleTuner (``lycoris_*``). The scale of a module is ``alpha / rank`` of its ``.alpha`` tensor, else of the
metadata or the folder's ``adapter_config.json`` (rsLoRA: ``alpha / sqrt(rank)``), else 1: what diffusers,
ComfyUI, A1111 and kohya's scripts do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models.experts import lora_folders
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora_base import of_another_base
from diffalign.models.lora_names import file_text_name, modules_of, stems_of
from diffalign.models.original_transformers import Place
from diffalign.models.sources import LORA_FILES, user_errors
from diffalign.training.checkpoint import TRAINED
from diffalign.utils.notices import main_logger
from diffalign.utils.text import parse_json, read_json_object

logger = main_logger(__name__)

_PARTS = (
    (".lora_A.weight", "down"),
    (".lora_A.default.weight", "down"),
    (".lora_down.weight", "down"),
    (".lora.down.weight", "down"),
    ("_lora.down.weight", "down"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_B.default.weight", "up"),
    (".lora_up.weight", "up"),
    (".lora.up.weight", "up"),
    ("_lora.up.weight", "up"),
    (".lora_linear_layer.up.weight", "up"),
    (".alpha", "alpha"),
    (".dora_scale", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".lora_magnitude_vector.default.weight", "magnitude"),
    (".lora_magnitude_vector", "magnitude"),
)


@dataclass(frozen=True)
class Factors:
    """One module's adapter: W + scale up down, with DoRA's magnitude where there is one.

    Attributes:
        down: (r, in) of a linear module, (r, in, k, k) of a convolution.
        up: (out, r) or (out, r, 1, 1).
        scale: factor of the product.
        magnitude: (out,) of DoRA; None: plain LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return int(self.down.shape[0])

    def product(self) -> Tensor:
        """Return scale up down in float32, shaped like the module's weight."""
        flat = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * flat.reshape(self.up.shape[0], *self.down.shape[1:])


Lora = dict[str, dict[str, Factors]]
"""By component (``unet``, ``transformer``, ``text_encoder``, ...) and module."""


def lora_file(path: str | Path) -> Path:
    """Return the file of a LoRA, given as the file or as its folder.

    Raises:
        UserError: there is none, or it is a checkpoint's, whose alpha stands in the run's configuration.
    """
    path = Path(path).expanduser()
    folder = path.parent if path.is_file() else path
    if (path == folder or path.name in TRAINED) and (folder / "state.json").is_file():
        raise UserError(
            f"{path} is of a checkpoint, whose weights do not hold the adapters' scale; allowed: the "
            "checkpoint's folder, <run>/checkpoints/step-N"
        )
    if path.is_file():
        return path
    found = [path / name for name in LORA_FILES if (path / name).is_file()]
    found = found or (sorted(path.glob("*.safetensors")) if path.is_dir() else [])
    if len(found) == 1 or (found and found[0].name in LORA_FILES):
        return found[0]
    listed = ", ".join(file.name for file in found) or "no .safetensors"
    raise UserError(f"{path}: {listed} there; allowed: a LoRA's .safetensors file, or the folder of one")


def read_lora(path: str | Path, model: LoadedModel) -> tuple[Lora, str]:
    """Read a LoRA in any known layout.

    Args:
        path: a .safetensors file, or a folder with one (diffusers' or peft's), or with one folder an expert
            (``models/experts.py``). A file of one expert is read for the one that is trained.
        model: the model that it is for; its modules say what names are valid.

    Returns:
        The factors, and one line that says what was recognised.

    Raises:
        UserError: unreadable, of another kind of adapter, or with a tensor that has no module in the model.
    """
    parts = lora_folders(Path(path).expanduser())
    if not parts:
        return _read_file(lora_file(path), model)
    if not model.split:
        raise UserError(
            f"{path} is a LoRA of two experts, and {model.source} has one network; allowed: a LoRA"
        )
    lora: Lora = {}
    words = []
    for component, folder in parts.items():
        one, note = _read_file(lora_file(folder), model)
        lora[component] = one.get(model.family.network_name, {})
        words.append(f"{folder.name}: {note}")
    return lora, "; ".join(words)


def _read_file(file: Path, model: LoadedModel) -> tuple[Lora, str]:
    """Read one file as a LoRA of the model; see ``read_lora``."""
    from safetensors import safe_open

    with user_errors("LoRA", str(file)), safe_open(file, framework="pt") as handle:
        metadata = dict(handle.metadata() or {})
        state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    beside = file.parent / "adapter_config.json"
    config = read_json_object(beside) if beside.is_file() else None
    if others := list(of_another_base(metadata, config, model)):
        logger.warning(
            "the LoRA %s was trained on another base than %s: its %s",
            file, model.source, ", its ".join(others),
        )  # fmt: skip
    return parse_lora(state, metadata, model, str(file), config)


def parse_lora(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    model: LoadedModel,
    source: str = "LoRA",
    config: Mapping[str, Any] | None = None,
) -> tuple[Lora, str]:
    """Return the factors of a state dict; see ``read_lora``.

    Args:
        metadata: of the file's header.
        source: the file, for messages.
        config: peft's ``adapter_config.json``, where the LoRA came with one.
    """
    stems = stems_of(model)
    gathered: dict[tuple[str, str], dict[str, Any]] = {}
    unknown: list[str] = []
    layouts: set[str] = set()
    for key, tensor in state.items():
        found = _split(key, stems)
        if found is None:
            unknown.append(key)
            continue
        (component, place, layout), part = found
        layouts.add(layout)
        gathered.setdefault((component, "\n".join(place.modules)), {"place": place})[part] = tensor
    if unknown:
        raise UserError(_not_understood(source, unknown, len(state), model))
    wrong = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise UserError(
            f"{source}: {len(wrong)} of {len(state)} tensors hold NaN or infinite values, such as {wrong[0]} "
            "(did its training diverge?); allowed: a LoRA of finite weights"
        )
    scales = _Scales(metadata, config)
    lora: Lora = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for (component, _), parts in gathered.items():
        if "down" not in parts or "up" not in parts:
            raise UserError(
                f"{source}: {parts['place'].modules[0]} has only {', '.join(sorted(parts))} of its LoRA"
            )
        if component not in shapes:
            modules = modules_of(getattr(model.pipeline, component))
            shapes[component] = {name: _shape_of(module) for name, module in modules.items()}
        for module, factors in _factors(component, parts, scales, shapes[component]).items():
            fitted = _fitted(source, f"{component}.{module}", factors, shapes[component][module])
            lora.setdefault(component, {})[module] = fitted
    return lora, _described(lora, layouts, scales, state)


def diffusers_state(lora: Lora) -> dict[str, Tensor]:
    """Return a LoRA as the state dict that ``load_lora_weights`` takes, every scale folded in.

    No reader can apply another scale: there is no alpha in it, and alpha = rank is every loader's default.
    """
    state = {}
    for component, modules in lora.items():
        encoder = component.startswith("text_encoder")
        for module, factors in modules.items():
            stem = f"{component}.{file_text_name(module)}" if encoder else f"{component}.{module}"
            down, up = (
                (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
                if encoder
                else (".lora_A.weight", ".lora_B.weight")
            )
            state[stem + down] = factors.down.contiguous()
            state[stem + up] = (factors.up * factors.scale).contiguous()
            if factors.magnitude is not None:
                kernel = factors.down.ndim - 2  # of a convolution peft keeps (1, out, 1, 1)
                per_output = (1, -1, *[1] * kernel) if kernel else (-1,)
                state[f"{stem}.lora_magnitude_vector"] = factors.magnitude.reshape(per_output).contiguous()
    return state


def _split(key: str, stems: Mapping[str, Any]) -> tuple[tuple[str, Place, str], str] | None:
    for suffix, part in _PARTS:
        if key.endswith(suffix) and key.removesuffix(suffix) in stems:
            return stems[key.removesuffix(suffix)], part
    return None


class _Scales:
    """The scale of a module that has no alpha tensor, by what stands beside the tensors."""

    def __init__(self, metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> None:
        self.by_component: dict[str, dict[str, Any]] = {}
        text = metadata.get("lora_adapter_metadata")
        settings = parse_json(text, "lora_adapter_metadata") if text else {}
        if not isinstance(settings, Mapping):
            raise UserError(f"lora_adapter_metadata is {str(text)[:60]!r}; allowed: a JSON object")
        for key, value in settings.items():
            component, _, name = key.partition(".")
            self.by_component.setdefault(component, {})[name] = value
        self.config = dict(config or {})

    @property
    def known(self) -> bool:
        return bool(self.by_component or self.config)

    def of(self, component: str, module: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        config = self.by_component.get(component) or self.config
        if "lora_alpha" not in config:
            return 1.0
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"])
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _factors(
    component: str, parts: Mapping[str, Any], scales: _Scales, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Factors]:
    """Return the factors of each module in a place; a stacked place shares ``down`` and splits ``up``."""
    place: Place = parts["place"]
    down, up = parts["down"], parts["up"]
    scale = (
        float(parts["alpha"]) / down.shape[0]
        if "alpha" in parts
        else scales.of(component, place.modules[0], down.shape[0])
    )
    magnitude = parts["magnitude"].flatten() if "magnitude" in parts else None
    if place.swapped:
        up = torch.cat(up.chunk(2)[::-1])
    if len(place.modules) == 1:
        return {place.modules[0]: Factors(down, up, scale, magnitude)}
    rows = [shapes[module][0] for module in place.modules]
    if sum(rows) != up.shape[0]:
        raise UserError(f"{place.modules[0]} and its like have {sum(rows)} rows, the LoRA {up.shape[0]}")
    cut = up.split(rows)
    marks = magnitude.split(rows) if magnitude is not None else [None] * len(rows)
    return {
        m: Factors(down, part, scale, mark) for m, part, mark in zip(place.modules, cut, marks, strict=True)
    }


def _shape_of(module: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight, of which 4 bits are stored in another one."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def _fitted(source: str, name: str, factors: Factors, shape: tuple[int, ...]) -> Factors:
    """Return the factors in the weight's number of axes: files store 1 x 1 convolutions as matrices too."""
    found = (factors.up.shape[0], *factors.down.shape[1:])
    kernel = (1,) * (len(shape) - 2)
    wrong = found != shape and (found[:2] != shape[:2] or {*found[2:], *shape[2:]} != {1})
    if wrong or (factors.magnitude is not None and factors.magnitude.numel() != shape[0]):
        raise UserError(
            f"{source}: {name} has a weight of {shape} here, the LoRA is for one of {found}; "
            "allowed: a LoRA of this very model"
        )
    if found == shape:
        return factors
    return replace(
        factors,
        down=factors.down.reshape(factors.rank, shape[1], *kernel),
        up=factors.up.reshape(shape[0], factors.rank, *kernel),
    )


def _not_understood(source: str, keys: Sequence[str], total: int, model: LoadedModel) -> str:
    kinds = [
        kind for kind in ("hada_", "lokr_", "glora", ".diff", "oft_") if any(kind in key for key in keys)
    ]
    hint = f" (LyCORIS tensors {', '.join(kinds)})" if kinds else ""
    return (
        f"{source}: {len(keys)} of {total} tensors have no module in this {model.family.name} model{hint}, "
        f"such as {keys[0]}; allowed: a LoRA of this family as diffusers, peft, kohya or ComfyUI lay it out"
    )


def _described(lora: Lora, layouts: set[str], scales: _Scales, state: Mapping[str, Tensor]) -> str:
    every = [factors for modules in lora.values() for factors in modules.values()]
    ranks = sorted({factors.rank for factors in every})
    strengths = sorted({round(factors.scale, 6) for factors in every})
    dora = " DoRA" if any(factors.magnitude is not None for factors in every) else ""
    counts = ", ".join(f"{len(modules)} modules of {component}" for component, modules in lora.items())
    where = "alpha tensors" if any(key.endswith(".alpha") for key in state) else "metadata"
    where = where if where == "alpha tensors" or scales.known else "no alpha in the file"
    return (
        f"a{dora} LoRA in {' and '.join(sorted(layouts))} layout: {counts}, "
        f"rank {', '.join(map(str, ranks))}, scale {', '.join(f'{s:g}' for s in strengths)} ({where})"
    )
