"""Writes README's tables of methods, strategies, models and rewards: ``python -m benchmarks.readme``."""

from pathlib import Path

from diffalign.methods import REGISTRY as METHODS
from diffalign.models.families.registry import FAMILIES
from diffalign.rewards import REGISTRY as REWARDS
from diffalign.strategies import STRATEGIES
from diffalign.utils.files import write_atomic

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- tables: python -m benchmarks.readme -->", "<!-- end of tables -->"


def tables() -> str:
    """The four tables in Markdown."""
    lines = [
        "| method | | paper | learns from | network samples per group and step |",
        "|---|---|---|---|---|",
    ]
    for card in METHODS.values():
        paper = f"[{card.paper} ({card.year})]({card.url})"
        lines.append(f"| `{card.name}` | {card.title} | {paper} | {card.data} | {card.cost} |")
    lines += [
        "",
        "| strategy, around any method | | composes with | costs beside the method |",
        "|---|---|---|---|",
    ]
    for c in STRATEGIES.values():
        title = f"[{c.title}](https://arxiv.org/abs/{c.arxiv})" if c.arxiv else c.title
        lines.append(f"| `{c.name}` | {title} | {c.composes} | {c.cost} |")
    lines += ["", "| model | | pipeline | for example |", "|---|---|---|---|"]
    lines += [f"| `{c.name}` | {c.title} | `{c.pipeline}` | `{c.example}` |" for c in FAMILIES.values()]
    lines += ["", "| reward | | range | weights |", "|---|---|---|---|"]
    lines += [f"| `{c.name}` | {c.title} | {c.range} | {c.size} |" for c in REWARDS.values()]
    return "\n".join(lines)


def filled(text: str) -> str:
    """README with its tables as the registries have them."""
    before, rest = text.split(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    write_atomic(README, filled(README.read_text(encoding="utf-8")))
