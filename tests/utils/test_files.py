from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.utils.files import atomic_folder


def write(folder: Path, text: str) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text(text)


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "aligned"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    (target / "stale").write_text("")
    write(target, "2")
    assert [f.name for f in target.iterdir()] == ["a"]
    assert (target / "a").read_text() == "2"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "aligned"
    write(target, "1")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as temporary:  # noqa: PT012
        (temporary / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_way_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            write(target, "1")
