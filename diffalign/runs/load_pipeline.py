"""Models as people name them: a model, an ``aligned/`` folder or another LoRA, a run directory."""

from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.config.schema import ModelConfig, Run
from diffalign.errors import UserError, unknown
from diffalign.export.aligned import open_aligned
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.models.sources import is_lora, resolve
from diffalign.runs.validate import read_run
from diffalign.utils.devices import DTYPES


def read_run_directory(folder: str | Path) -> Run:
    """Return the configuration of a run directory.

    Raises:
        UserError: there is no run in it.
    """
    file = Path(folder, "config.yaml")
    if not file.is_file():
        raise UserError(f"{str(folder)!r} is no run directory: there is no config.yaml in it")
    return read_run(file)


def run_directory_of(spec: str) -> Path | None:
    """Return the run directory that a spec is, or whose ``aligned/`` it is; None for anything else."""
    for folder in (Path(spec), Path(spec).parent):
        if (folder / "config.yaml").is_file() and (folder == Path(spec) or Path(spec).is_dir()):
            return folder
    return None


@dataclass(frozen=True)
class Named:
    """What a name stands for: a model, and the ``aligned/`` folder or LoRA in its place; None: the model."""

    model: ModelConfig
    aligned: Path | None = None


def named(spec: str, base: str | None = None, dtype: str | None = None) -> Named:
    """Return what ``spec`` names: a run directory, a folder with a LoRA (over ``base``), or a model. Nothing
    is loaded.

    Raises:
        UserError: nothing of that kind is there, or a run that has not been finished.
    """
    if Path(spec, "config.yaml").is_file():
        aligned = Path(spec, "aligned")
        if not aligned.is_dir():
            raise UserError(
                f"{spec!r} has no aligned/: the run has not finished; continue it with --resume latest"
            )
        return Named(with_dtype(read_run_directory(spec).model, dtype), aligned)
    found = Named(_base_of(spec, base, dtype), Path(spec)) if is_lora(spec) else None
    found = found or Named(with_dtype(ModelConfig(path=spec), dtype))
    resolve(found.model.path)
    return found


def open_named(found: Named, device: str) -> LoadedModel:
    """Return the model; UserError if it is of an unknown kind, or its LoRA of another model."""
    if found.aligned is None:
        return load(found.model, device)
    return open_aligned(found.model, found.aligned, device)


def open_model(spec: str, base: str | None, device: str, dtype: str | None = None) -> LoadedModel:
    """Return the model that ``spec`` names; see ``named`` and ``open_named``."""
    return open_named(named(spec, base, dtype), device)


def _base_of(lora: str, base: str | None, dtype: str | None) -> ModelConfig:
    """Return the model under a LoRA: as given, or of the run that the folder belongs to."""
    if base is not None:
        return with_dtype(ModelConfig(path=base), dtype)
    run = run_directory_of(lora)
    if run is not None:
        return with_dtype(read_run_directory(run).model, dtype)
    raise UserError(f"{lora!r} is a LoRA; give the model that it was trained on as --base")


def with_dtype(model: ModelConfig, dtype: str | None) -> ModelConfig:
    """Return the model with another dtype, if one is given."""
    if dtype is None:
        return model
    if dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    return replace(model, dtype=dtype)  # type: ignore[arg-type]
