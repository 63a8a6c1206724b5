"""What Windows lacks: modules of POSIX are imported where they are used, and guarded."""

import ast
import os
from pathlib import Path

import diffalign
from diffalign.utils.lock import try_lock

POSIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios"}
SOURCES = sorted(Path(diffalign.__file__).parent.rglob("*.py"))


def test_no_module_of_posix_is_imported_at_the_top() -> None:
    found = [
        (str(path), alias.name)
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name in POSIX
    ]
    assert len(SOURCES) > 100 and not found, "import it where it is used, and say what Windows does"


def test_a_lock_is_free_once(tmp_path: Path) -> None:
    one, other = (os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert try_lock(one) and not try_lock(other)
    os.close(one)
    assert try_lock(other)
    os.close(other)
