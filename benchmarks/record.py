"""Rows on disk: one file each, written whole, so that runs resume and several processes share the work.

A row is known by its name and carries what it was asked (``asked``: settings, prompts, budget). A row that
was asked something else is stale and is made anew. While a process works on a row it holds the row's lock,
which the system takes back if the process dies.

Rows made under other versions of torch (``versions``) have means that differ from about the seventh digit on:
whether a change of the code leaves a row as it is shows under one version, with the code before and after it.
"""

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.evaluation.measuring.statistics import Estimate
from diffalign.utils.files import write_atomic

HERE = Path(__file__).parent
WORK = Path("runs/benchmarks")  # caches, locks and runs: nothing that a table is made from
RESAMPLES = 10_000

Row = dict[str, Any]


@contextmanager
def lock(name: str, wait: bool = True) -> Iterator[bool]:
    """Whether this process holds the lock ``name``; without ``wait`` it does not if another one does."""
    path = WORK / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def known(name: str, asked: Mapping[str, Any]) -> Row | None:
    """Return the row ``name`` if its settings are the same."""
    path = HERE / "rows" / f"{name}.json"
    if not path.exists():
        return None
    row: Row = json.loads(path.read_text(encoding="utf-8"))
    return row if agrees(row["asked"], asked) else None


def keep(name: str, asked: Mapping[str, Any], row: Mapping[str, Any]) -> Row:
    """Write a row with when and where it was made."""
    whole = {"name": name, "asked": plain(asked), **row, **_made()}
    write_atomic(HERE / "rows" / f"{name}.json", json.dumps(whole, separators=(",", ":")) + "\n")
    return plain(whole)


def chosen(arms: str | None, every: Sequence[str]) -> Sequence[str]:
    """Return the names of ``--arms``, comma-separated; all without it. SystemExit names an unknown one."""
    names = arms.split(",") if arms else every
    for name in names:
        if name not in every:
            raise SystemExit(f"--arms {name}: allowed: {', '.join(every)}")
    return names


def rows(prefix: str) -> list[Row]:
    """Every row whose name starts with ``prefix``, by name."""
    files = sorted((HERE / "rows").glob(f"{prefix}*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def agrees(stored: Any, asked: Any) -> bool:
    """Whether a row's settings, as JSON has them, are these; an option that it does not know yet must be at
    its default, so that a new one leaves old rows valid, and a changed default does not.
    """
    if is_dataclass(asked) and not isinstance(asked, type):
        name, known = type(asked).__name__, stored
        if not isinstance(known, dict) or name not in known or known[name].keys() - _told(asked).keys():
            return False
        return all(
            agrees(known[name][f.name], getattr(asked, f.name))
            if f.name in known[name]
            else _default(asked, f)
            for f in _fields(asked)
        )
    if isinstance(asked, Mapping):
        return (
            isinstance(stored, dict)
            and stored.keys() == asked.keys()
            and all(agrees(stored[k], v) for k, v in asked.items())
        )
    if isinstance(asked, list | tuple):
        return (
            isinstance(stored, list)
            and len(stored) == len(asked)
            and all(agrees(a, b) for a, b in zip(stored, asked, strict=True))
        )
    return bool(stored == asked)


def same(a: Any, b: Any) -> bool:
    """Whether two rows' settings, as JSON has them, are the same wherever both know an option."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(same(a[k], b[k]) for k in a.keys() & b.keys())
    return bool(a == b)


def _fields(owner: Any) -> list[Field[Any]]:
    return [f for f in fields(owner) if f.compare]


def _told(owner: Any) -> dict[str, Any]:
    return {f.name: getattr(owner, f.name) for f in _fields(owner)}


def _default(owner: Any, field: Field[Any]) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(getattr(owner, field.name) == default)


def plain(value: Any) -> Any:
    """Return the form of a value in JSON; of a dataclass {its name: its fields}."""
    return json.loads(json.dumps(value, default=lambda owner: {type(owner).__name__: _told(owner)}))


def _made() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def over_seeds(gains: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Mean of gains (S, P) with a 95 % interval that resamples prompts and seeds, both with replacement.

    Every seed has the same prompts and noise, so a resampled prompt is resampled in all seeds at once.
    """
    table = np.asarray(gains, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"gains must be (seeds, prompts), got shape {table.shape}")
    low, high = np.quantile(_draws(table, seed, 1), [0.025, 0.975])
    return Estimate(float(table.mean()), float(low), float(high))


def between(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0
) -> tuple[Estimate, float]:
    """Return the mean of a - b of two methods' gains (S, P) and (R, P) on the same P prompts, with a 95 %
    interval and a two-sided p-value.

    A resampled prompt is resampled in both methods; their seeds are resampled apart, since a seed of one
    method has nothing to do with that of the other. The p-value inverts the percentile interval.
    """
    draws = _draws(a, seed, 1) - _draws(b, seed, 2)
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    value = float(np.mean(a) - np.mean(b))
    return Estimate(value, float(low), float(high)), float(min(1.0, 2 * max(tail, 1 / RESAMPLES)))


def ranks(gains: Sequence[Sequence[Sequence[float]]], seed: int = 0) -> list[tuple[int, int]]:
    """Return for each of M methods, gains (S, P) each on the same P prompts, the 95 % range of its rank (1 is
    best) over resampled prompts and seeds.
    """
    draws = np.stack([_draws(table, seed, 1 + i) for i, table in enumerate(gains)])
    places = 1 + (-draws).argsort(0).argsort(0)
    low, high = np.quantile(places, [0.025, 0.975], axis=1, method="closest_observation")
    return [(int(a), int(b)) for a, b in zip(low, high, strict=True)]


def _draws(gains: Any, seed: int, apart: int) -> Any:
    """Means (RESAMPLES,) of gains (S, P) over resampled prompts, the same for all, and seeds, its own."""
    table = np.asarray(gains, dtype=np.float64)
    seeds, prompts = table.shape
    return ((_resampled(prompts, seed) @ table.T) * _resampled(seeds, seed + apart)).sum(1)


@lru_cache(maxsize=64)
def _resampled(count: int, seed: int) -> Any:
    """Weights (RESAMPLES, count) of draws with replacement; a table asks for the same ones in every row."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return draws / count


def verdict(estimate: Estimate, better: str, worse: str) -> str:
    """Return the sign that an interval shows: above 0, below 0, or neither."""
    if estimate.low > 0:
        return better
    return worse if estimate.high < 0 else "no difference shown"


def shown(estimate: Estimate | Sequence[float], digits: int = 3) -> str:
    """``+0.123 [+0.100, +0.150]``."""
    value, low, high = estimate if isinstance(estimate, Sequence) else (
        estimate.value, estimate.low, estimate.high
    )  # fmt: skip
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
