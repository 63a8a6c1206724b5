"""Prompt sets about source images: a column of files or paths, GEdit and ImgEdit as they are published."""

import copy
import json
import pickle
from pathlib import Path

import pytest

from diffalign.data.prompts.prompt_sets import read_prompt_set
from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt, sources_of
from tests.data.conftest import png, write_jsonl, write_parquet

A, B = png(1), png(2)


def files(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((A, B)[number % 2])


def test_a_prompt_is_told_from_others_by_its_source(tmp_path):
    files(tmp_path, "a.png", "b.png")
    one, same, other = SourcedPrompt("x", A), SourcedPrompt("x", tmp_path / "a.png"), SourcedPrompt("x", B)
    assert one == same and hash(one) == hash(same) and one != other and one != "x"
    assert {one: 1, same: 2, other: 3} == {one: 2, other: 3}
    assert str(one) == "x" and type(str(one)) is str and json.dumps([one]) == '["x"]'
    for copied in (pickle.loads(pickle.dumps(same)), copy.deepcopy(same)):
        assert copied == one and copied.image.size == (40, 40)


def test_some_sources_are_an_error_and_a_missing_file_is_named(tmp_path):
    assert sources_of(["a", "b"]) == [] and len(sources_of([SourcedPrompt("a", A)])) == 1
    with pytest.raises(UserError, match="1 of 2 prompts have a source image, and 'b' has none"):
        sources_of([SourcedPrompt("a", A), "b"])
    with pytest.raises(UserError, match=r"source image .*absent\.png': No such file"):
        _ = SourcedPrompt("a", tmp_path / "absent.png").image
    with pytest.raises(UserError, match="source image 'bytes': not an image"):
        _ = SourcedPrompt("a", b"nothing").image


@pytest.mark.parametrize("name", ["source", "path_src", "input_image"])
def test_json_lines_name_their_sources(tmp_path, name):
    files(tmp_path, "images/a.png", "images/b.png")
    rows = [{"instruction": f"edit {number}", name: f"images/{number}.png"} for number in "ab"]
    read = read_prompt_set(str(write_jsonl(tmp_path / "p.jsonl", rows)))
    assert [(str(prompt), prompt.content) for prompt in read.prompts] == [("edit a", A), ("edit b", B)]


@pytest.mark.parametrize("name", ["ref_image", "Control", "start_frame", "source"])
def test_a_table_keeps_a_source_of_any_such_name(tmp_path, name):
    rows = [{"caption": f"edit {number}", name: {"bytes": A, "path": None}, "id": 1} for number in "ab"]
    read = read_prompt_set(str(write_parquet(tmp_path / "p.parquet", rows)))
    assert [(str(prompt), prompt.content) for prompt in read.prompts] == [("edit a", A), ("edit b", A)]


@pytest.mark.parametrize("name", ["source_video", "edit_mask"])
def test_an_input_that_is_no_image_is_refused(tmp_path, name):
    rows = [{"prompt": "x", name: "a.mp4" if name == "source_video" else "a.png"}]
    with pytest.raises(UserError, match=f"line 1: field '{name}' holds a video or a mask"):
        read_prompt_set(str(write_jsonl(tmp_path / "p.jsonl", rows)))


def test_source_may_be_a_word_for_origins(tmp_path):
    read = read_prompt_set(str(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a cat", "source": "web"}])))
    assert read.prompts == ("a cat",) and not isinstance(read.prompts[0], SourcedPrompt)


def test_gedit_in_parquet(tmp_path):
    rows = [
        {"key": str(number), "task_type": task, "instruction": f"{language} {number}",
         "instruction_language": language, "input_image": {"bytes": B, "path": None},
         "input_image_raw": {"bytes": A, "path": None}, "Intersection_exist": True}
        for number, task in enumerate(["subject-add", "text_change"]) for language in ("en", "cn")
    ]  # fmt: skip
    write_parquet(tmp_path / "data" / "train-0.parquet", rows)
    read = read_prompt_set(f"gedit:{tmp_path}")
    assert list(map(str, read.prompts)) == ["en 0", "en 1"]
    assert [prompt.content for prompt in read.prompts] == [A, A]
    assert read.categories == {"task": ("subject-add", "text_change")}
    assert list(map(str, read_prompt_set(f"gedit_cn:{tmp_path}", 1).prompts)) == ["cn 0"]


@pytest.mark.parametrize("folder", ["singleturn", "Benchmark/singleturn"])
def test_imgedit_beside_its_images(tmp_path, folder):
    files(tmp_path / folder, "animal/1.jpg", "human/2.jpg")
    entries = {
        "7": {"id": "animal/1.jpg", "prompt": "add a hat", "edit_type": "add"},
        "9": {"id": "human/2.jpg", "prompt": "remove it", "edit_type": "remove"},
    }
    (tmp_path / "basic_edit.json").write_text(json.dumps(entries))
    read = read_prompt_set(f"imgedit:{tmp_path}/basic_edit.json")
    assert [(str(p), p.content) for p in read.prompts] == [("add a hat", A), ("remove it", B)]
    assert read.categories == {"edit": ("add", "remove")}
    (tmp_path / folder / "human/2.jpg").unlink()
    with pytest.raises(UserError, match=r"entry '9': no source image; looked for"):
        read_prompt_set(f"imgedit:{tmp_path}/basic_edit.json")


def test_imgedit_is_not_fetched():
    with pytest.raises(UserError, match=r"cannot fetch basic_edit\.json of ImgEdit"):
        read_prompt_set("imgedit")
