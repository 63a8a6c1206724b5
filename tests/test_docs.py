"""The documentation site: built strictly and offline, a page for everything that the registries know."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.cli import COMMANDS
from diffalign.config.io import field_kind, shipped_configs
from diffalign.methods import REGISTRY as METHODS
from diffalign.models.families.registry import FAMILIES
from diffalign.rewards import REGISTRY as REWARDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs diffalign[docs]")
    pytest.importorskip("latex2mathml", reason="needs diffalign[docs]")
    pytest.importorskip("mkdocstrings", reason="needs diffalign[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_method_has_a_page_with_its_formula(site):
    for name in METHODS:
        page = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        assert "<math" in page, f"docs/methods/{name}.md has no formula"
        assert METHODS[name].title in page


def test_every_reward_family_command_and_recipe_is_described(site):
    for page, names in (
        ("rewards", REWARDS),
        ("models", FAMILIES),
        ("commands", COMMANDS),
        ("recipes", shipped_configs()),
    ):
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        missing = [name for name in names if f'id="{name}"' not in text and f"id={name}" not in text]
        assert not missing, (page, missing)


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(https?://[^\"' >]+)", text)
        assert not fetched, (page.name, fetched)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_exist(page):
    code = "\n".join(re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    for line in re.findall(r"^\s*(?:.*-m )?diffalign (.*)$", code.replace("\\\n", " "), re.M):
        command, *words = line.split("#")[0].split()
        assert command in COMMANDS, line
        if command != "train":
            continue
        for word in words:
            if word.startswith("--"):
                field_kind(word[2:].partition("=")[0])  # a UserError where there is no such field
