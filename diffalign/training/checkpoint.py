"""Checkpoints: folders ``<folder>/step-N`` with the state that resuming needs, without frozen weights.

    trainable.safetensors  trained parameters
    ema.safetensors        their moving average, if there is one
    kept.safetensors       other tensors that change (a reference that is updated), if there are any
    optimizer.pt           state of the optimizer
    state.json             counters, guard, meter, scaler, settings; sizes and checksums of the other files

If weights are sharded over processes (``training.shard``), all tensors are in ``shards/``, one file per
process, which any number of processes can read; ``optimizer.pt`` then holds no moments.

A folder is written under a temporary name, flushed to the disk and renamed, so ``step-N`` is complete or
absent. Folders of later steps (the run went on from an earlier one) and the oldest beyond the limit are
removed afterwards.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.errors import UserError
from diffalign.training import shard_files
from diffalign.training.checkpoint_files import (
    FORMAT,
    IncompleteError,
    checksum,
    read_optimizer,
    read_state,
    read_tensors,
)
from diffalign.training.snapshot import Snapshot as Snapshot

LENGTH = {"training.steps", "training.epochs"}
"""Settings that a fingerprint holds only where the learning rate depends on them."""


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the differences of two fingerprints, one sentence per setting.

    The length is compared where both have it; where one has not, their schedules differ, which is named.
    """
    one_sided = saved.keys() ^ current.keys()
    return [
        f"{key} is {saved.get(key, 'unset')!r} in the checkpoint and {current.get(key, 'unset')!r} now"
        for key in sorted((saved.keys() | current.keys()) - (LENGTH & one_sided))
        if saved.get(key) != current.get(key)
    ]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: folder ``<output>/checkpoints``.
        limit: largest number of checkpoints; 0: no limit.
        fingerprint: settings that must be equal on resume (function ``fingerprint``).
        compare: (saved fingerprint, this run's) -> differences that forbid resuming, in sentences.
        content: digests of data and model, saved in every checkpoint; filled in once they are known.
        tell: gets a line on each damaged checkpoint that "latest" passes over.
    """

    folder: Path
    limit: int = 2
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    compare: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]] = differences
    content: dict[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in ascending order, complete or not."""
        names = [p.name for p in self.folder.iterdir() if p.is_dir()] if self.folder.is_dir() else []
        numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def start(self, resume: str | None, overwrite: bool = False) -> Snapshot | None:
        """Return the checkpoint that ``resume`` names (see ``load``), or None for a fresh run.

        "latest" without any checkpoint is a fresh run, so that one command line works for the first start and
        for restarts.

        Args:
            resume: "latest", a name, a folder, or None.
            overwrite: whether a fresh run replaces an earlier one.

        Raises:
            UserError: as ``load``; or a fresh run whose folder has checkpoints of an earlier run.
        """
        if resume == "latest" and not self.steps():
            return None
        if resume is not None:
            snapshot = self.load(resume)
            if resume != "latest" and (later := [step for step in self.steps() if step > snapshot.step]):
                self.tell(
                    f"resume={resume}: {self.folder} has {_named(later)} too, removed when the run, which "
                    f"goes on from step {snapshot.step}, saves its next checkpoint; allowed: copies of them, "
                    "or another --output, to have both"
                )
            return snapshot
        if self.steps() and not overwrite:
            raise UserError(
                f"{self._available()} of an earlier run: continue it with --resume latest, write over it "
                "with --overwrite true, or choose another --output"
            )
        return None

    def save(self, snapshot: Snapshot, accelerator: Accelerator | None = None) -> Path:
        """Write ``step-N``, then remove checkpoints of later steps, and the oldest ones beyond the limit.

        One process calls it; for a snapshot with sharded tensors all do (a collective operation).

        Args:
            snapshot: the snapshot.
            accelerator: accelerator of the run; None: there is one process.

        Raises:
            UserError: the disk is full or the folder cannot be written; earlier checkpoints are intact.
        """
        final = self.folder / f"step-{snapshot.step}"
        partial = self.folder / f".step-{snapshot.step}.partial"
        alone = accelerator is None or not snapshot.sharded
        first = alone or accelerator is None or accelerator.is_main_process
        wait = (lambda: None) if alone or accelerator is None else accelerator.wait_for_everyone
        try:
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            wait()
            if snapshot.sharded:
                shard_files.write(snapshot, partial / shard_files.FOLDER)
            wait()
            if first:
                _write(partial, snapshot, _plain(self.fingerprint), self.content)
                # an older step-N of a run that was resumed from before it holds the same values
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                _flush(self.folder)
                self._remove_others(snapshot.step)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {final}: {error}") from error
        wait()
        return final

    def _remove_others(self, newest: int) -> None:
        """Remove checkpoints after ``newest``, which "latest" would take for this run's, and then the oldest
        beyond the limit.
        """
        if later := [step for step in self.steps() if step > newest]:
            self._remove(later)
            self.tell(
                f"checkpoints: removed {_named(later)}, made before the run went on from a step before them"
            )
        if self.limit:
            self._remove([s for s in self.steps() if s != newest][: -(self.limit - 1) or None])

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            shutil.rmtree(self.folder / f"step-{step}")

    def load(self, which: str) -> Snapshot:
        """Return a checkpoint.

        Args:
            which: "latest" for the newest complete one, the name of one (``step-500``), or a folder. ``tell``
                gets a line on each newer one than the newest complete one.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or its settings differ.
        """
        if which == "latest":
            return self._load_latest()
        path = Path(which) if Path(which).is_dir() else self.folder / which
        if not path.is_dir():
            raise UserError(f"no checkpoint {which!r}; {self._available()}")
        try:
            return self._load(path)
        except IncompleteError as error:
            raise UserError(f"checkpoint {path} is damaged: {error}; {self._available()}") from error

    def _load_latest(self) -> Snapshot:
        damaged: list[str] = []
        for step in reversed(self.steps()):
            path = self.folder / f"step-{step}"
            try:
                snapshot = self._load(path)
            except IncompleteError as error:
                damaged.append(f"checkpoint {path} is damaged: {error}")
                continue
            for line in damaged:
                self.tell(f"warning: {line}; it is ignored, and the run goes on from step-{step}")
            return snapshot
        why = "".join(f"{line}; " for line in damaged)
        raise UserError(f"no complete checkpoint to resume from; {why}{self._available()}")

    def _load(self, path: Path) -> Snapshot:
        state = read_state(path)
        differing = self.compare(state["fingerprint"], _plain(self.fingerprint))
        if differing:
            raise UserError(
                f"checkpoint {path} was made with other settings: {'; '.join(differing)}; allowed: the same "
                "settings, or --resume.allow with the names of those that may change"
            )
        present, facts, content = state["files"], state["facts"], state.get("content", {})
        optimizer = read_optimizer(path / "optimizer.pt")
        if any(name.startswith(f"{shard_files.FOLDER}/") for name in present):
            shards = path / shard_files.FOLDER
            return Snapshot(state["step"], {}, {}, optimizer, facts, content=content, shards=shards)
        trainable, ema, kept = (
            read_tensors(path / name) if name in present or needed else {}
            for name, needed in (
                ("trainable.safetensors", True),
                ("ema.safetensors", False),
                ("kept.safetensors", False),
            )
        )
        return Snapshot(state["step"], trainable, ema, optimizer, facts, kept, content)

    def _available(self) -> str:
        return f"{self.folder} has {_named(self.steps()) or 'no checkpoints'}"


def _named(steps: Iterable[int]) -> str:
    return ", ".join(f"step-{step}" for step in steps)


def read_trained(folder: Path) -> dict[str, Tensor]:
    """Return the weights that a checkpoint's run exports, by name, unsharded, on the CPU.

    They are the moving average if there is one, otherwise the trained parameters.

    Raises:
        OSError: a file is missing or cannot be read.
        SafetensorError: a file is damaged.
    """
    shards = folder / shard_files.FOLDER
    if shards.is_dir():
        return shard_files.read(shards, "ema" if "ema" in shard_files.kinds(shards) else "trainable")
    return load_file(next(folder / name for name in TRAINED if (folder / name).is_file()))


TRAINED = ("ema.safetensors", "trainable.safetensors")
"""Files of a checkpoint with trained parameters; averaged ones come first, as in ``aligned/``."""


def fingerprint(
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    processes: int,
    ignore: Iterable[str] = (),
    **sections: Any,
) -> dict[str, Any]:
    """Return the settings that must be equal on resume, by dotted key.

    Args:
        training: section of the loop. ``training.steps`` and ``training.epochs`` may change if the learning
            rate does not depend on them.
        optimizer: section of the optimizer.
        processes: number of ranks.
        ignore: dotted keys that may change (``data.cache_dir``, ``data.workers``, ...).
        **sections: further dataclasses or mappings by name: ``method``, ``model``, ``data``.
    """
    flat = flatten({"training": training, "optimizer": optimizer, "processes": processes, **sections})
    free = set(ignore) | (LENGTH if optimizer.schedule == "constant" else set())
    return {key: value for key, value in flat.items() if key not in free}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a tree of dataclasses and mappings as a mapping by dotted key."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON returns them (tuples become lists), to compare them with saved ones."""
    return json.loads(json.dumps(dict(values), default=str))


def _write(folder: Path, snapshot: Snapshot, settings: Mapping[str, Any], content: Mapping[str, str]) -> None:
    optimizer = dict(snapshot.optimizer)
    if snapshot.sharded:
        optimizer["state"] = {}  # the shards hold it
    else:
        save_file(_on_cpu(snapshot.trainable), folder / "trainable.safetensors")
        if snapshot.ema:
            save_file(_on_cpu(snapshot.ema), folder / "ema.safetensors")
        if snapshot.kept:
            save_file(_on_cpu(snapshot.kept), folder / "kept.safetensors")
    torch.save(optimizer, folder / "optimizer.pt")
    written = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {p.relative_to(folder).as_posix(): [p.stat().st_size, checksum(p)] for p in written}
    state = {
        "format": FORMAT,
        "step": snapshot.step,
        "facts": snapshot.facts,
        "fingerprint": settings,
        "content": dict(content),
        "files": files,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk; not for folders on Windows, where they cannot be opened."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
