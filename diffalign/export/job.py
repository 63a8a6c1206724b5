"""``diffalign export``: the result of a run in the format of another program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import ModelConfig
from diffalign.errors import UserError, unknown
from diffalign.export.adapters import by_file, save, write_diffusers
from diffalign.export.aligned import read_lora_of
from diffalign.export.combine import extracted, has_dora, mix, reduced
from diffalign.export.layouts import comfyui_state, dropped_by_diffusers, kohya_state, lora_metadata
from diffalign.export.single_file import unheld_scale, write_single_file
from diffalign.models.experts import changing
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import DTYPES, load
from diffalign.models.lora import has_lora_loader
from diffalign.models.lora_formats import Lora
from diffalign.models.lora_merge import merge_into
from diffalign.models.lora_names import modules_of
from diffalign.models.sources import is_lora
from diffalign.models.starting import is_checkpoint, load_checkpoint, other_part, run_of
from diffalign.utils.files import atomic_folder

FORMATS = ("diffusers", "kohya", "comfyui", "merged", "single-file")
FILES = ("kohya", "comfyui", "single-file")
EXTRACTED_RANK = 64


@dataclass(frozen=True)
class Export:
    """The settings of an export.

    Attributes:
        to: one of ``FORMATS``.
        output: a folder, or a .safetensors file where the format is one file.
        title: of the model; the file's name in a folder.
        strength: factor of the adapter's change.
        rank: of the LoRA that is written; None: as it is, or 64 of one extracted from full weights.
        dtype: of the weights written; None: the LoRA's own, of merged weights the base's.
        overwrite: whether an existing output is replaced.
        card_text: README.md of a folder; empty: none.
    """

    to: str
    output: Path
    title: str = "diffalign"
    strength: float = 1.0
    rank: int | None = None
    dtype: str | None = None
    overwrite: bool = False
    card_text: str = ""

    @property
    def path(self) -> Path:
        """The file or folder to write."""
        whole = self.to not in FILES or self.output.suffix == ".safetensors"
        return self.output if whole else self.output / f"{self.title}.safetensors"


def export(
    base: ModelConfig,
    source: Path,
    settings: Export,
    others: Sequence[tuple[Path, float]] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Write an aligned model in another format.

    Args:
        base: the model that was aligned.
        source: an ``aligned/`` folder, a LoRA's file or folder, a whole pipeline's folder, or a checkpoint.
        others: more LoRAs of the same base with their weights, added to it: files, folders, runs or
            checkpoints.
        say: gets a line for whatever was recognised, approximated or left out.

    Returns:
        The file or folder written.

    Raises:
        UserError: settings that exclude each other, or a LoRA or family that the format does not support.
    """
    _check(settings)
    base = base if settings.dtype is None else replace(base, dtype=settings.dtype)  # type: ignore[arg-type]
    whole = holds_whole(source)
    others = [(adapter_of(path), weight) for path, weight in others]
    if settings.to in ("merged", "single-file"):
        model = _merged(base, source, whole, settings, others, say)
        if settings.to == "single-file":
            size = write_single_file(model, settings.path, DTYPES[base.dtype], settings.title)
            say(f"{settings.path}: {size / 2**30:.2f} GiB, {base.dtype}")
            if note := unheld_scale(model):
                say(f"warning: {note}")
        else:
            with atomic_folder(settings.path) as folder:
                model.pipeline.save_pretrained(folder)
                _write_card(settings, folder)
            say(f"{settings.path}: a whole pipeline, {base.dtype}")
        return settings.path
    started = [] if whole else _started_from(base, say)
    base = replace(base, adapter=())
    model = load(base)
    loras = [(_extracted(model, base, source, settings, say), settings.strength)] if whole else []
    for path, weight in ([] if whole else [(source, settings.strength)]) + started + list(others):
        lora, words = read_lora_of(path, model)
        say(f"{path}: {words}")
        if (path, weight) in started:  # what it has of the other expert is in the source, too
            lora = {name: part for name, part in lora.items() if name not in other_part(lora, model)}
        loras.append((lora, weight))
    lora = _combined(loras, model, settings, say)
    _write_lora(lora if settings.dtype is None else _cast(lora, DTYPES[settings.dtype]), model, settings, say)
    return settings.path


def _cast(lora: Lora, dtype: torch.dtype) -> Lora:
    return {
        component: {
            name: replace(
                one,
                down=one.down.to(dtype),
                up=one.up.to(dtype),
                magnitude=None if one.magnitude is None else one.magnitude.to(dtype),
            )
            for name, one in modules.items()
        }
        for component, modules in lora.items()
    }


def _check(settings: Export) -> None:
    if settings.to not in FORMATS:
        raise unknown("format (--to)", settings.to, FORMATS)
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise unknown("--dtype", settings.dtype, DTYPES)
    if settings.rank is not None and settings.to in ("merged", "single-file"):
        raise UserError(f"--rank with --to {settings.to}: there is no LoRA in it; allowed: leave --rank out")
    path = settings.path
    if path.is_dir() and settings.to in FILES:
        raise UserError(f"{path} is a folder; allowed: a .safetensors file or the folder that it goes into")
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not settings.overwrite:
        raise UserError(f"{path} is there already; allowed: another --output, or --overwrite")


def _merged(
    base: ModelConfig,
    source: Path,
    whole: bool,
    settings: Export,
    others: Sequence[tuple[Path, float]],
    say: Callable[[str], None],
) -> LoadedModel:
    """Return the model with all adapters folded into its weights."""
    model = _whole_model(base, source) if whole else load(base)
    if whole and settings.strength != 1:
        before: Any = load(base).network.state_dict()
        with torch.no_grad():
            for name, tensor in model.network.state_dict().items():
                old = before[name].float()
                tensor.copy_(old + settings.strength * (tensor.float() - old))
    loras = []
    for path, weight in ([] if whole else [(source, settings.strength)]) + list(others):
        lora, words = read_lora_of(path, model)
        say(f"{path}: {words}; merged at {weight:g}")
        loras.append((lora, weight))
    if loras:
        merge_into(model, loras)
    return model


def holds_whole(source: Path) -> bool:
    """Return whether a source of an export is a whole pipeline, or a checkpoint of all weights."""
    run = run_of(source) if is_checkpoint(source) else None
    return (source / "model_index.json").is_file() or (run is not None and run.model.train == "full")


def adapter_of(path: Path) -> Path:
    """Return the LoRA of a run directory, or the path itself."""
    path = path.expanduser()
    return path / "aligned" if (path / "aligned").is_dir() else path


def _whole_model(base: ModelConfig, source: Path) -> LoadedModel:
    """Return the model with all its trained weights, in ``base.dtype``."""
    if not is_checkpoint(source):
        return load(_whole_config(base, source))
    model = load(base)
    load_checkpoint(model, source)
    model.network.to(DTYPES[base.dtype])
    return model


def _whole_config(base: ModelConfig, folder: Path) -> ModelConfig:
    bare = replace(base, path=str(folder), family="auto", revision=None, variant=None)
    return replace(bare, vae=None, motion_adapter=None, adapter=())


def _started_from(base: ModelConfig, say: Callable[[str], None]) -> list[tuple[Path, float]]:
    """Return the LoRAs under the policy (``model.adapter``), which are not in another program's base model.

    Raises:
        UserError: one of them is no LoRA here.
    """
    found = []
    for spec in changing(base.adapter, base.expert):
        path = adapter_of(Path(spec))
        if not is_lora(path) and not is_checkpoint(path):
            raise UserError(
                f"the run started from {spec!r}, which is no LoRA's file or folder here, so that no LoRA "
                "holds both; allowed: --to merged or single-file"
            )
        say(f"the run started from {spec}: it is added to the LoRA")
        found.append((path, 1.0))
    return found


def _extracted(
    model: LoadedModel, base: ModelConfig, source: Path, settings: Export, say: Callable[[str], None]
) -> Lora:
    """Return the LoRA nearest to the change of a fully trained network."""
    rank = settings.rank or EXTRACTED_RANK
    tuned = _whole_model(base, source).network
    before: Any = {name: module.weight for name, module in modules_of(model.network).items()}
    after: Any = {name: module.weight for name, module in modules_of(tuned).items()}
    with torch.no_grad():
        modules, error = extracted(before, after, rank)
    if not modules:
        raise UserError(f"{source}: its weights are those of {model.source}: there is no change to extract")
    old = model.network.state_dict()
    held = {f"{name}.weight" for name in before}
    rest = {name: tensor for name, tensor in tuned.state_dict().items() if name not in held}
    left = [name for name, tensor in rest.items() if not torch.equal(tensor, old[name])]
    say(
        f"extracted a LoRA of rank {rank} from {len(modules)} modules: {error:.1%} of the change is lost (of "
        f"its norm); {len(left)} changed tensors that are no matrix (biases, norms) are left out"
    )
    return {model.family.network_name: modules}


def _combined(
    loras: Sequence[tuple[Lora, float]], model: LoadedModel, settings: Export, say: Callable[[str], None]
) -> Lora:
    dora = any(has_dora(lora) for lora, _ in loras)
    if settings.rank is None:
        return mix(loras)
    weights: Any = {
        component: {
            name: module.weight for name, module in modules_of(getattr(model.pipeline, component)).items()
        }
        for component in {c for lora, _ in loras for c in lora}
    }
    plain: list[tuple[Lora, float]] = []
    if dora:  # a DoRA's change is not the product of its factors: compute it first
        say("a DoRA: the nearest plain LoRA of its whole change is extracted")
    for lora, weight in loras:
        with torch.no_grad():
            plain.append((reduced(lora, settings.rank, weights)[0] if has_dora(lora) else lora, weight))
    result, error = reduced(mix(plain), settings.rank, weights)
    say(f"rank {settings.rank}: {error:.2%} of the adapters' change is lost (of its norm)")
    return result


def _write_lora(lora: Lora, model: LoadedModel, settings: Export, say: Callable[[str], None]) -> None:
    path = settings.path
    if settings.to == "diffusers":
        if not has_lora_loader(model.family):
            kind = model.family.network_class
            raise UserError(
                f"--to diffusers: diffusers has no LoRA loader for {kind}; allowed: --to comfyui or merged, "
                "or the run's aligned/, which peft loads"
            )
        with atomic_folder(path) as folder:
            write_diffusers(lora, model, folder, settings.title)
            _write_card(settings, folder)
    else:
        for where, (part, _) in by_file(lora, model).items():
            file = path.with_stem(f"{path.stem}_{where}") if where else path
            if where and file.is_file() and not settings.overwrite:
                raise UserError(f"{file} is there already; allowed: another --output, or --overwrite")
            _write_lora_file(part, model, settings, file, say)
        return
    count = sum(len(modules) for modules in lora.values())
    say(f"{path}: a LoRA of {count} modules in the layout of {settings.to}")


def _write_lora_file(
    lora: Lora, model: LoadedModel, settings: Export, path: Path, say: Callable[[str], None]
) -> None:
    """Write one file in kohya's or ComfyUI's layout, of two experts that of one."""
    state = (kohya_state if settings.to == "kohya" else comfyui_state)(lora, model)
    if settings.to == "kohya" and (dropped := dropped_by_diffusers(state, lora, model)):
        say(f"diffusers' own reader of this layout overlooks {len(dropped)} modules, such as {dropped[0]}")
    save(state, path, lora_metadata(lora, model, settings.title))
    count = sum(len(modules) for modules in lora.values())
    say(f"{path}: a LoRA of {count} modules in the layout of {settings.to}")


def _write_card(settings: Export, folder: Path) -> None:
    if settings.card_text:
        (folder / "README.md").write_text(settings.card_text, encoding="utf-8")
