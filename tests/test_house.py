"""The rules of the house (CONTRIBUTING.md), read off the source: who may import whom, and how big things
are.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign

PACKAGE = Path(diffalign.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere, lazily or not, type-checking blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def importers(*targets: str) -> set[str]:
    return {name_of(p) for p in MODULES if any(inside(i, *targets) for i in imports_of(p))}


def test_losses_import_torch_only():
    for path in (PACKAGE / "losses").glob("*.py"):
        outside = {i for i in imports_of(path) if not inside(i, "torch", "jaxtyping", "diffalign.losses")}
        assert {i.split(".")[0] for i in outside} <= sys.stdlib_module_names, (path, outside)


def test_methods_stand_on_the_mathematics_alone():
    allowed = [
        f"diffalign.{m}"
        for m in (
            "noising", "inversion", "guidance", "samplers", "solvers", "estimators", "losses", "types",
            "times", "randomness", "paths", "methods", "components", "errors", "across", "reductions",
        )
    ]  # fmt: skip
    for path in (PACKAGE / "methods").glob("*.py"):
        ours = {i for i in imports_of(path) if inside(i, "diffalign")}
        assert all(inside(i, *allowed) for i in ours), (path, ours)


def test_strategies_stand_on_methods():
    """They import what methods may, and methods; who prepares the network for them is ``players``."""
    forbidden = [
        f"diffalign.{p}"
        for p in ("training", "models", "data", "rewards", "evaluation", "tiny", "cli", "job", "players")
    ]
    for path in (PACKAGE / "strategies").glob("*.py"):
        assert not any(inside(i, *forbidden) for i in imports_of(path)), path


def test_the_mathematics_imports_no_model_library():
    for name in (
        "types",
        "paths",
        "times",
        "randomness",
        "noising",
        "inversion",
        "guidance",
        "samplers",
        "solvers",
        "estimators",
        "reductions",
    ):
        libraries = {i.split(".")[0] for i in imports_of(PACKAGE / f"{name}.py")} - sys.stdlib_module_names
        assert libraries <= {"torch", "jaxtyping", "diffalign"}, name


def test_training_knows_no_data_model_or_method():
    for path in (PACKAGE / "training").glob("*.py"):
        ours = imports_of(path)
        forbidden = [
            f"diffalign.{p}"
            for p in ("data", "models", "methods", "rewards", "evaluation", "tiny", "cli", "align")
        ]
        assert not any(inside(i, *forbidden) for i in ours), path


@pytest.mark.parametrize(
    ("library", "packages"),
    [
        ("diffusers", ("diffalign.models", "diffalign.tiny", "diffalign.export")),
        ("peft", ("diffalign.models", "diffalign.tiny", "diffalign.export")),
        ("accelerate", ("diffalign.training",)),
        ("open_clip", ("diffalign.rewards",)),
        ("datasets", ("diffalign.data",)),
    ],
)
def test_a_library_stays_in_its_rooms(library, packages):
    strangers = {m for m in importers(library) if not inside(m, *packages)}
    assert not strangers


def test_nothing_imports_the_command_line():
    assert all(inside(m, "diffalign.cli", "diffalign.__main__") for m in importers("diffalign.cli"))


def test_the_command_line_imports_nothing_heavy():
    heavy = "'torch','transformers','diffusers','numpy','accelerate','peft','PIL'"
    code = f"import sys, diffalign, diffalign.cli; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes_are_a_few_screens(path):
    """A smell rather than a crime: raise a number here only with a reason in the commit."""
    source = path.read_text()
    assert len(source.splitlines()) <= 320
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, (
                f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            )


def test_every_module_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
