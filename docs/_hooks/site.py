"""MkDocs hook: pages made from the registries, and formulas as MathML.

A page that the registries know (methods, rewards, models, commands) is generated at each build, so
it cannot drift from the code. ``docs/methods/NAME.md`` completes a page: formula, claims, when to use it.
"""

import contextlib
import html
import io
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from diffalign.config.recipes import Recipe

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {
        "methods/index.md": methods_index(),
        "rewards.md": rewards(),
        "models.md": models(),
        "commands.md": commands(),
        "api.md": api(),
        "benchmarks.md": benchmarks(),
    }
    pages |= {f"benchmarks/{path.stem}.md": path.read_text("utf-8") for path in benchmark_pages()}
    for name in method_names():
        written = files.get_file_from_path(f"methods/{name}.md")
        by_hand = Path(written.abs_src_path).read_text("utf-8") if written else ""
        if written:
            files.remove(written)
        pages[f"methods/{name}.md"] = method(name, by_hand)
    for source, content in pages.items():
        # Pages outside of the navigation are reached from their index.
        file = File.generated(config, source, content=content)
        file.inclusion = InclusionLevel.INCLUDED if source in _in_nav(config) else InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def _in_nav(config: Any) -> set[str]:
    def leaves(node: Any) -> set[str]:
        if isinstance(node, str):
            return {node}
        children = node.values() if isinstance(node, dict) else node
        return set().union(*map(leaves, children))

    return leaves(config["nav"])


def on_page_content(content: str, **_: Any) -> str:
    """Turn the TeX of arithmatex into MathML."""

    def formula(match: re.Match[str]) -> str:
        tag, tex = match.group(1), html.unescape(match.group(2)).strip()
        display = "block" if tex.startswith("\\[") else "inline"
        return f'<{tag} class="arithmatex">{convert(tex[2:-2], display=display)}</{tag}>'

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.S)


def method_names() -> list[str]:
    """List the methods of the registry."""
    from diffalign.methods import REGISTRY

    return sorted(REGISTRY)


def methods_index() -> str:
    """Return the decision guide, the table of methods and that of strategies."""
    from benchmarks import standing
    from diffalign.methods import REGISTRY
    from diffalign.strategies import STRATEGIES

    guide = (ROOT / "docs" / "methods" / "_guide.md").read_text("utf-8")
    lines = [
        guide,
        "",
        *standing.lines(),
        "## All methods",
        "",
        "| method | paper | learns from | network samples a group and step |",
        "|---|---|---|---|",
    ]
    for name in method_names():
        card = REGISTRY[name]
        lines.append(
            f"| [{card.title}]({name}.md) `{name}` | [{card.paper} ({card.year})]({card.url}) "
            f"| {card.data} | {card.cost} |"
        )
    lines += [
        "",
        "## Strategies, around any method",
        "",
        "| strategy | composes with | cost |",
        "|---|---|---|",
    ]
    for strategy in STRATEGIES.values():
        title = strategy.title
        if strategy.arxiv:
            title = f"[{title}](https://arxiv.org/abs/{strategy.arxiv})"
        lines.append(f"| {title} `{strategy.name}` | {strategy.composes} | {strategy.cost} |")
    return "\n".join(lines) + "\n"


def method(name: str, by_hand: str) -> str:
    """One method: card, text by hand, docstring, measured gains, recipes."""
    import importlib

    from diffalign.methods import REGISTRY

    card = REGISTRY[name]
    module = importlib.import_module(f"diffalign.methods.{name}")
    docstring = (module.__doc__ or "").strip()
    lines = [
        f"# {card.title}",
        "",
        f"`--method {name}`: [{card.paper} ({card.year})]({card.url}).",
        "",
        "| | |",
        "|---|---|",
        f"| learns from | {card.data} |",
        f"| network samples a group and step | {card.cost} |",
        f"| source | `diffalign/methods/{name}.py` |",
        "",
        by_hand.strip(),
        "",
        *differences(docstring, by_hand),
        *cost(name, card.cost, by_hand),
        *_figure(name),
        "## Notes of the implementation",
        "",
        _reflowed(docstring),
        "",
        *_fields(card.method),
        *_gains(name),
        *_recipes_of(name),
    ]
    return "\n".join(lines) + "\n"


OF_OTHERS = r"(Further d|D)ifferences? from |What differs|Ours:|As released|The released "


def differences(docstring: str, by_hand: str) -> list[str]:
    """Return what a docstring says of other code, where the page by hand says nothing of it.

    Raises:
        ValueError: neither says anything.
    """
    title = "## Differences from the released code"
    if title in by_hand:
        return []
    said = [block for block in re.split(r"\n\s*\n", docstring) if re.match(OF_OTHERS, block)]
    if not said:
        raise ValueError(f"no differences from released code in the page or in the docstring: {docstring}")
    return [title, "", _reflowed("\n\n".join(said)), ""]


def cost(name: str, samples: str, by_hand: str) -> list[str]:
    """Return what a step costs, and the hours of the published runs."""
    rows = json.loads((ROOT / "benchmarks" / "reproduce.json").read_text("utf-8"))["rows"]
    mine = [r.name for r in _recipes() if r.method == name and r.name in rows]
    lines = [] if "## Cost" in by_hand else ["## Cost", "", f"A group and step: {samples}."]
    if mine:
        hours = ", ".join(f"[`{n}`](../reproduce/{n}.md) {_spoken(rows[n]['h100_hours'])}" for n in mine)
        lines += ["", f"Hours of one H100 for the published runs, by FLOPs, not measured: {hours}."]
    return [*lines, ""]


def _spoken(hours: float) -> str:
    """Return hours with two digits, without an exponent."""
    return f"{hours:.2g}" if hours < 100 else f"{float(f'{hours:.2g}'):,.0f}"


def _reflowed(docstring: str) -> str:
    """Turn a docstring into Markdown: indented formulas become code blocks."""
    blocks = []
    for block in re.split(r"\n\s*\n", docstring):
        if block.startswith("    "):
            blocks.append(
                "```text\n" + "\n".join(line.removeprefix("    ") for line in block.split("\n")) + "\n```"
            )
        else:
            inner = re.split(r"\n(?=    )", block, maxsplit=1)
            blocks.append(html.escape(inner[0], quote=False).replace("``", "`").replace("|", "\\|"))
            if len(inner) > 1:
                code = "\n".join(line.removeprefix("    ") for line in inner[1].split("\n"))
                blocks.append(f"```text\n{code}\n```")
    return "\n\n".join(blocks)


FIGURES = {
    "plane": (
        "## On the plane",
        "Densities of base, aligned model and optimum",
        "Where a base, the base aligned by this method, and the known optimum of the same mean reward put "
        "their samples; the reward is the height, its mean stands above each.",
    ),
    "tiny": (
        "## On the tiny SDXL",
        "Images of the base and of the aligned model",
        "Images of six test captions by the base and by the model aligned by this method, from the same "
        "noise, with the judge's scores; *tuned*: with the settings of its best trials "
        "([what equal tuning changes](../../benchmarks/tuned.md)), else by its recipe as shipped.",
    ),
}
FIGURES["sd3"] = ("## On the tiny SD3", *FIGURES["tiny"][1:])


def _figure(name: str) -> list[str]:
    """Return the method's samples on the plane and in the worlds of images, where there is a figure."""
    lines = []
    for world, (title, alternative, about) in FIGURES.items():
        if (ROOT / "docs" / "figures" / f"{world}_{name}.png").is_file():
            lines += [title, "", f"![{alternative}](../figures/{world}_{name}.png)", "", about, ""]
    return lines


def _fields(cls: type) -> list[str]:
    from diffalign.cli.methods import defaults

    rows = [f"| `{name}` | `{_cell(value)}` |" for name, value in defaults(cls).items()]
    return ["## Settings", "", "| `--method.` | default |", "|---|---|", *rows, ""] if rows else []


def _gains(name: str) -> list[str]:
    """Return the rows of the leaderboard that this method has."""
    rows = json.loads((ROOT / "benchmarks" / "methods.json").read_text("utf-8"))["rows"]
    mine = [row for row in rows if row["method"] == name]
    if not mine:
        return []
    worlds = {"plane": "the plane", "tiny": "the tiny SDXL", "sd3": "the tiny SD3"}
    lines = [
        "## Measured",
        "",
        "Gain over the base with its 95 % interval, by seed, at equal compute "
        "([all rows](../benchmarks/methods.md)).",
        "",
        "| world | settings | seed | gain | steps |",
        "|---|---|---|---|---|",
    ]
    for row in mine:
        gain, low, high = row["rewards"][row["primary"]]["gain"]
        lines.append(
            f"| {worlds.get(row['world'], row['world'])} | {_tuned(row)} | {row['seed']} "
            f"| {gain:+.3f} [{low:+.3f}, {high:+.3f}] | {row['steps']} |"
        )
    return [*lines, ""]


def _tuned(row: dict[str, Any]) -> str:
    """Return the settings of a row: those of the best trial, or the recipe's."""
    return ", ".join(f.removeprefix("--") for f in row["flags"]) if row.get("flags") else "recipe"


@cache
def _recipes() -> "list[Recipe]":
    from diffalign.config.recipes import recipes

    return recipes()


def _recipes_of(name: str) -> list[str]:
    mine = [recipe for recipe in _recipes() if recipe.method == name]
    if not mine:
        return []
    listed = [f"- [`{r.name}`](../recipes.md#{r.name}): {_cell(r.title)}" for r in mine]
    return ["## Recipes", "", *listed, ""]


def rewards() -> str:
    """Return the gallery of rewards."""
    from diffalign.rewards import REGISTRY

    lines = ["# Rewards", "", (ROOT / "docs" / "_rewards.md").read_text("utf-8").strip(), ""]
    lines += [
        "| reward | judges | usual values | licence of the weights | gradient |",
        "|---|---|---|---|---|",
    ]
    for card in REGISTRY.values():
        kind = "videos" if card.video else "edits" if card.edits else "images"
        cells = [kind, _cell(card.range), _cell(card.licence), "yes" if card.differentiable else "no"]
        lines.append(f"| [`{card.name}`](#{card.name}) | {' | '.join(cells)} |")
    lines.append("")
    for card in REGISTRY.values():
        lines += [f"## `{card.name}` {{#{card.name}}}", "", f"{card.title}.", "", "| | |", "|---|---|"]
        facts = {
            "usual values": card.range,
            "weights": card.size,
            "checkpoint": card.checkpoint or "none",
            "licence": card.licence,
            "judges": "videos" if card.video else "edits of a source image" if card.edits else "images",
            "gradients reach the pixels": "yes" if card.differentiable else "no",
        }
        lines += [f"| {label} | {_cell(value)} |" for label, value in facts.items()]
        lines += ["", html.escape(card.notes, quote=False).replace("``", "`"), ""]
    return "\n".join(lines) + "\n"


def _cell(text: Any) -> str:
    return html.escape(str(text), quote=False).replace("|", "\\|")


def models() -> str:
    """Return the gallery of model families."""
    from diffalign.models.families.registry import FAMILIES, REFUSED

    lines = [
        "# Models",
        "",
        "A family says how prompts are encoded, how the network is called and at which times it samples. "
        "Sizes are those of training; a source is an image that is edited, or the first frame of a video "
        "([Edit pairs](howto/edit_pairs.md)); formats to export to are on [their page](export.md).",
        "",
        "| family | | pipeline | px | source | recipes | for example |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in FAMILIES.values():
        mine = [r for r in _recipes() if r.family == card.name and not r.name.startswith("tiny_")]
        mine.sort(key=lambda recipe: (recipe.size, recipe.name))
        smallest = f"[`{mine[0].name}`](recipes.md#{mine[0].name})" if mine else "none of its own"
        more = f" and {len(mine) - 1} more" if len(mine) > 1 else ""
        lines.append(
            f"| `{card.name}` {{#{card.name}}} | {card.title} | `{card.pipeline}` | {card.resolution} "
            f"| {card.source or 'refused'} | {smallest}{more} | `{card.example}` |"
        )
    lines += ["", "Refused, though a family has a similar pipeline:", ""]
    lines += [f"- `{pipeline}`: {reason}." for pipeline, reason in REFUSED.items()]
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Return the help of every command."""
    from diffalign.cli import COMMANDS, main

    lines = ["# Commands", "", "`diffalign COMMAND --help` prints the same.", ""]
    for name, what in COMMANDS.items():
        out = io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            contextlib.suppress(SystemExit),
        ):
            main([name, "--help"])
        lines += [f"## diffalign {name} {{#{name}}}", "", what[0].upper() + what[1:] + ".", ""]
        lines += ["```text", out.getvalue().strip(), "```", ""]
    return "\n".join(lines) + "\n"


API = (
    "diffalign.runs.align",
    "diffalign.runs.compare",
    "diffalign.config.schema",
    "diffalign.types",
    "diffalign.diffusion.paths",
    "diffalign.diffusion.times",
    "diffalign.diffusion.noising",
    "diffalign.diffusion.inversion",
    "diffalign.diffusion.samplers",
    "diffalign.diffusion.likelihood",
    "diffalign.losses.contrast",
    "diffalign.losses.pairwise",
    "diffalign.losses.pointwise",
    "diffalign.losses.listwise",
    "diffalign.methods.registry",
    "diffalign.rewards.registry",
    "diffalign.training.loop",
)


def api() -> str:
    """Return the reference of the public modules, which mkdocstrings fills in."""
    lines = ["# Python API", ""]
    return "\n".join([*lines, *(f"::: {module}\n" for module in API)]) + "\n"


def benchmark_pages() -> list[Path]:
    """List the reports under ``benchmarks``."""
    return sorted((ROOT / "benchmarks").glob("*.md"))


def benchmarks() -> str:
    """Return the list of reports."""
    lines = [
        "# Benchmarks",
        "",
        "Figures, each with the command that makes it, the kind of machine and the date.",
        "",
    ]
    for path in benchmark_pages():
        title = path.read_text("utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}](benchmarks/{path.name})")
    captions = {
        "ranks": "Gain of every method of the tiny image models over the base, with its 95 % interval over "
        "prompts and seeds; a star marks methods that were tuned, all with the same number of trials.",
        "compute": "The same gains against the processor seconds of the training.",
        "cost": "Gain of the judge against compute, over the training of each method by its recipe, with "
        "95 % intervals ([tables](benchmarks/over_optimisation.md)); a forward of the network costs 1, a "
        "backward 2.",
        "sensitivity": "Gain of every trial on validation prompts, by strength and by learning rate.",
        "over_optimisation": "Gain of the trained reward (thick) and of held-out ones over training, in "
        "standard deviations of the base's scores; compute 1 is the leaderboard's online budget "
        "([table](benchmarks/over_optimisation.md)).",
    }
    lines += ["", "`python -m benchmarks.figures` draws them:", ""]
    for name, caption in captions.items():
        if (ROOT / "docs" / "figures" / f"{name}.svg").is_file():
            lines += [f"![{name}](figures/{name}.svg)", "", f"*{caption}*", ""]
    return "\n".join(lines) + "\n"
