"""Runs, LoRAs and fine-tuned pipelines, as ``diffalign export`` and ``diffalign push`` take them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffalign.config.schema import ModelConfig, Run
from diffalign.errors import UserError
from diffalign.evaluation.report.numbers import gained, span
from diffalign.export.card import Card
from diffalign.methods import REGISTRY
from diffalign.models.experts import lora_folders
from diffalign.models.loading import find_family
from diffalign.models.sources import resolve
from diffalign.models.starting import is_checkpoint, owner_of, run_of
from diffalign.runs.load_pipeline import check_base, named, read_run_directory, run_directory_of, with_dtype
from diffalign.utils.intervals import Estimate
from diffalign.utils.text import read_json_object


@dataclass(frozen=True)
class Exportable:
    """An aligned model before it is written in another form.

    Attributes:
        base: the model that was aligned.
        source: ``aligned/``, a LoRA, a checkpoint, or a whole pipeline's folder.
        folder: the run directory, or the folder of the source.
        title: its name.
        run: the run's configuration, where it is known.
    """

    base: ModelConfig
    source: Path
    folder: Path
    title: str
    run: Run | None = None

    @property
    def family(self) -> str:
        """Name of the base's family in the registry."""
        return find_family(self.base, resolve(self.base.path)).name

    @property
    def exports(self) -> Path:
        """Folder of exports by default: the run's, for checkpoints are removed as the run goes on."""
        if is_checkpoint(self.source):
            return owner_of(self.source) / "export" / self.source.name
        return self.folder / "export"

    def card(self, adapted: bool) -> str:
        """Return the model card: the one that training wrote where it fits, else one made from the run."""
        written = self.source / "README.md"
        whole = (self.source / "model_index.json").is_file()
        # an export also holds the adapters that the run started from, so training's card would be wrong
        if written.is_file() and adapted != whole and not self.base.adapter:
            return written.read_text(encoding="utf-8")
        method = REGISTRY[self.run.method["type"]].title if self.run else "preference alignment"
        card = Card(
            base_model=self.base.path,
            family=self.family,
            adapted=adapted,
            method=method,
            paper=paper_of(self.run),
            versions=versions(self.folder),
            numbers=figures(self.folder),
            settings=asdict(self.run) if self.run else {},
            experts=tuple(part.name for part in lora_folders(self.source).values()),
        )
        return card.text()


def exportable(spec: str, base: str | None = None) -> Exportable:
    """Return the aligned model of a run directory, an ``aligned/`` folder, a LoRA or a pipeline.

    Raises:
        UserError: none of these, or an unknown base.
    """
    path = Path(spec).expanduser()
    directory = run_directory_of(str(path))
    run = read_run_directory(directory) if directory is not None else None
    if (path / "model_index.json").is_file():
        model = (
            with_dtype(run.model, None) if run is not None and base is None else ModelConfig(path=base or "")
        )
        if not model.path:
            raise UserError(
                f"{spec!r} is a whole pipeline: give the model that it was trained from as --base"
            )
        resolve(model.path)
        return Exportable(model, path, directory or path.parent, _title(directory or path), run)
    found = named(str(path), base)
    check_base(found, spec, base)
    if found.aligned is None:
        raise UserError(
            f"{spec!r} is a base model: there is nothing aligned to export; allowed: a run or a LoRA"
        )
    folder = directory or (path if path.is_dir() else path.parent)
    if is_checkpoint(found.aligned):
        owner = _title(owner_of(path))
        return Exportable(found.model, found.aligned, folder, f"{owner}-{path.name}", run_of(path))
    return Exportable(found.model, found.aligned, folder, _title(directory or path), run)


def figures(folder: Path) -> Mapping[str, Any]:
    """Return the numbers of a run's ``summary.json`` and, where it was evaluated, its ``report.json``."""
    numbers: dict[str, Any] = {}
    if (summary := _read(folder / "summary.json")) is not None:
        numbers = {"optimizer steps": summary.get("steps", 0), "data": summary.get("data", "")}
        numbers |= summary.get("held_out", {})
    return numbers | gains(_read(folder / "report.json") or {})


def gains(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the gain of each reward with its interval, by name; nothing of a report on several models."""
    if len(report.get("models", {})) != 1:
        return {}
    found = {}
    for name, reward in report["rewards"].items():
        mean = Estimate(reward["gain"], *reward["gain_ci95"])
        found[f"gain of {name} over the base"] = (
            f"{gained(mean)} (95 % interval {span(mean)}), {report['prompts']} prompts, the same noise"
        )
    return found


def paper_of(run: Run | None) -> str:
    """Return authors, title, year and address of the paper of a run's method; empty without a run."""
    if run is None:
        return ""
    card = REGISTRY[run.method["type"]]
    return f"{card.paper} ({card.year}), {card.url}"


def versions(folder: Path) -> dict[str, str]:
    """Return the versions that a run was trained with; nothing where it did not write them."""
    return dict((_read(folder / "summary.json") or {}).get("versions", {}))


def _read(file: Path) -> dict[str, Any] | None:
    return read_json_object(file) if file.is_file() else None


def _title(path: Path) -> str:
    """Return a file name that is valid in prompts of every program: ``<lora:name:1>`` ends at a colon."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.resolve().name)
    return name.removesuffix(".safetensors") or "diffalign"
