"""Hatch metadata hook: the description of the package index, and the project's address.

The repository names no address of its own. A build that knows one (``DIFFALIGN_URL``, or the variables that
GitHub Actions sets) writes ``[project.urls]`` and makes README's links absolute, to the files of the
version's tag. A build that knows none leaves out pictures and keeps the words of links, since an index has no
files that relative links could lead to.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:)([^)\s]+)\)")


class ReadmeHook(MetadataHookInterface):
    """Fill in the dynamic fields ``readme`` and ``urls``."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the fields."""
        address = address_of(os.environ)
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        version = re.search(r'__version__ = "(.+)"', Path(self.root, "diffalign/__init__.py").read_text())
        assert version, "diffalign/__init__.py has no version"
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": described(text, address, f"v{version[1]}"),
        }
        metadata["urls"] = urls(address, f"v{version[1]}")


def address_of(environment: Mapping[str, str]) -> str:
    """Return the address of the repository that a build's environment names, or an empty text."""
    if given := environment.get("DIFFALIGN_URL"):
        return given.rstrip("/")
    server, repository = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY")
    return f"{server}/{repository}" if server and repository else ""


def urls(address: str, tag: str) -> dict[str, str]:
    """Return the entries of ``[project.urls]``."""
    if not address:
        return {}
    files = f"{address}/blob/{tag}"
    return {
        "Repository": address,
        "Documentation": f"{files}/docs/index.md",
        "Changelog": f"{files}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def described(readme: str, address: str, tag: str) -> str:
    """Return README with absolute links, or without links and pictures where no address is known."""

    if not address:  # a picture goes with the line below that says what it shows
        readme = re.sub(r"!\[[^\]]*\]\([^)]*\)\n\n\*[^\n]*\*\n\n", "", readme)

    def absolute(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        if address:
            return f"{picture}[{words}]({address}/{'raw' if picture else 'blob'}/{tag}/{path})"
        return "" if picture else words

    return LINK.sub(absolute, readme)
