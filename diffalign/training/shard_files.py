"""Files of sharded tensors (``torch.distributed.checkpoint``).

Each process writes its own part; any number of processes, also a single one, can read the tensors.

Tensors are named ``trainable/NAME``, ``ema/NAME``, ``kept/NAME`` and ``optimizer/NUMBER/KEY``.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from diffalign.errors import UserError
from diffalign.training.snapshot import Snapshot

FOLDER = "shards"


def write(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot's tensors (a collective operation)."""
    from torch.distributed.checkpoint.state_dict_saver import save

    with _quiet():
        save(_tensors(snapshot), checkpoint_id=folder)


def filled(
    snapshot: Snapshot,
    trainable: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
) -> Snapshot:
    """Return a snapshot with the tensors of ``snapshot.shards``, sharded like those of this run.

    It is a collective operation. Names that the files lack are left out; the caller reports them.

    Raises:
        UserError: the shape of a tensor differs between files and run, or the files are damaged.
    """
    assert snapshot.shards is not None
    stored = _stored(snapshot.shards)
    target: dict[str, Tensor] = {}
    for kind, tensors in (("trainable", trainable), ("kept", kept), ("ema", ema)):
        target |= {
            f"{kind}/{k}": torch.empty_like(t.detach()) for k, t in tensors.items() if f"{kind}/{k}" in stored
        }
    for number, parameter in enumerate(trainable.values()):
        for key, (shape, dtype) in stored.items():
            if key.startswith(f"optimizer/{number}/"):
                like = parameter.detach()
                same = shape == tuple(like.shape)
                target[key] = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(shape, dtype=dtype)
    for key, tensor in target.items():
        if tuple(tensor.shape) != stored[key][0]:
            raise UserError(
                f"the checkpoint's {key} has shape {stored[key][0]}, this run's {tuple(tensor.shape)}; "
                "allowed: a checkpoint of a run with the same model"
            )
    _read(target, snapshot.shards)
    parts: dict[str, dict[str, Tensor]] = {"trainable": {}, "kept": {}, "ema": {}, "optimizer": {}}
    for key, tensor in target.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = tensor
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts.pop("optimizer").items():
        number_text, _, key = name.partition("/")
        state.setdefault(int(number_text), {})[key] = tensor
    return replace(
        snapshot,
        trainable=parts["trainable"],
        kept=parts["kept"],
        ema=parts["ema"],
        optimizer={**snapshot.optimizer, "state": state},
        shards=None,
    )


def read(folder: Path, kind: str) -> dict[str, Tensor]:
    """Return the tensors of one kind ("trainable", "ema"), unsharded, on the CPU; not a collective.

    Raises:
        UserError: the files are damaged.
    """
    stored = {key: at for key, at in _stored(folder).items() if key.startswith(f"{kind}/")}
    target = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in stored.items()}
    _read(target, folder, alone=True)
    return {key.partition("/")[2]: tensor for key, tensor in target.items()}


def kinds(folder: Path) -> set[str]:
    """Return the kinds of tensors ("trainable", "ema", ...) that a folder holds."""
    return {key.partition("/")[0] for key in _stored(folder)}


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    tensors_by_name = {
        f"{kind}/{name}": tensor.detach()
        for kind, tensors in (
            ("trainable", snapshot.trainable),
            ("ema", snapshot.ema),
            ("kept", snapshot.kept),
        )
        for name, tensor in tensors.items()
    }
    for number, state in snapshot.optimizer["state"].items():
        tensors_by_name |= {f"optimizer/{number}/{key}": value for key, value in state.items()}
    return tensors_by_name


def _stored(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each tensor in a folder, by name; UserError where it is damaged."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    with _damage_told(folder):
        metadata: Any = FileSystemReader(folder).read_metadata()
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }


def _read(target: dict[str, Tensor], folder: Path, alone: bool = False) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    together = distributed.is_available() and distributed.is_initialized() and not alone
    with _quiet(), _damage_told(folder):
        load(target, checkpoint_id=folder, no_dist=not together)


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    """Turn errors of reading into one that names the folder, and the file where torch names it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder} is damaged: {_why(failure)}") from error
    except Exception as error:  # a damaged file ends in any error of pickle, zipfile or torch
        raise UserError(f"{folder} is damaged: {_why(error)}") from error


def _why(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warning on reading without a process group, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        yield
