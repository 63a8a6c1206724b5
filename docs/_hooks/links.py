"""MkDocs hook: links of the sources lead to files of the repository; on the site to the pages made of them.

A page that is generated (recipes, models, benchmarks and so on) has no file under ``docs``, so that a link
to it would be broken where the sources themselves are read.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PAGES = {
    "docs/methods/_guide.md": "methods/index.md",
    "docs/_rewards.md": "rewards.md",
    "docs/_reproduce.yaml": "reproduce.md",
    "configs": "recipes.md",
    "diffalign/models/families": "models.md",
    "diffalign/cli": "commands.md",
    "benchmarks": "benchmarks.md",
    "notebooks": "notebooks.md",
}
"""The page that is made of a file or folder."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to their pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        uri = page_of((ROOT / "docs" / folder / path).resolve())
        if not path or uri is None:
            return match[0]
        target, own, name = uri.partition("#")
        return f"]({posixpath.relpath(target, folder or '.')}{own or mark}{name or anchor})"

    return re.sub(r"\]\((?!https?:|mailto:)([^)\s]+)\)", link, markdown)


def page_of(path: Path) -> str | None:
    """Return the generated page that shows a file or folder of the repository; None where there is none."""
    if not path.is_relative_to(ROOT):
        return None
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if path.parent == ROOT / "configs" and path.suffix == ".yaml":
        return f"recipes.md#{path.stem}"
    if path.parent == ROOT / "benchmarks" and path.suffix == ".md":
        return name
    if path.parent == ROOT / "notebooks" and path.suffix == ".ipynb":
        return f"notebooks/{path.stem}.md"
    return None
