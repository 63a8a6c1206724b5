"""Dotted names in docstrings and comments: what begins with the name of a room or module resolves to it."""

import ast
import re
from functools import cache

from diffalign._moved import MOVED
from diffalign.config.io import dotted_names
from diffalign.config.reward_schema import RewardRun
from tests.test_house import FORMER_NAMES, ROOT, modules, room_of

QUOTED = re.compile(r"(?<!`)``([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?``(?!`)")
FILES = {"csv", "json", "jsonl", "md", "mp4", "npz", "parquet", "pth", "py", "safetensors", "txt", "yaml"}


@cache
def definitions(module: str) -> dict[str, frozenset[str]]:
    """Return what a module defines or imports; of a class with the members of its body."""
    found: dict[str, frozenset[str]] = {}
    tree = ast.parse(modules()[module].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found[node.name] = frozenset(names_of(node))
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = frozenset()
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: frozenset() for alias in node.names}
        elif (
            isinstance(node, ast.Dict) and modules()[module].name == "__init__.py"
        ):  # names looked up when used
            found |= {key.value: frozenset() for key in node.keys if isinstance(key, ast.Constant)}
    return found | {name: found.get(name, frozenset()) for name in names_of(tree)}


def names_of(body: ast.Module | ast.ClassDef) -> set[str]:
    """Return the names that the statements of a module or class bind."""
    found = set()
    for node in body.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {
            name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)
        }
    return found


@cache
def fields() -> frozenset[str]:
    """Return the dotted names of all settings and their sections, and the members of every class."""
    dotted = {*dotted_names(), *dotted_names(RewardRun)}
    return frozenset(dotted | {name.rpartition(".")[0] for name in dotted})


@cache
def members() -> frozenset[str]:
    return frozenset().union(*(names for module in modules() for names in definitions(module).values()))


def resolves(name: str) -> bool:
    """Return whether a module's name ends in the first words of ``name`` and it defines the others."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        stem, rest = ".".join(words[:count]), words[count:]
        for module in modules():
            if module != stem and not module.endswith("." + stem):
                continue
            known = definitions(module)
            if not rest or (rest[0] in known and (len(rest) == 1 or rest[1] in known[rest[0]])):
                return True
    return False


def variables(tree: ast.Module) -> set[str]:
    """Return the names of arguments and variables of a module."""
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@cache
def first_words() -> frozenset[str]:
    """Return the names of rooms and modules, those of today and former ones."""
    today = {word for module in modules() for word in module.split(".")}
    former = {name.rpartition(".")[2] for name in MOVED}
    return frozenset(today | {room_of(module) for module in modules()} | former | set(FORMER_NAMES.split()))


def unresolved(text: str) -> list[str]:
    """Return the dotted names of a source that begin with a module's name and resolve to nothing."""
    known = variables(ast.parse(text))
    return [
        name
        for name in QUOTED.findall(text)
        if name.split(".")[0] in first_words()
        and name.rpartition(".")[2] not in FILES
        and not resolves(name)
        and name not in fields()
        and not (name.split(".")[0] in known and set(name.split(".")[1:]) <= members())
    ]


def test_the_check_tells_names_apart():
    right = (
        "``losses.contrast.pairs_of``, ``model.lora.rank``, ``report.json``, ``types.Batch.x``, ``np.nan``"
    )
    assert unresolved(f'"""{right}"""') == []
    wrong = [
        "losses.matching",
        "losses.contrast.pears_of",
        "estimators.transition",
        "types.Batch.y",
        "rollout.people",
    ]
    assert unresolved('"""' + ", ".join(f"``{name}``" for name in wrong) + '"""') == wrong
    assert unresolved('def f(rollout):\n    """Read ``rollout.samples``."""') == []


def test_dotted_names_in_docstrings_and_comments_resolve():
    places = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    found = {
        str(path.relative_to(ROOT)): unresolved(path.read_text("utf-8"))
        for path in places
        if path.name != "test_names_in_prose.py"
    }
    assert {place: names for place, names in found.items() if names} == {}
