"""Several preference sets as one (``data.mix``), each with a weight relative to that of ``data.path``, 1.

A weight is the number of times that an epoch visits a row: 2 twice, 0.5 every second row, drawn by seed, set
and row. Images and prompts of copies are encoded once. The settings of the data section hold for
every set; ``data.limit`` for each on its own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import Example, Preferences, Skipped
from diffalign.diffusion.randomness import derive
from diffalign.errors import UserError

Read = Callable[[DataConfig, int], Preferences]


def mixed(config: DataConfig, seed: int, read: Read) -> Preferences:
    """Return the rows of all sets, one set after the other; ``read`` reads one.

    Raises UserError for an entry that is not PATH=WEIGHT, a weight that is not above 0, and what ``read``
    raises.
    """
    weights = [1.0, *(_weight(entry) for entry in config.mix)]
    paths = [config.path, *(entry.rpartition("=")[0] for entry in config.mix)]
    sets = [read(replace(config, path=path, mix=()), seed) for path in paths]
    parts = list(zip(sets, weights, strict=True))

    def rows() -> Iterator[Example | Skipped]:
        for part, weight in parts:
            for number, row in enumerate(part.rows()):
                copies = 1 if isinstance(row, Skipped) else _copies(weight, seed, part.name, number)
                yield from [row] * copies

    marks = [part.fingerprint for part in sets]
    mark = " + ".join(f"{m} x {w}" for m, w in zip(marks, weights, strict=True)) if all(marks) else None
    name = " + ".join(part.name if weight == 1 else f"{part.name} x {weight:g}" for part, weight in parts)
    total = sum(part.total or 0 for part in sets) if all(weight == 1 for weight in weights) else None
    total = total if all(part.total is not None for part in sets) else None
    return Preferences(name, rows, total, f"{mark} seed {seed}" if mark else None)


def _weight(entry: str) -> float:
    path, _, text = entry.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not path or not 0 < weight < math.inf:
        raise UserError(f"data.mix: {entry!r}; allowed: PATH=WEIGHT, a weight above 0, such as hpd.jsonl=0.5")
    return weight


def _copies(weight: float, seed: int, name: str, number: int) -> int:
    """Return the number of copies of a row: the weight rounded down, and one more for a share of the rows."""
    whole = math.floor(weight)
    return whole + (derive(seed, "mix", name, number) < (weight - whole) * 2**63)
