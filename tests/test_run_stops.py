"""Rules on signatures: only ``runs`` takes a complete ``Run``, and long argument lists are keyword-only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_house import FLOOR, modules, room_of

HELD = [name for name in modules() if name.startswith("diffalign.")]
BELOW = [name for name in HELD if FLOOR[room_of(name)] < FLOOR["runs"] and room_of(name) != "config"]
POSITIONAL = 6
OPERATORS = {"_fused_attention"}
"""Take the place of an operator of torch, whose signature they must have."""


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def takes_run(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a parameter is annotated with ``Run`` or ``RewardRun``, alone or within another type."""
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    annotations = [a.annotation for a in every if a is not None and a.annotation is not None]
    return any(re.search(r"\b(Run|RewardRun)\b", ast.unparse(annotation)) for annotation in annotations)


@pytest.mark.parametrize(
    ("source", "taken"),
    [
        ("def f(run: Run): ...", True),
        ("def f(*, run: 'Run | RewardRun'): ...", True),
        ("def f(run: schema.Run | None): ...", True),
        ("def f(run: Callable[[Run], None]): ...", True),
        ("def f(model: ModelConfig, run: str = 'Run', *, made: RunFacts) -> Run: ...", False),
    ],
)
def test_a_parameter_that_takes_the_run_is_seen(source: str, taken: bool) -> None:
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert takes_run(function) == taken


def test_the_whole_run_stops_in_runs() -> None:
    """Below ``runs``, a function takes its own section of the configuration."""
    assert len(BELOW) > 200
    taking = [
        f"{name}:{f.lineno} {f.name}" for name in BELOW for f in functions(modules()[name]) if takes_run(f)
    ]
    assert taking == []


def test_a_long_list_of_arguments_is_named() -> None:
    """More than six are keyword-only, so that no call depends on their order."""
    long = []
    for name in HELD:
        for function in functions(modules()[name]):
            arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            count = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
            if count > POSITIONAL and function.name not in OPERATORS:
                long.append(f"{name}:{function.lineno} {function.name} takes {count}")
    assert long == []
