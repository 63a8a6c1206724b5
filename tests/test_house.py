"""The architecture (CONTRIBUTING.md) as code: which room may import which, and how large modules may grow.

A room is a package or a loose module directly under ``diffalign/``, and the folders ``pipelines`` and
``benchmarks``. Every import counts: lazy ones and those for type checking too. ``python -m tests.test_house``
prints the measure.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffalign"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "types", "losses", "_moved"),
    ("utils",),
    ("config",),
    ("diffusion", "media"),
    ("methods", "training", "tiny"),
    ("models", "data", "strategies"),
    ("rewards", "export", "estimate"),
    ("rollout", "evaluation"),
    ("runs", "preferences", "plane"),
    ("tiny_build", "__init__", "pipelines"),
    ("cli", "benchmarks"),
    ("__main__",),
)
"""Rooms from the ground up. A room imports rooms of lower floors only; rooms of one floor do not see each
other."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}

LIBRARIES = {
    "diffusers": ("models", "tiny", "tiny_build", "export", "estimate"),
    "peft": ("models", "tiny", "tiny_build", "export"),
    "accelerate": ("training",),
    "open_clip": ("rewards",),
    "datasets": ("data",),
}
"""Libraries that stay in their rooms."""

FORMER_NAMES = """
    across components config_check config_files config_io http_json injection kept matching material
    of_errors of_videos
    online_check opening out_of_memory players reductions trajectories usual watch way_down
"""
"""Module names that only their author could place; none comes back."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, the pipelines and the benchmarks, by dotted name."""
    found = {}
    for folder in ("diffalign", "pipelines", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere; ``from package import module`` names the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules() else node.module)
    return frozenset(found)


def room_of(module: str) -> str:
    """Return the room of a module of ours: ``diffalign.data.reading.rows`` stands in ``data``."""
    first, *rest = module.split(".")
    if first != "diffalign":
        return first
    return rest[0] if rest else "__init__"


def ours(module: str) -> bool:
    return module.split(".")[0] in ("diffalign", "pipelines", "benchmarks")


def arrows() -> set[tuple[str, str]]:
    """(room, imported room) for all imports between rooms."""
    return {
        (room_of(module), room_of(target))
        for module, path in modules().items()
        for target in imports_of(path)
        if ours(target) and room_of(target) != room_of(module)
    }


def storeys() -> int:
    """Return the longest chain of rooms in which each imports the next."""
    below: dict[str, set[str]] = {room: set() for room in FLOOR}
    for room, target in arrows():
        below[room].add(target)

    @cache
    def height(room: str) -> int:
        return 1 + max(map(height, below[room]), default=0)

    return max(map(height, below))


def circles() -> list[list[str]]:
    """Modules that import each other in a loop, packages' own ``__init__`` left out: they hand names on."""
    graph = {
        module: {t for t in imports_of(path) if t in modules() and modules()[t].name != "__init__.py"}
        for module, path in modules().items()
        if path.name != "__init__.py"
    }
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:  # Tarjan 1972: strongly connected components
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == module:
                    break
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_every_room_has_a_floor():
    assert {room_of(module) for module in modules()} == set(FLOOR)


def test_imports_point_down():
    upward = [
        f"{module} (floor {FLOOR[room_of(module)]}) imports {target} (floor {FLOOR[room_of(target)]})"
        for module, path in modules().items()
        for target in sorted(imports_of(path))
        if ours(target)
        and room_of(target) != room_of(module)
        and FLOOR[room_of(target)] >= FLOOR[room_of(module)]
    ]
    assert not upward, "\n".join(upward)


def test_no_module_imports_itself_through_others():
    assert not circles()


def test_the_measure_holds():
    assert len(FLOOR) <= 30
    assert storeys() <= 12
    assert len(arrows()) <= 185


def test_former_names_do_not_come_back():
    assert not {path.stem for path in modules().values()} & set(FORMER_NAMES.split())


def test_losses_import_torch_only():
    for module, path in modules().items():
        if room_of(module) == "losses":
            outside = {
                i for i in imports_of(path) if not i.startswith(("torch", "jaxtyping", "diffalign.losses"))
            }
            assert {i.split(".")[0] for i in outside} <= sys.stdlib_module_names, (module, outside)


@pytest.mark.parametrize("room", ["types", "diffusion", "methods", "strategies"])
def test_the_mathematics_imports_no_model_library(room):
    for module, path in modules().items():
        if module.startswith("diffalign.") and room_of(module) == room:
            libraries = {i.split(".")[0] for i in imports_of(path)} - sys.stdlib_module_names
            assert libraries <= {"torch", "jaxtyping", "diffalign"}, (module, libraries)


def test_training_knows_no_model_data_or_method():
    """The loop asks ``step = method(policy, reference, batch, generator)`` and nothing else."""
    rooms = {target for room, target in arrows() if room == "training"}
    assert rooms <= {"errors", "types", "losses", "config", "utils", "diffusion", "media"}


@pytest.mark.parametrize(("library", "rooms"), LIBRARIES.items())
def test_a_library_stays_in_its_rooms(library, rooms):
    strangers = {
        module
        for module, path in modules().items()
        if module.startswith("diffalign.")
        and any(i.split(".")[0] == library for i in imports_of(path))
        and room_of(module) not in rooms
    }
    assert not strangers


def test_the_command_line_imports_nothing_heavy():
    heavy = "'torch','transformers','diffusers','numpy','accelerate','peft','PIL','datasets','pyarrow'"
    code = f"import sys, diffalign, diffalign.cli; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [m for m in modules() if m.startswith("diffalign")])
def test_sizes_are_a_few_screens(module):
    """A smell rather than a crime: raise a number here only with a reason in the commit."""
    source = modules()[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 340
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 75, f"{node.name} has {lines} lines"


def test_every_module_says_what_it_is():
    for module, path in modules().items():
        if module.startswith("diffalign"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring, module
            assert "TODO" not in docstring, module


if __name__ == "__main__":
    print(f"{len(FLOOR)} rooms, {storeys()} storeys, {len(arrows())} arrows, {len(circles())} circles")
