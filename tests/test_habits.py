"""What keeps the project as it is: lists that only shrink, versions, golden vectors, templates."""

import re
import subprocess
import sys

from tests.helpers import ROOT

D401_SPARED = frozenset(
    [
        "tests/**",
        "diffalign/data/**",
        "diffalign/errors.py",
        "diffalign/estimate/**",
        "diffalign/evaluation/**",
        "diffalign/export/**",
        "diffalign/media/**",
        "diffalign/models/**",
        "diffalign/preferences/**",
    ]
)


def test_templates_ask_for_the_environment(name):
    assert "`diffalign env`" in (ROOT / ".github" / name).read_text()


def test_benchmarks_and_pipelines_import_no_tests():
    for folder in ("benchmarks", "pipelines", "diffalign"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) tests\b", path.read_text(), re.MULTILINE), path


def test_workflow_has_a_leg_of_constraints_and_one_of_newest():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "versions: constraints" in text and "versions: newest" in text
    made = subprocess.run(
        ["make", "-n", "-B", ".venv/.installed", "NEWEST=1", f"PYTHON={sys.executable}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "constraints" not in made
    made = subprocess.run(
        ["make", "-n", "-B", ".venv/.installed", "NEWEST=", f"PYTHON={sys.executable}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "-c constraints.txt" in made
