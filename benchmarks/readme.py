"""Update the counts of methods, models and rewards in README: ``python -m benchmarks.readme``."""

import re
from pathlib import Path

from diffalign.methods import REGISTRY as METHODS
from diffalign.models.families.registry import FAMILIES
from diffalign.rewards import REGISTRY as REWARDS
from diffalign.utils.files import write_atomic

README = Path(__file__).parents[1] / "README.md"
REGISTRIES = {"Methods": METHODS, "Models": FAMILIES, "Rewards": REWARDS}


def filled(text: str) -> str:
    """Return README's text with the current counts."""
    for name, registry in REGISTRIES.items():
        text, count = re.subn(rf"^(\| \*\*{name}\*\* \| )\d+", rf"\g<1>{len(registry)}", text, flags=re.M)
        if count != 1:
            raise ValueError(f"README has {count} rows that begin `| **{name}** | 12`; needed: one")
    return text


if __name__ == "__main__":
    write_atomic(README, filled(README.read_text(encoding="utf-8")))
