"""Settings of the tiny recipes: a small grid on validation prompts, never on those of the leaderboard.

    python -m benchmarks.methods --tune inpo

Validation captions differ from test captions by the hash that splits them (``tiny.prompts``). One seed,
other than the leaderboard's, at the leaderboard's compute. Each trial changes one setting of the shipped
recipe; what was tried is in ``benchmarks/tuning.json``, and the best goes into the recipe by hand. A recipe
that has changed is tried anew around its new settings.
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
FACTORS: Mapping[str, Sequence[float]] = {
    "method.beta": (0.25, 4.0),
    "optimizer.learning_rate": (0.5, 2.0),
}
"""What is tried for every method that has the field: multiples of the recipe's own value."""
GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "ipo": {"method.beta": (0.25, 0.0625)},  # the margin that it aims for is 0.5 / beta
    "dro": {"method.margin": (10.0,), "optimizer.learning_rate": (2.0,)},
    "inversion_dpo": {"method.beta": (0.25,), "optimizer.learning_rate": (2.0,)},
    "patchdpo": {"optimizer.learning_rate": (0.25, 2.0)},
    "sft": {"optimizer.learning_rate": (0.25, 0.5, 2.0)},
}
"""Other multiples for some methods, instead of ``FACTORS``."""


def trials(method: str) -> Iterator[list[str]]:
    """Return the flags of each trial: none, then one changed setting at a time."""
    yield []
    run = to_dict(tiny_world.recipe(method))
    fields = vars(build(run["method"]))
    for dotted, factors in GRIDS.get(method, FACTORS).items():
        section, name = dotted.split(".", 1)
        here: Any = fields.get(name) if section == "method" else run[section][name]
        if isinstance(here, int | float):
            yield from ([f"--{dotted}={here * factor:g}"] for factor in factors)


def tune(method: str, say: Callable[[str], None]) -> None:
    """Run every trial of a method that is not in the record; several processes share them out."""
    for flags in trials(method):
        run = tiny_world.recipe(method, flags, SEED)
        asked = record.plain(tiny_world.asked(run, "validation", PROMPTS))
        digest = hashlib.blake2b(
            json.dumps([method, asked], sort_keys=True).encode(), digest_size=6
        ).hexdigest()
        with record.lock(f"trial-{digest}", wait=False) as mine:
            if not mine or any(t["trial"] == digest for t in tried()):
                continue
            made = tiny_world.run(f"trial-{digest}", run, "validation", PROMPTS)
            gains = {name: r["gain"] for name, r in made["rewards"].items()}
            trial = {"trial": digest, "method": method, "flags": flags, "gain": gains.pop(made["primary"])}
            trial |= {"not trained on": gains, **{k: made[k] for k in ("steps", "seconds")}, "asked": asked}
            _add(trial)
            say(f"{method} {' '.join(flags) or '(as shipped)'}: {record.shown(trial['gain'])}")


def tried() -> list[dict[str, Any]]:
    """Every trial in the record."""
    path = record.HERE / "tuning.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["trials"] if path.exists() else []
    return found


def _add(trial: Mapping[str, Any]) -> None:
    with record.lock("tuning"):
        every = sorted([*tried(), trial], key=lambda t: (t["method"], t["flags"], t["trial"]))
        write_atomic(record.HERE / "tuning.json", json.dumps({"trials": every}, indent=1) + "\n")
