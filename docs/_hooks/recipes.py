"""MkDocs hook: the page of recipes, from their files."""

import html
from typing import Any

import yaml
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add the page."""
    files.append(File.generated(config, "recipes.md", content=recipes()))
    return files


def recipes() -> str:
    """Return the recipes by model, then each with its notes and contents."""
    from diffalign.config.files import shipped_configs
    from diffalign.config.recipes import recipes as known
    from diffalign.models.families.registry import FAMILIES

    lines = [
        "# Recipes",
        "",
        "`diffalign train NAME`; every key can be overridden by its dotted name.",
        "",
        "| model | recipe | method | GPUs |",
        "|---|---|---|---|",
    ]
    found = known()
    real = [recipe for recipe in found if not recipe.name.startswith("tiny_")]
    for recipe in sorted(real, key=lambda recipe: (recipe.family, recipe.size, recipe.name)):
        lines.append(
            f"| {FAMILIES[recipe.family].title} | [`{recipe.name}`](#{recipe.name}) "
            f"| [{recipe.method}](methods/{recipe.method}.md) | {recipe.gpus} |"
        )
    tiny = [recipe for recipe in found if recipe not in real]
    lines += ["", "For the embedded tiny models, without a GPU: ", ""]
    lines[-2] += ", ".join(f"[`{recipe.name}`](#{recipe.name})" for recipe in tiny) + "."
    for recipe, path in zip(found, shipped_configs().values(), strict=True):
        lines += [f"## {recipe.name} {{#{recipe.name}}}", "", html.escape(recipe.title, quote=False), ""]
        lines += [f"- **{label}.** {html.escape(text, quote=False)}" for label, text in recipe.notes.items()]
        body = "\n".join(line for line in path.read_text("utf-8").splitlines() if not line.startswith("#"))
        yaml.safe_load(body)
        lines += ["", "```bash", *recipe.commands, "```", "", "```yaml", body.strip(), "```", ""]
    return "\n".join(lines) + "\n"
