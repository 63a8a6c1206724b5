"""The description and addresses that a package index shows, and what the source distribution holds."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def hook(monkeypatch):
    """Return hatch_build.py, loaded without hatchling, which is installed in build environments only."""
    interface = ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_are_absolute_where_the_address_is_known(hook):
    text = hook.described(README, "https://host/team/diffalign", "v1.2")
    assert not re.findall(r"\]\((?!https?:)", text)
    assert "![Base and aligned tiny SDXL, side by side, with the judge's scores]" in text
    assert "(https://host/team/diffalign/raw/v1.2/docs/comparison.png)" in text
    assert "[Start here](https://host/team/diffalign/blob/v1.2/docs/start.md)" in text


def test_nothing_leads_nowhere_where_it_is_not(hook):
    text = hook.described(README, "", "v1.2")
    assert "](" not in text.replace("](https:", "") and "Made by `make demo`" not in text
    assert "Start here has a recipe for each model and card" in text
    words = [match[1] for match in hook.LINK.findall(README) if not match[0]]
    assert words and all(word in text for word in words)


def test_the_address_is_that_of_the_build(hook):
    github = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "a/b"}
    assert hook.address_of(github) == "https://github.com/a/b"
    assert hook.address_of({**github, "DIFFALIGN_URL": "https://host/x/"}) == "https://host/x"
    assert hook.address_of({}) == "" and hook.urls("", "v1") == {}
    assert hook.urls("https://host/x", "v1")["Changelog"] == "https://host/x/blob/v1/CHANGELOG.md"


def test_the_hook_fills_in_what_the_project_calls_dynamic(hook, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_URL", "https://host/x")
    made = hook.ReadmeHook()
    made.root, metadata = str(ROOT), {}
    made.update(metadata)
    assert metadata["readme"]["content-type"] == "text/markdown"
    assert metadata["urls"]["Repository"] == "https://host/x"
    assert {*metadata} <= {*PROJECT["project"]["dynamic"]}
    assert not {*metadata} & {*PROJECT["project"]} - {"dynamic"}


def test_the_source_distribution_holds_what_its_tests_and_pages_read():
    included = {name.strip("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    left_out = {"build", "dist", "runs", "pyproject.toml"}  # made here; hatchling adds the last one itself
    assert tracked - left_out <= included
    assert included <= tracked
