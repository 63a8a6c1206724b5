"""The documentation site: built strictly and offline, a page for everything that the registries know."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reproduce import written
from diffalign.cli import COMMANDS
from diffalign.config.files import shipped_configs
from diffalign.methods import REGISTRY as METHODS
from diffalign.methods import build
from diffalign.models.families.registry import FAMILIES, REFUSED
from diffalign.rewards import REGISTRY as REWARDS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


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
        for part in (
            "formula",
            "what-the-paper-reports",
            "differences-from-the-released-code",
            "cost",
            "when-to-use-it",
        ):
            assert f'id="{part}"' in page or f"id={part}" in page, (name, part)
            text = re.split(rf'id="?{part}"?', page)[1].split("<h2")[0].split("</h2>")[-1]
            assert "<math" in text or re.sub(r"<[^>]+>|\s", "", text), (name, part, "is empty")


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


def test_pipelines_that_are_refused_are_told(site):
    text = (site / "models.html").read_text(encoding="utf-8")
    assert REFUSED and all(name in text for name in REFUSED)


def test_every_published_table_has_a_page_that_links_its_sources(site):
    index = (site / "reproduce.html").read_text(encoding="utf-8")
    for name, entry in written()["recipes"].items():
        assert f"reproduce/{name}.html" in index
        page = (site / "reproduce" / f"{name}.html").read_text(encoding="utf-8")
        assert str(entry["figures"]).split()[0] in page and "not reproducible" in page, name


def test_every_notebook_has_a_page_with_its_outputs(site):
    index = (site / "notebooks.html").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"notebooks/{path.stem}.html" in index
        page = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        pictures = sum(
            "image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", [])
        )
        assert pictures
        for number in range(pictures):
            name = f"{path.stem}_{number}.png"
            assert name in page and (site / "notebooks" / name).read_bytes()[:4] == b"\x89PNG"


def test_the_guide_stands_on_the_leaderboard(site):
    page = (site / "methods" / "index.html").read_text(encoding="utf-8")
    part = re.split(r'id="?what-the-leaderboard-says', page)[1].split("<h2")[0]
    assert "The tiny SDXL, offline" in part and re.search(r"\+0\.\d{3} \[", part)


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(https?://[^\"' >]+)", text)
        assert not fetched, (page.name, fetched)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page):
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in links if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("row", "methods"),
    [
        ("MaPO as released", [{"type": "mapo"}, {"type": "mapo", "form": "orpo"}]),
        ("MaPO as printed", [{"type": "mapo", "form": "paper"}]),
        ("DSPO", [{"type": "dspo"}]),
        ("SimPO", [{"type": "simpo"}]),
        ("DiffusionNFT", [{"type": "diffusion_nft"}]),
        ("DGPO", [{"type": "dgpo"}]),
        ("f-DPO, XPO, beta-DPO", [{"type": "fdpo"}, {"type": "xpo"}, {"type": "beta_dpo"}]),
        ("ADPO", [{"type": "adpo"}]),
        ("AutoBeta", [{"type": "auto_beta"}]),
        ("Flow-GRPO, DDPO", [{"type": "flow_grpo"}, {"type": "ddpo"}]),
    ],
)
def test_the_settings_that_are_named_beta_exist(row, methods):
    page = (ROOT / "docs" / "concepts" / "beta.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {row}")]
    names = re.findall(r"`([a-z_.]+)`", line.split("|")[3])
    for name in [name for name in names if name != "dpo"]:
        for method in methods:
            value = build(method)
            for part in name.split("."):
                value = getattr(value, part)
            assert value is None or isinstance(value, float), (method, name)
