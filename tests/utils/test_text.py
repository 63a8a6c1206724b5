"""The readers of text, JSON, JSON lines and YAML: what they return, and what they refuse with which line."""

import json
from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.utils.text import (
    json_lines,
    parse_json,
    read_json_lines,
    read_json_object,
    read_text,
    text_lines,
    user_path,
)
from diffalign.utils.yaml_reader import parse_yaml, read_yaml_file

CAFE = "un café\n☕"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_part_of_the_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(CAFE.encode(encoding))
    assert read_text(tmp_path / "a.txt") == CAFE
    (tmp_path / "a.jsonl").write_bytes(
        (json.dumps({"prompt": CAFE}, ensure_ascii=False) + "\n").encode(encoding)
    )
    assert [row for _, row in json_lines(tmp_path / "a.jsonl")] == [{"prompt": CAFE}]


def test_another_encoding_is_refused_with_file_and_line(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes(b"a red circle\na sailor\x92s caf\xe9\n")
    with pytest.raises(UserError, match=r"captions\.txt line 2: not UTF-8 text .*0x92.*save it as UTF-8"):
        read_text(file)
    file.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"captions\.txt line 3: not UTF-8 text"):
        list(json_lines(file))


def test_line_ends_are_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\nthree\rfour \xe2\x80\xa8 still four")
    lines = list(text_lines(tmp_path / "a.txt"))
    assert [line for _, line in lines] == ["one", "", "three", "four \u2028 still four"]
    assert lines[2][0].endswith("a.txt line 3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "\\ud83d"}', "half of a surrogate pair"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ('{"a":' * 150 + "1" + "}" * 150, "nested too deeply"),
        ("9" * 5000, "an integer of 5,000 digits"),
        ("{", "not JSON"),
        ('{"a": 1}\n{"b"', "not JSON: .* at line 2, character 1"),
    ],
)
def test_json_beyond_its_bounds_is_refused(text, words):
    with pytest.raises(UserError, match=f"settings.json: .*{words}"):
        parse_json(text, "settings.json")


def test_json_within_its_bounds_is_read():
    assert parse_json('{"a": "\\ud83d\\ude00", "b": [1, 2.5, null]}', "a") == {"a": "😀", "b": [1, 2.5, None]}
    assert parse_json("[" * 99 + "]" * 99, "a")[0][0] != []


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"a"', "null"])
def test_an_object_is_needed(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: holds .*; needed: a JSON object"):
        read_json_object(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json line 1: .*; needed: an object such as \{\}"):
        list(json_lines(tmp_path / "config.json", "{}"))


def test_a_log_that_a_crash_cut_off_lacks_its_last_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st')
    assert read_json_lines(file) == [{"step": 1}]
    with pytest.raises(UserError, match="line 2"):
        list(json_lines(file))
    file.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        read_json_lines(file)
    assert read_json_lines(tmp_path / "none.jsonl") == []


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 100,000 values once its anchors are written out"),
        ("a: &a [*a]", "an anchor that refers to itself"),
        ("a: &a {b: *a}", "an anchor that refers to itself"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[" * 150 + "]" * 150, "nested too deeply"),
        ("a: " + "9" * 5000, "an integer of 5,000 digits"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: key 'c' is given twice"),
        ("a: 2001-99-99", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("a: 'b", "line 1, column 6: not valid YAML"),
        ("a: \x07", "not a YAML text"),
        ("#" * (2**20 + 1), "larger than"),
    ],
)  # fmt: skip
def test_yaml_beyond_its_bounds_is_refused(text, words):
    with pytest.raises(UserError, match=f"run.yaml.*{words}"):
        parse_yaml(text, "run.yaml")


def test_yaml_within_its_bounds_is_read():
    assert parse_yaml("base: &b {x: 1}\nfirst: {<<: *b, y: 2}\nsecond: *b", "a") == {
        "base": {"x": 1},
        "first": {"x": 1, "y": 2},
        "second": {"x": 1},
    }


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a" * 300, "too long for a file name"),
        ("a\0b", "null byte"),
        ("~nosuchuser/a", "no home folder of '~nosuchuser'"),
        ("missing.txt", r"no such file: 'missing\.txt', looked for as '/"),
        (".", "is a folder; needed: a file"),
    ],
)
def test_names_that_no_file_can_have_are_refused(path, words):
    for read in (read_text, read_json_object, read_yaml_file, lambda p: list(json_lines(p))):
        with pytest.raises(UserError, match=words):
            read(path)


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/a") == Path("/somewhere/a")


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 101)
    with pytest.raises(UserError, match="larger than 100 bytes"):
        read_text(tmp_path / "a.txt", limit=100)
