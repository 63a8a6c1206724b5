"""The files of a checkpoint, read and checked: each that cannot be used is named with the reason."""

import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.utils.text import read_json_object

FORMAT = 1


class IncompleteError(Exception):
    """A checkpoint that cannot be read; says which file and why."""


def read_state(path: Path) -> dict[str, Any]:
    """Return ``state.json`` of a checkpoint's folder, whose other files have the sizes and sums in it.

    Raises:
        IncompleteError: a file is missing or damaged.
        UserError: another format.
    """
    try:
        state = read_json_object(path / "state.json")
    except UserError as error:
        raise IncompleteError(f"state.json: {error}") from error
    if state.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {state.get('format')!r}; this diffalign reads {FORMAT}"
        )
    kinds = {"step": int, "facts": dict, "fingerprint": dict, "files": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]:
        raise IncompleteError(f"state.json: {wrong[0]} is {str(state.get(wrong[0]))[:40]!r}")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in state["files"].values()):
        raise IncompleteError("state.json: files lack their sizes and checksums")
    for name, (size, expected) in state["files"].items():
        file = path / name
        if not file.is_file():
            raise IncompleteError(f"{name} is missing")
        if file.stat().st_size != size:
            raise IncompleteError(f"{name} has {file.stat().st_size} bytes, not {size}")
        if checksum(file) != expected:
            raise IncompleteError(f"the contents of {name} have changed")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; IncompleteError where it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise IncompleteError(f"{path.name}: {error}") from error


def read_optimizer(path: Path) -> dict[str, Any]:
    """Return an optimizer's state; IncompleteError where the file alone tells that it is none."""
    try:
        optimizer = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in any error of pickle, zipfile or torch
        raise IncompleteError(f"{path.name}: {_first_line(error)}") from error
    kinds = {"state": dict, "param_groups": list}
    if not isinstance(optimizer, dict) or any(not isinstance(optimizer.get(k), v) for k, v in kinds.items()):
        raise IncompleteError(f"{path.name} holds no state of an optimizer")
    return optimizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
