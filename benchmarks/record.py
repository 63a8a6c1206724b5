"""Rows on disk: one file each, written atomically, so that runs resume and several processes share the work.

A row has a name and its settings (key ``asked``: method, data, prompts, budget). A row with other settings is
stale and made again. A process that works on a row holds its lock, which the system releases if the process
dies.

Means of rows made under different versions of torch (``versions``) differ from about the seventh digit on. To
test that a change of the code preserves a row, run both versions of the code under one version of torch.
"""

import fcntl
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
WORK = Path("runs/benchmarks")  # caches, locks and runs; tables need none of them
RESAMPLES = 10_000

Row = dict[str, Any]


@contextmanager
def lock(name: str, wait: bool = True) -> Iterator[bool]:
    """Yield whether this process holds the lock ``name``; without ``wait``, False if another process does."""
    path = WORK / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def known(name: str, settings: Mapping[str, Any]) -> Row | None:
    """Return the row ``name`` if it exists with these settings, else None."""
    path = HERE / "rows" / f"{name}.json"
    if not path.exists():
        return None
    row: Row = json.loads(path.read_text(encoding="utf-8"))
    return row if agrees(row["asked"], settings) else None


def keep(name: str, settings: Mapping[str, Any], row: Mapping[str, Any]) -> Row:
    """Write a row with its settings, date, machine and versions; return it as JSON stores it."""
    complete = {"name": name, "asked": plain(settings), **row, **_made()}
    write_atomic(HERE / "rows" / f"{name}.json", json.dumps(complete, separators=(",", ":")) + "\n")
    return plain(complete)


def chosen(arms: str | None, every: Sequence[str]) -> Sequence[str]:
    """Return the names of ``--arms``, comma-separated; all without it. SystemExit names an unknown one."""
    names = arms.split(",") if arms else every
    for name in names:
        if name not in every:
            raise SystemExit(f"--arms {name}: allowed: {', '.join(every)}")
    return names


def rows(prefix: str) -> list[Row]:
    """Return every row whose name starts with ``prefix``, sorted by name."""
    files = sorted((HERE / "rows").glob(f"{prefix}*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return rows by their arm, in their order; rows of no arm, such as the base's, are left out."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        if "arm" in row:
            arms.setdefault(row["arm"], []).append(row)
    return arms


def agrees(stored: Any, settings: Any) -> bool:
    """Return whether a row's stored settings (from JSON) equal ``settings``.

    An option that the row does not have must be at its default. So a new option leaves old rows valid, and a
    changed default makes them stale.
    """
    if is_dataclass(settings) and not isinstance(settings, type):
        name, known = type(settings).__name__, stored
        if not isinstance(known, dict) or name not in known or known[name].keys() - _values(settings).keys():
            return False
        return all(
            agrees(known[name][f.name], getattr(settings, f.name))
            if f.name in known[name]
            else _default(settings, f)
            for f in _fields(settings)
        )
    if isinstance(settings, Mapping):
        return (
            isinstance(stored, dict)
            and stored.keys() == settings.keys()
            and all(agrees(stored[k], v) for k, v in settings.items())
        )
    if isinstance(settings, list | tuple):
        return (
            isinstance(stored, list)
            and len(stored) == len(settings)
            and all(agrees(a, b) for a, b in zip(stored, settings, strict=True))
        )
    return bool(stored == settings)


def same(a: Any, b: Any) -> bool:
    """Return whether two rows' stored settings agree on every option that both have."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(same(a[k], b[k]) for k in a.keys() & b.keys())
    return bool(a == b)


def _fields(owner: Any) -> list[Field[Any]]:
    return [f for f in fields(owner) if f.compare]


def _values(owner: Any) -> dict[str, Any]:
    return {f.name: getattr(owner, f.name) for f in _fields(owner)}


def _default(owner: Any, field: Field[Any]) -> bool:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return bool(getattr(owner, field.name) == default)


def plain(value: Any) -> Any:
    """Return a value as JSON stores it; a dataclass becomes {its name: its fields}."""
    return json.loads(json.dumps(value, default=lambda owner: {type(owner).__name__: _values(owner)}))


def _made() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def over_seeds(gains: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Return the mean of gains (S, P) with a 95 % interval by a bootstrap over prompts and seeds.

    All seeds have the same prompts and noise, so prompts are resampled jointly in all seeds.
    """
    table = np.asarray(gains, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"gains must be (seeds, prompts), got shape {table.shape}")
    low, high = np.quantile(_draws(table, seed, 1), [0.025, 0.975])
    return Estimate(float(table.mean()), float(low), float(high))


def between(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0
) -> tuple[Estimate, float]:
    """Return the mean of a - b for two methods' gains (S, P) and (R, P) on the same P prompts.

    It comes with a 95 % interval and a two-sided p-value, which inverts the percentile interval. Prompts are
    resampled jointly in both methods, seeds independently, since the methods' seeds are unrelated.
    """
    draws = _draws(a, seed, 1) - _draws(b, seed, 2)
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    value = float(np.mean(a) - np.mean(b))
    return Estimate(value, float(low), float(high)), float(min(1.0, 2 * max(tail, 1 / RESAMPLES)))


def ranks(gains: Sequence[Sequence[Sequence[float]]], seed: int = 0) -> list[tuple[int, int]]:
    """Return the 95 % range of each method's rank (1 is best) over resampled prompts and seeds.

    ``gains`` has the gains (S, P) of each of M methods on the same P prompts.
    """
    draws = np.stack([_draws(table, seed, 1 + i) for i, table in enumerate(gains)])
    places = 1 + (-draws).argsort(0).argsort(0)
    low, high = np.quantile(places, [0.025, 0.975], axis=1, method="closest_observation")
    return [(int(a), int(b)) for a, b in zip(low, high, strict=True)]


def _draws(gains: Any, seed: int, offset: int) -> Any:
    """Return means (RESAMPLES,) of gains (S, P): prompts resampled by ``seed``, seeds by seed + offset."""
    table = np.asarray(gains, dtype=np.float64)
    seeds, prompts = table.shape
    return ((_resampled(prompts, seed) @ table.T) * _resampled(seeds, seed + offset)).sum(1)


@lru_cache(maxsize=64)
def _resampled(count: int, seed: int) -> Any:
    """Return the weights (RESAMPLES, count) of draws with replacement; cached, since all rows share them."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return draws / count


def verdict(estimate: Estimate, better: str, worse: str) -> str:
    """Return ``better`` if an interval lies above 0, ``worse`` if below, else "no difference shown"."""
    if estimate.low > 0:
        return better
    return worse if estimate.high < 0 else "no difference shown"


def shown(estimate: Estimate | Sequence[float], digits: int = 3) -> str:
    """Return an estimate as text: ``+0.123 [+0.100, +0.150]``."""
    value, low, high = estimate if isinstance(estimate, Sequence) else (
        estimate.value, estimate.low, estimate.high
    )  # fmt: skip
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
