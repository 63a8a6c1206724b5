"""Models as people name them: a model, an ``aligned/`` folder or another LoRA, a run directory."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffalign.config.schema import ModelConfig, Run
from diffalign.errors import UserError, unknown
from diffalign.export.adapters import attach_carried
from diffalign.export.aligned import open_aligned
from diffalign.models.experts import lora_folders
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import find_family, load
from diffalign.models.lora_formats import lora_file
from diffalign.models.quantization import KINDS
from diffalign.models.sources import HUB_ID, fetch_lora, hub_kind, is_lora, keys_of, resolve
from diffalign.models.starting import is_checkpoint, load_checkpoint, run_of_checkpoint
from diffalign.runs.validate import read_run
from diffalign.utils.devices import DTYPES


def read_run_directory(folder: str | Path) -> Run:
    """Return the configuration of a run directory.

    Raises:
        UserError: it is no run directory.
    """
    file = Path(folder, "config.yaml")
    if not file.is_file():
        raise UserError(f"{str(folder)!r} is no run directory: there is no config.yaml in it")
    return read_run(file)


def run_directory_of(spec: str) -> Path | None:
    """Return the run directory of a spec (the directory itself, or its ``aligned/``); None for anything
    else."""
    for folder in (Path(spec), Path(spec).parent):
        if (folder / "config.yaml").is_file() and (folder == Path(spec) or Path(spec).is_dir()):
            return folder
    return None


@dataclass(frozen=True)
class Named:
    """The model that a name refers to, and the trained weights of it.

    Attributes:
        model: the model section.
        aligned: an ``aligned/`` folder, a LoRA or a checkpoint of that model's run; None: the model itself.
    """

    model: ModelConfig
    aligned: Path | None = None


def named(spec: str, base: str | None = None, dtype: str | None = None, quantize: str | None = None) -> Named:
    """Return the model that ``spec`` names. Weights are not loaded; what can be checked without them is.

    Args:
        spec: a run directory, a checkpoint of one (``run/checkpoints/step-200``), a LoRA (folder, file or hub
            id, over ``base``), a network alone (``unet/`` or ``transformer/``, over ``base``), or a model.
        base: the model under a LoRA or a network.
        dtype: of the frozen weights; None: as the run has it, or float32.
        quantize: how the network's weights are stored; None: unquantised.

    Raises:
        UserError: nothing of that kind exists, the run has not finished, or its weights are not quantised.
    """
    path = Path(spec).expanduser()
    stored = partial(with_dtype, dtype=dtype, quantize=quantize)
    if is_checkpoint(path):
        run = run_of_checkpoint(path)
        if quantize is not None and run.model.train == "full":
            raise UserError(
                f"--quantize {quantize} with {spec!r}, a checkpoint of all weights; allowed: without it, or "
                "with the run's aligned/ folder"
            )
        return Named(stored(run.model), path)
    if (path / "config.yaml").is_file():
        aligned = path / "aligned"
        if not aligned.is_dir():
            raise UserError(
                f"{spec!r} has no aligned/: the run has not finished; allowed: one of its checkpoints "
                f"({path / 'checkpoints'}/step-N), or continue it with --resume latest"
            )
        _check_readable(aligned)
        return Named(stored(read_run_directory(path).model), aligned)
    kind = "hub" if base is not None and not path.exists() and HUB_ID.fullmatch(spec) else "local"
    content = hub_kind(spec) if kind == "hub" else _local_kind(path)
    if content == "lora":
        source = Path(fetch_lora(spec)) if kind == "hub" else path
        found = Named(stored(_base_of(spec, base)), source)
        _check_readable(source)
    elif content == "network":
        if base is None:
            raise UserError(f"{spec!r} is a network alone; give the pipeline that it belongs to as --base")
        found = Named(stored(ModelConfig(path=base, network=spec)))
    else:
        found = Named(stored(ModelConfig(path=spec)))
    source_of = resolve(found.model.path)
    if os.path.exists(source_of):
        find_family(found.model, source_of)
    return found


def _check_readable(path: Path) -> None:
    """UserError for a LoRA whose file is damaged, by its header: models before it may take hours to draw."""
    for folder in list(lora_folders(path).values()) or [path] * is_lora(path):
        keys_of(str(lora_file(folder)), "LoRA")


def _local_kind(path: Path) -> str:
    """Return the kind of a path's content: ``lora``, ``network`` or ``model``."""
    if is_lora(path):
        return "lora"
    if (path / "model_index.json").is_file() or not path.is_dir():
        return "model"
    networks = (path / name / "config.json" for name in ("unet", "transformer"))
    alone = (path / "config.json").is_file() and list(path.glob("diffusion_pytorch_model*"))
    return "network" if alone or any(file.is_file() for file in networks) else "model"


def check_base(found: Named, spec: str, base: str | None) -> None:
    """Check that a base that is given is one that ``spec`` stands on.

    Raises:
        UserError: a run has its own, and a whole model needs none.
    """
    if base is not None and found.model.path != base:
        what = "a whole model" if found.aligned is None else f"aligned from {found.model.path}"
        raise UserError(
            f"--base {base!r} is for a LoRA or a network alone, and {spec!r} is {what}; allowed: without "
            "--base, or a LoRA such as RUN/aligned"
        )


def open_named(found: Named, device: str) -> LoadedModel:
    """Load the model; UserError if it is of an unknown kind, or its LoRA of another model."""
    if found.aligned is None:
        return load(found.model, device)
    if is_checkpoint(found.aligned):
        model = load(found.model, device)
        load_checkpoint(model, found.aligned)
        attach_carried(model)
        model.network.to(device)
        return model
    return open_aligned(found.model, found.aligned, device)


def open_model(
    spec: str, base: str | None, device: str, dtype: str | None = None, quantize: str | None = None
) -> LoadedModel:
    """Load the model that ``spec`` names; see ``named`` and ``open_named``."""
    return open_named(named(spec, base, dtype, quantize), device)


def _base_of(lora: str, base: str | None) -> ModelConfig:
    """Return the model under a LoRA: as given, or of the run that the folder belongs to."""
    if base is not None:
        return ModelConfig(path=base)
    run = run_directory_of(lora)
    if run is not None:
        return read_run_directory(run).model
    raise UserError(f"{lora!r} is a LoRA; give the model that it was trained on as --base")


def with_dtype(model: ModelConfig, dtype: str | None, quantize: str | None = None) -> ModelConfig:
    """Return the model with another dtype, if one is given; its network's weights as published, or quantised
    if a kind is given, and its text encoders' as published.

    Raises:
        UserError: an unknown dtype or kind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    if quantize is not None and quantize not in KINDS:
        raise unknown("--quantize", quantize, KINDS)
    plain = replace(model.text_encoder, quantize="none")
    model = replace(model, quantize=quantize or "none", text_encoder=plain)  # type: ignore[arg-type]
    return model if dtype is None else replace(model, dtype=dtype)  # type: ignore[arg-type]
