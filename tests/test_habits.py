"""Rules of the project: lists that may only shrink, versions, golden vectors, templates."""

import ast
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import packages_distributions

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from diffalign.evaluation.measuring.motion import shrunk
from diffalign.losses.contrast import pairs_of
from tests import conftest, strict_types
from tests.helpers import PUBLISHED_DATA, ROOT, VECTORS


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_room_is_spared_imperative_docstrings():
    lint = project()["tool"]["ruff"]["lint"]
    assert "D401" in lint["select"] and "D401" not in lint["ignore"]
    assert not [place for place, rules in lint["per-file-ignores"].items() if "D401" in rules]


def test_strict_types_may_not_get_worse():
    found = strict_types.counted("a/b.py:3: error: x [y]\na/b.py:9: error: x\na/c.py:1: note: z\n")
    assert found == Counter({"a/b.py": 2})
    assert strict_types.worse(found, {"a/b.py": 2}) == []
    assert strict_types.worse(found, {"a/b.py": 1}) == ["a/b.py: 2 errors of mypy --strict, 1 recorded"]
    assert strict_types.worse(found, {}) == ["a/b.py: 2 errors of mypy --strict, 0 recorded"]
    recorded = json.loads(strict_types.RECORD.read_text())
    rooms: Counter[str] = Counter()
    for module, errors in recorded.items():
        rooms[module.split("/")[1].removesuffix(".py")] += errors
    listed = ", ".join(
        f"{room} {n}" for room, n in sorted(rooms.items(), key=lambda item: (-item[1], item[0]))
    )
    said = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert f"({sum(recorded.values())} in all: {listed};" in said


def test_every_dependency_has_a_version_in_the_constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    names = {normal(name) for name in pinned}
    wanted = project()["project"]
    needed = [*wanted["dependencies"], *wanted["optional-dependencies"]["dev"]]
    needed = {normal(re.match(r"[\w.-]+", line)[0]) for line in needed if not line.startswith("diffalign[")}
    assert needed <= names
    assert not [line for line in lines if not line.startswith("#") and re.search(r"[/@+]|https?:", line)]


def imported(path):
    """Return the top-level modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_every_imported_module_is_of_a_declared_dependency():
    """A module of a package that is not installed must bear the package's name."""
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    wanted = project()["project"]
    lines = itertools.chain(wanted["dependencies"], *wanted["optional-dependencies"].values())
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    rooms, packages = ("diffalign", "tests", "benchmarks", "pipelines"), packages_distributions()
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
        for module in imported(path)
        if module not in sys.stdlib_module_names and module not in rooms
        if declared.isdisjoint(map(normal, packages.get(module, [module])))
    }
    assert not missing, sorted(missing)


def test_shapes_are_checked_in_every_room_that_states_some():
    with pytest.raises(TypeCheckError):
        pairs_of(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(TypeCheckError):
        shrunk(torch.zeros(3, 4, 4))
    stated = {
        path.relative_to(ROOT / "diffalign").parts[0].removesuffix(".py")
        for path in (ROOT / "diffalign").rglob("*.py")
        if re.search(r"^from jaxtyping import", path.read_text("utf-8"), re.MULTILINE)
    }
    assert stated == set(conftest.SHAPED)


def test_files_above_the_limit_are_slow_and_unmeasured_ones_by_their_names():
    assert not conftest.is_slow("a.py", {"a.py": conftest.FAST})
    assert conftest.is_slow("a.py", {"a.py": conftest.FAST + 0.1})
    assert not conftest.is_slow("tests/runs/test_resume.py", {})
    assert conftest.is_slow("tests/models/test_family_runs.py", {"a.py": 1.0})
    assert not conftest.is_slow("tests/test_demo.py", {"tests/test_demo.py": 1.0})
    times = json.loads(conftest.TIMES.read_text())
    assert not [file for file in times if not (ROOT / file).exists()]
    known = {"tests/test_house.py": 3.0, "tests/test_gone.py": 2.0, "tests/test_docs.py": 1.0}
    again = conftest.merged(known, {"tests/test_docs.py": 1.26, "tests/cli/test_new.py": 9.0})
    assert again == {"tests/cli/test_new.py": 9.0, "tests/test_docs.py": 1.3, "tests/test_house.py": 3.0}
    assert list(again) == sorted(again)
    fast = sum(seconds for file, seconds in times.items() if not conftest.is_slow(file, times))
    assert 10 < fast < 160, "processor seconds of the fast tier, which two cores share"


def test_workers_take_the_longest_files_first():
    times = {"tests/a.py": 1.0, "tests/b.py": 50.0, "tests/c.py": 50.0}
    files = ["tests/a.py", "tests/new.py", "tests/c.py", "tests/b.py"]
    in_order = sorted(files, key=lambda file: conftest.longest_first(file, times))
    assert in_order == ["tests/new.py", "tests/b.py", "tests/c.py", "tests/a.py"]


def test_golden_vectors_ship_whole_and_small():
    files = sorted((ROOT / "tests" / "golden").glob("*.npz"))
    readme = (ROOT / "tests" / "golden" / "README.md").read_text()
    assert len(files) >= 28 and sum(file.stat().st_size for file in files) < 4e6
    for file in files:
        assert f"`{file.stem}`" in readme, f"{file.name} is not in the README"
        with np.load(file, allow_pickle=False) as arrays:
            assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f"), file
    assert VECTORS.is_dir()


def test_published_data_have_their_licences():
    folders = [folder for folder in PUBLISHED_DATA.iterdir() if folder.is_dir()]
    assert folders and all(list(folder.glob("LICENSE*")) for folder in folders)


@pytest.mark.parametrize(
    "name", ["ISSUE_TEMPLATE/bug.md", "ISSUE_TEMPLATE/feature.md", "pull_request_template.md"]
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
