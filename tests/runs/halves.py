"""A run of four steps against two runs of two."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.config.schema import Run
from diffalign.runs.align import Result, align


def silent(line: str) -> None:
    """Say nothing."""


def whole_as_halves(folder: Path, run_of: Callable[[Path], Run]) -> tuple[Result, dict[str, Tensor]]:
    """Run four steps at once and two by two, check that both leave the same weights, and return the result of
    the first and the weights.
    """
    whole = align(run_of(folder / "whole"), silent)
    half = run_of(folder / "half")
    align(replace(half, training=replace(half.training, steps=2)), silent)
    align(replace(half, resume="latest"), silent)
    paths = (folder / name / "checkpoints" / "step-4" / "trainable.safetensors" for name in ("whole", "half"))
    one, other = (load_file(path) for path in paths)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return whole, one
