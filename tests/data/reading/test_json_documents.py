"""Json documents that hold rows under names, and cells that hold a list of one."""

import json
import re

import pytest

from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.data.prompts.prompt_sets import read_prompts
from diffalign.errors import UserError
from tests.data.conftest import png, write_jsonl


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    return [{"prompt": name, "chosen": "a.png", "rejected": "b.png"} for name in ("x", "y", "z")]


def prompts_of(path, split="train"):
    config = DataConfig(path=str(path), resolution=16, split=split)
    return "".join(example.prompt for example in read_preferences(config))


def write(path, value, indent=None):
    path.write_text(json.dumps(value, indent=indent))
    return path


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_splits_of_one_file_are_chosen_by_data_split(rows, tmp_path, name, indent):
    path = write(tmp_path / name, {"train": rows[:1], "validation": rows[1:]}, indent)
    assert prompts_of(path) == "x"
    assert prompts_of(path, "validation") == prompts_of(path, "val") == "yz"
    assert prompts_of(path, "all") == "xyz"
    with pytest.raises(UserError, match=r"'test';.* allowed: all, train, validation"):
        prompts_of(path, "test")


@pytest.mark.parametrize(
    "value",
    [lambda r: {"data": r}, lambda r: {"version": "1", "Data": r}, lambda r: {"mine": r}],
)
def test_the_only_list_is_the_set(rows, tmp_path, value):
    path = write(tmp_path / "p.json", value(rows))
    assert prompts_of(path) == "xyz"
    with pytest.raises(UserError, match=r"unknown split \(data.split\).*'test'"):
        prompts_of(path, "test")


def test_lists_of_other_names_are_named(rows, tmp_path):
    path = write(tmp_path / "p.json", {"first": rows[:1], "second": rows[1:]})
    assert prompts_of(path, "second") == "yz"
    with pytest.raises(UserError, match="allowed: all, first, second"):
        prompts_of(path)


def test_columns_and_a_single_row_are_no_splits(rows, tmp_path):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert prompts_of(write(tmp_path / "p.json", columns)) == "xyz"
    ranked = {"prompt": "r", "images": ["a.png", "b.png"], "scores": [1, 0]}
    assert prompts_of(write(tmp_path / "r.json", ranked)) == "r"
    assert prompts_of(write(tmp_path / "r.jsonl", ranked)) == "r"


def test_prompt_files_of_lists(tmp_path):
    assert read_prompts(str(write(tmp_path / "a.json", {"prompts": ["a", "b"]}))) == ["a", "b"]
    assert read_prompts(str(write(tmp_path / "b.json", {"test": [{"prompt": ["a"]}]}))) == ["a"]
    columns = {"prompt": ["a", "b"], "category": ["c", "d"]}
    assert read_prompts(str(write(tmp_path / "c.json", columns))) == ["a", "b"]
    with pytest.raises(UserError, match="several lists of rows, train, test; allowed: a file of one"):
        read_prompts(str(write(tmp_path / "d.json", {"train": ["a", "b"], "test": ["c"]})))


def test_a_list_of_one_is_that_one(rows, tmp_path):
    row = {name: [value] for name, value in rows[0].items()}
    (example,) = read_preferences(DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", [row]))))
    assert example.prompt == "x" and [image.read() for image in example.images] == [png(0), png(1)]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (["a.png", "b.png"], "column 'rejected': a list of 2 files in the place of one; allowed: one file"),
        (["a.png", "b.png"], "or a ranked list: columns images (all files) and ranks (1 is the best)"),
        ({"url": "a.png"}, "column 'rejected': an object of url; an image is a path, the bytes of a file"),
        ([{"role": "user"}], "column 'rejected': an object of role"),
    ],
)
def test_lists_and_objects_of_another_kind_are_refused(rows, tmp_path, cell, words):
    path = write_jsonl(tmp_path / "p.jsonl", [{**rows[0], "rejected": cell}])
    with pytest.raises(UserError, match=re.escape(words)):
        list(read_preferences(DataConfig(path=str(path))))
