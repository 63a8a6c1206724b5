"""Check the shapes that annotations state in every test of this process; mark slow files.

``tests/times.json`` holds processor seconds by test file, those of child processes included, and
``python -m pytest --record-times [FILES]`` measures again, also with ``-n``. A file above ``FAST`` seconds is
marked ``slow``; one that was never measured counts as fast unless its name has one of ``SLOW_WORDS``.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors; threads would wait for each other

import gc
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import shape_checks

gc.disable()  # until the tests are collected: imports make a million objects that stay

SHAPED = ("types", "losses", "diffusion", "media", "methods", "models", "rewards", "rollout", "evaluation")
SHAPED += ("preferences", "plane", "strategies")
"""Rooms whose annotations are checked where they name arrays."""

shape_checks.install([f"diffalign.{room}" for room in SHAPED])

ROOT = Path(__file__).resolve().parents[1]
TIMES = Path(__file__).with_name("times.json")
FAST = 2.0  # processor seconds of a file; its imports are not counted
SLOW_WORDS = frozenset(
    ["benchmarks", "demo", "distributed", "notebooks", "run", "runs", "scripts", "sweep", "training"]
)
"""Words of the names of test files that train or start processes."""
_spent: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--record-times`` and ``--plane-seeds``."""
    parser.addoption(
        "--plane-seeds", type=int, default=1, help="seeds of every row of the plane (default: %(default)s)"
    )
    parser.addoption(
        "--record-times", action="store_true", help="write processor seconds to tests/times.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to measure parts of files, whose seconds would stand for the whole."""
    partial = config.option.keyword or config.option.markexpr or any("::" in word for word in config.args)
    if config.getoption("--record-times") and partial:
        raise pytest.UsageError("--record-times with -k, -m or a single test; allowed: whole files")


def is_slow(file: str, times: Mapping[str, float]) -> bool:
    """Return whether a test file is left out of the fast tier."""
    if file in times:
        return times[file] > FAST
    return not SLOW_WORDS.isdisjoint(Path(file).stem.split("_"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test of a slow file; put slow files first where workers of pytest-xdist share them out.

    With ``--dist loadfile --no-loadscope-reorder`` files are then taken the longest first, so that no worker
    is left with a long one at the end.
    """
    times = json.loads(TIMES.read_text())
    for item in items:
        if is_slow(_file_of(item), times):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: longest_first(_file_of(item), times))


def pytest_collection_finish() -> None:
    """Leave what was imported out of the collections of garbage to come, which would walk it each time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def longest_first(file: str, times: Mapping[str, float]) -> tuple[float, str]:
    """Return the key that sorts files by their seconds, the most first; unmeasured ones come before."""
    return -times.get(file, float("inf")), file


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Add up the processor time of a test to that of its file."""
    begun = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        _spent[_file_of(item)] += sum(os.times()[:4]) - begun


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the seconds of a worker of pytest-xdist."""
    _spent.update(getattr(node, "workeroutput", {}).get("seconds", {}))


def merged(known: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
    """Return the recorded seconds with those just measured, in order, without files that are gone."""
    seconds = {**known, **{file: round(value, 1) for file, value in spent.items()}}
    return {file: seconds[file] for file in sorted(seconds) if (ROOT / file).exists()}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was measured, or hand it to the process that started this worker."""
    if not session.config.getoption("--record-times"):
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["seconds"] = dict(_spent)
        return
    from diffalign.utils.files import write_atomic

    write_atomic(TIMES, json.dumps(merged(json.loads(TIMES.read_text()), _spent), indent=1) + "\n")
