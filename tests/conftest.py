"""Shapes that annotations state are checked in every test of this process; slow files are marked.

``tests/times.json`` holds processor seconds by test file, those of child processes included, and
``python -m pytest --record-times FILES`` measures again. A file above ``FAST`` seconds, or one that has never
been measured, is marked ``slow``.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests import shape_checks  # noqa: F401  (the hook finds it as an attribute of ``tests``)

install_import_hook(
    ["diffalign.types", "diffalign.losses", "diffalign.methods", "diffalign.strategies"],
    "tests.shape_checks.checked",
)

TIMES = Path(__file__).with_name("times.json")
FAST = 12.0  # processor seconds of a file; its imports are not counted
_spent: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--record-times``."""
    parser.addoption(
        "--record-times", action="store_true", help="write processor seconds to tests/times.json"
    )


def is_slow(file: str, times: dict[str, float]) -> bool:
    """Return whether a test file is left out of the fast tier."""
    return times.get(file, float("inf")) > FAST


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of a slow file."""
    times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    for item in items:
        if is_slow(item.nodeid.partition("::")[0], times):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Add up the processor time of a test to that of its file."""
    begun = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        _spent[item.nodeid.partition("::")[0]] += sum(os.times()[:4]) - begun


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was measured."""
    if session.config.getoption("--record-times"):
        known = json.loads(TIMES.read_text()) if TIMES.exists() else {}
        known |= {file: round(seconds, 1) for file, seconds in _spent.items()}
        TIMES.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
