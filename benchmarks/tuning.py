"""The leaderboard's tuning: the same number of trials for every method, on validation prompts.

    python -m benchmarks.methods --tune inpo,dpo

Validation and test captions are disjoint by hash (``tiny.prompts``). A trial trains the shipped tiny recipe
with changed settings at the leaderboard's compute, with a seed that no row has. Every method has ``TRIALS``
trials: five strengths (``STRENGTHS``, multiples of the recipe's) at the recipe's learning rate, then three
learning rates (``RATES``) at the best strength; a method without a strength has eight learning rates. The
best of eight looks better than it is, and seeds differ as much as good settings do, so the ``FINALISTS`` best
trials are run again with ``FINAL_SEEDS``. The leaderboard's rows are trained with the finalist of the highest
mean gain over its seeds. All trials are recorded in ``benchmarks/tuning.json``, from which the sensitivity
curves are made. A changed recipe is tuned again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import record, tiny_world
from diffalign.config.io import to_dict
from diffalign.methods import build
from diffalign.utils.files import write_atomic

PROMPTS, SEED = 160, 100
TRIALS = 8
FINALISTS, FINAL_SEEDS = 3, (101, 102)
RUNS = TRIALS + FINALISTS * len(FINAL_SEEDS)  # trainings of a method before its rows
STRENGTHS = (1.0, 0.25, 4.0, 0.0625, 16.0)
RATES = (0.5, 2.0, 0.25)
RATES_ALONE = (1.0, 0.5, 2.0, 0.25, 4.0, 0.125, 8.0, 0.0625)
STRENGTH_FIELDS = ("beta", "scale", "margin", "hold", "kl", "clip")
"""Fields that limit how far a policy moves; the first that a method has is its strength."""

Trial = dict[str, Any]


def strength(fields: Mapping[str, Any]) -> str | None:
    """Return the field of a method that is tuned in addition to the learning rate, or None."""
    numbers = (name for name in STRENGTH_FIELDS if isinstance(fields.get(name), int | float))
    return next((name for name in numbers if fields[name]), None)


def trials(method: str, world: str, gain: Callable[[list[str]], float]) -> Iterator[list[str]]:
    """Yield the flags of each trial; an empty list is the recipe as shipped.

    Args:
        method: name of the method.
        world: world of the recipe.
        gain: returns the gain of a finished trial with these flags.
    """
    run = to_dict(tiny_world.recipe(method, world=world))
    fields, rate = vars(build(run["method"])), run["optimizer"]["learning_rate"]
    rates = lambda factors: [_flag("optimizer.learning_rate", rate, factor) for factor in factors]  # noqa: E731
    name = strength(fields)
    if name is None:
        yield from rates(RATES_ALONE)
        return
    strengths = [_flag(f"method.{name}", fields[name], factor) for factor in STRENGTHS]
    yield from strengths
    best = max(strengths, key=gain)
    yield from ([*best, *flag] for flag in rates(RATES))


def _flag(place: str, value: float, factor: float) -> list[str]:
    return [] if factor == 1 else [f"--{place}={value * factor:g}"]


def tune(method: str, world: str, say: Callable[[str], None]) -> None:
    """Run every trial of a method that is not recorded, then those of the finalists with further seeds.

    Concurrent processes wait for a trial that the next one depends on.
    """
    every = []
    for flags in trials(method, world, lambda flags: _recorded(method, world, flags)["gain"][0]):
        every.append(_tried(method, world, flags, SEED, say))
    for seed in FINAL_SEEDS:
        for finalist in _best(every):
            _tried(method, world, finalist["flags"], seed, say)


def _tried(method: str, world: str, flags: Sequence[str], seed: int, say: Callable[[str], None]) -> Trial:
    """Return a trial, recorded or run."""
    run, settings = _run_and_settings(method, world, flags, seed)
    name = _digest(method, world, settings, seed)
    with record.lock(f"trial-{name}"):
        if (known := _by_name().get(name)) is not None:
            return known
        figures = tiny_world.run(f"trial-{name}", run, "validation", PROMPTS)
        gains = {reward: r["gain"] for reward, r in figures["rewards"].items()}
        trial = {"trial": name, "world": world, "method": method, "flags": list(flags), "seed": seed}
        trial |= {"gain": gains.pop(figures["primary"]), "not trained on": gains}
        trial |= {**{k: figures[k] for k in ("steps", "seconds")}, "asked": settings}
        _add(trial)
        words = f"{world} {method} {' '.join(flags) or '(as shipped)'}"
        say(f"{words}{'' if seed == SEED else f', seed {seed}'}: {record.shown(trial['gain'])}")
        return trial


def _best(every: Sequence[Trial]) -> list[Trial]:
    return sorted(every, key=lambda trial: -trial["gain"][0])[:FINALISTS]


def _recorded(method: str, world: str, flags: Sequence[str], seed: int = SEED) -> Trial:
    """Return a trial of the current recipe. KeyError: it is not recorded."""
    name = _digest(method, world, _run_and_settings(method, world, flags, seed)[1], seed)
    return _by_name()[name]


def _by_name() -> dict[str, Trial]:
    return {trial["trial"]: trial for trial in tried()}


def chosen(method: str, world: str) -> list[list[Trial]]:
    """Return the finalists of a method, each a trial by seed, the best first; empty if any is missing."""
    recorded = lambda flags, seed=SEED: _recorded(method, world, flags, seed)  # noqa: E731
    try:
        every = [recorded(flags) for flags in trials(method, world, lambda flags: recorded(flags)["gain"][0])]
        finalists = [
            [trial, *(recorded(trial["flags"], seed) for seed in FINAL_SEEDS)] for trial in _best(every)
        ]
    except KeyError:
        return []
    return sorted(finalists, key=lambda seeds: -sum(trial["gain"][0] for trial in seeds))


def trials_of(world: str, method: str) -> list[Trial]:
    """Return the recorded trials of a method with the first seed, including those of earlier recipes."""
    return [t for t in first_trials() if (t["world"], t["method"]) == (world, method)]


def gains_of(world: str, method: str, flags: Sequence[str]) -> list[float]:
    """Return the mean gains of the trials with these flags, by seed."""
    key = (world, method, list(flags))
    found = [t for t in tried() if (t.get("world"), t["method"], t["flags"]) == key]
    return [t["gain"][0] for t in sorted(found, key=lambda t: t.get("seed", SEED))]


def first_trials() -> list[Trial]:
    """Return the recorded trials of all methods with the first seed, which every setting has."""
    return [t for t in tried() if "world" in t and t.get("seed", SEED) == SEED]


def at_edge(every: Sequence[Trial]) -> list[str]:
    """Return the settings whose best value is the lowest or highest of the tried values."""
    best = _settings(max(every, key=lambda t: t["gain"][0]))
    edges = []
    for place in sorted({place for t in every for place in _settings(t)}):
        values = [
            _settings(t)[place] for t in every if place in _settings(t)
        ]  # the recipe's value lies inside
        if best.get(place) in (min(values), max(values)):
            edges.append(place)
    return edges


def curves(every: Sequence[Trial]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return two curves of (multiple of the recipe's value, gain) of a method's trials, by the multiple.

    The first is by strength at the recipe's learning rate, the second by learning rate at the best strength.
    """
    shipped = next(t for t in every if not t["flags"])["asked"]
    (method,) = shipped["method"].values()
    rate = shipped["optimizer"]["OptimizerConfig"]["learning_rate"]
    alone = [t for t in every if "learning_rate" not in _settings(t)]
    strengths = [(next((v / method[k] for k, v in _settings(t).items()), 1.0), t["gain"][0]) for t in alone]
    best = max(alone, key=lambda t: t["gain"][0])
    rates = [(1.0, best["gain"][0])]
    rates += [
        (_settings(t)["learning_rate"] / rate, t["gain"][0]) for t in every if "learning_rate" in _settings(t)
    ]
    return sorted(strengths) if len(strengths) > 1 else [], sorted(rates)


def _settings(trial: Trial) -> dict[str, float]:
    """Return the changed settings of a trial, by the last part of their dotted names."""
    pairs = (flag.split("=") for flag in trial["flags"])
    return {place.rsplit(".", 1)[1]: float(value) for place, value in pairs}


def tried() -> list[Trial]:
    """Return every recorded trial."""
    path = record.HERE / "tuning.json"
    recorded: list[Trial] = json.loads(path.read_text())["trials"] if path.exists() else []
    return recorded


def _run_and_settings(method: str, world: str, flags: Sequence[str], seed: int) -> tuple[Any, Any]:
    run = tiny_world.recipe(method, flags, seed, world)
    return run, record.plain(tiny_world.settings_of(run, "validation", PROMPTS))


def _digest(method: str, world: str, settings: Any, seed: int) -> str:
    """Return the name of a trial; settings do not have the seed."""
    key = json.dumps([world, method, settings, *([seed] if seed != SEED else [])], sort_keys=True)
    return hashlib.blake2b(key.encode(), digest_size=6).hexdigest()


def _add(trial: Trial) -> None:
    with record.lock("tuning"):
        every = sorted(
            [*tried(), trial],
            key=lambda t: (t.get("world", ""), t["method"], t["flags"], t.get("seed", SEED), t["trial"]),
        )
        write_atomic(record.HERE / "tuning.json", json.dumps({"trials": every}, indent=1) + "\n")
