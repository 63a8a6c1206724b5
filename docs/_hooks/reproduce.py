"""MkDocs hook: a page for each published recipe that says what its table would need.

From the recipe's file, ``docs/_reproduce.yaml`` (by hand, with sources) and ``benchmarks/reproduce.json``
(``python -m benchmarks.reproduce``).
"""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "data": "data",
    "model": "model",
    "steps": "steps and batch, published",
    "hardware": "hardware, published",
    "evaluation": "prompts and rewards, published",
    "figures": "figures, published",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the index and the pages."""
    content = yaml.safe_load((ROOT / "docs" / "_reproduce.yaml").read_text("utf-8"))
    counts = json.loads((ROOT / "benchmarks" / "reproduce.json").read_text("utf-8"))
    from diffalign.config.recipes import recipes

    known = {recipe.name: recipe for recipe in recipes()}
    entries = content["recipes"]
    pages = {"reproduce.md": index(entries, known, counts)}
    for name, entry in entries.items():
        row = {**counts["rows"][name], **counts["about"]}
        pages[f"reproduce/{name}.md"] = one(known[name], entry, row, content["sources"])
    for source, text in pages.items():
        file = File.generated(config, source, content=text)
        file.inclusion = InclusionLevel.NOT_IN_NAV if "/" in source else InclusionLevel.INCLUDED
        files.append(file)
    return files


def index(entries: Mapping[str, Any], known: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """Return the list of the published recipes."""
    about = counts["about"]
    lines = [
        "# Published tables",
        "",
        "What it would take to reproduce the table of each published recipe: data, steps, hardware, "
        "evaluation and figures as they are published, what our recipe does in another way, and what cannot "
        "be reproduced. None of these runs has been made here.",
        "",
        f"Hours are computed, not measured: FLOPs by shapes as `diffalign estimate` counts them, at "
        f"{about['utilisation']:.0%} of an H100's {about['tflops']} TFLOP/s, without autoencoder, text "
        f"encoders and rewards (`{about['command']}`).",
        "",
        "| recipe | method | H100 hours | published |",
        "|---|---|---|---|",
    ]
    for name, entry in entries.items():
        row, recipe = counts["rows"][name], known[name]
        lines.append(
            f"| [`{name}`](reproduce/{name}.md) | [{recipe.method}](methods/{recipe.method}.md) "
            f"| {spoken(row['h100_hours'])} | {plain(entry['hardware'])} |"
        )
    return "\n".join(lines) + "\n"


def one(recipe: Any, entry: Mapping[str, Any], row: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    """Return the page of one recipe."""
    lines = [f"# {recipe.name}: what its table needs", "", _escaped(recipe.title), "", "| | |", "|---|---|"]
    lines += [f"| {label} | {cited(entry[key], sources)} |" for key, label in ROWS.items()]
    product = " x ".join(f"{n:,}" for n in row["factors"])
    lines += [
        f"| FLOPs, by shapes | {row['flops']:.2g} for {product} ({row['counted']}) |",
        f"| hours of one H100 | {spoken(row['h100_hours'])}, at {row['utilisation']:.0%} of its peak; "
        "not measured |",
        f"| not reproducible, and why | {cited(entry['missing'], sources)} |",
        "",
        "## Our recipe",
        "",
    ]
    lines += [f"- **{label}.** {_escaped(text)}" for label, text in recipe.notes.items()]
    lines += [
        "",
        "```bash",
        *recipe.commands,
        f"diffalign evaluate --run runs/{recipe.name} {entry['evaluate']}",
        "```",
        "",
        f"[The recipe](../recipes.md#{recipe.name}), [the method](../methods/{recipe.method}.md).",
    ]
    return "\n".join(lines) + "\n"


def cited(text: str, sources: Mapping[str, Any]) -> str:
    """Return a cell with its sources as links.

    Raises:
        KeyError: a source that the file does not list.
    """

    def link(match: re.Match[str]) -> str:
        title, url = sources[match[1]]
        return f"([{title}]({url}))"

    return re.sub(r"\[([a-z0-9_]+)\]", link, " ".join(text.split())).replace("|", "\\|")


def plain(text: str) -> str:
    """Return a text without its sources."""
    return re.sub(r"\s*\[[a-z0-9_]+\]", "", " ".join(text.split()))


def spoken(hours: float) -> str:
    """Return hours with two digits."""
    return f"{hours:.2g}" if hours < 100 else f"{float(f'{hours:.2g}'):,.0f}"


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)
