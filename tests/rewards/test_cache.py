"""The score cache: a damaged file is an error that names it; an invalid score is computed again."""

import math
import sqlite3

import pytest

from diffalign.errors import UserError
from diffalign.evaluation.measuring.store import MeasurementStore
from diffalign.rewards.scoring.cache import ScoreCache


def damaged(path, kind):
    ScoreCache(path).put({f"key {i}": float(i) for i in range(2000)})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:6000])
    elif kind == "overwritten":
        data = bytearray(path.read_bytes())
        data[4096:] = b"\x5a" * (len(data) - 4096)
        path.write_bytes(bytes(data))
    elif kind == "another table":
        path.unlink()
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE scores (image TEXT, value REAL)")
    else:
        path.write_bytes(b"not a database at all " * 200)
    return path


@pytest.mark.parametrize("kind", ["truncated", "overwritten", "another table", "text"])
@pytest.mark.parametrize("store", [ScoreCache, MeasurementStore])
def test_a_damaged_file_is_named_whenever_it_is_found(tmp_path, kind, store):
    path = damaged(tmp_path / "scores.sqlite", kind)
    with pytest.raises(UserError, match=r"scores\.sqlite' is not .*; remove it or name another"):  # noqa: PT012
        store(path)
        cache = ScoreCache(path)
        cache.get([f"key {i}" for i in range(2000)])
        cache.put({f"new {i}": 1.0 for i in range(2000)})


def test_a_file_that_is_damaged_after_it_was_opened(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite")
    damaged(tmp_path / "scores.sqlite", "text")
    with pytest.raises(UserError, match="not a score cache"):
        cache.get(["key 1"])


def test_a_place_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another place"):
        ScoreCache(tmp_path / "file" / "scores.sqlite")
    with pytest.raises(UserError, match="name another place"):
        ScoreCache(tmp_path)


def test_infinite_scores_are_neither_written_nor_read(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite")
    for bad in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="no finite number"):
            cache.put({"good": 1.0, "bad": bad})
    assert cache.get(["good", "bad"]) == {}, "all or none"
    cache.put({"good": 1.0})
    with sqlite3.connect(tmp_path / "scores.sqlite") as database:
        database.execute("INSERT INTO scores VALUES ('infinite', 9e999), ('text', 'high')")
    assert cache.get(["good", "infinite", "text"]) == {"good": 1.0}
