"""Misleading rows and files: devices in place of files, duplicate names, inputs beside the pair."""

import base64
import json
import os
import shutil
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.config.schema import DataConfig
from diffalign.data import check_files, encode_preferences, read_preferences
from diffalign.data.reading.examples import Preferences
from diffalign.errors import UserError
from tests.data.conftest import Model, png, row, write_jsonl, write_parquet


def read(path: Path, **settings: Any) -> Preferences:
    return read_preferences(DataConfig(path=str(path), resolution=16, **settings))


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return {"prompt": "a", "chosen": "0.png", "rejected": "1.png"}


@pytest.mark.parametrize("name", ["control", "start_frame", "edited_from", "jpg_src"])
def test_a_column_of_files_that_names_a_source_is_the_source_and_is_told(
    pair: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """Families without sources refuse such rows (``tests/models/test_source_runs.py``)."""
    told = read(write_jsonl(tmp_path / "p.jsonl", [{**pair, name: "2.png"}]))
    assert told.notes == (f"source images, which the others were made from, in column {name!r}",)
    (example,) = told
    assert example.source is not None and example.source.read() == png(2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"reference_images": ["2.png", "3.png"]}, "reference_images holds 2 inputs beside the prompt"),
        ({"source": "2.mp4"}, "column 'source' holds a video or a mask beside the prompt"),
        ({"source_mask": "2.png"}, "column 'source_mask' holds a video or a mask beside the prompt"),
        ({"control": "2.png", "start_frame": "3.png"}, "columns 'control' and 'start_frame' may hold"),
    ],
)
def test_inputs_that_are_no_one_source_are_refused(
    pair: dict[str, Any], tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(read(write_jsonl(tmp_path / "p.jsonl", [{**pair, **columns}])))


def test_a_source_of_bytes_is_read_and_a_word_of_that_name_is_not(
    pair: dict[str, Any], tmp_path: Path
) -> None:
    (example,) = read(write_parquet(tmp_path / "p.parquet", [{**row(0), "jpg_src": png(2)}]))
    assert example.source is not None and example.source.read() == png(2)
    told = read(write_jsonl(tmp_path / "p.jsonl", [{**pair, "source": "the web"}]))
    assert told.notes == ("columns that are not used: source",)


def test_columns_of_later_rows_that_are_not_used_are_named_too(pair: dict[str, Any], tmp_path: Path) -> None:
    rows = [pair, {**pair, "remark": "x"}]
    assert read(write_jsonl(tmp_path / "p.jsonl", rows)).notes == ("columns that are not used: remark",)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_not_read(pair: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    rows = [{**pair, "chosen": name} for name in ("pipe.png", "/dev/zero", "x" * 300)]
    config = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", [*rows, pair])), resolution=16)
    encoded = encode_preferences(Model(), read_preferences(config), config, tmp_path / "cache", False)
    assert (encoded.counts.usable, encoded.counts.unreadable) == (1, 3)
    assert "pipe.png is unreadable (not a regular file)" in encoded.counts.skipped[0]
    assert "zero is unreadable (not a regular file)" in encoded.counts.skipped[1]


def test_a_file_url_is_a_path(pair: dict[str, Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{**pair, "chosen": (tmp_path / "2.png").as_uri()}])
    (example,) = read(path)
    assert example.images[0].read() == png(2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt,prompt,chosen,rejected\n", "p.csv line 1: column 'prompt' twice"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1: 'prompt' is given twice in one object"),
        ("p.jsonl", '{"prompt": "a\\u0000b", "chosen": "0.png", "rejected": "1.png"}\n', "a null byte"),
        ("p.jsonl.gz", "x", "cannot tell the format of .jsonl.gz files"),
    ],
)
def test_tables_that_would_be_misread(
    pair: dict[str, Any], tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_votes_in_a_cell_of_json_without_end(pair: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "votes": "[" * 5000 + "]" * 5000}
    with pytest.raises(UserError, match="votes: nested too deeply; allowed: 100 levels"):
        list(read(write_jsonl(tmp_path / "p.jsonl", [row])))


def test_a_damaged_table_of_an_image_folder(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"metadata.parquet: not readable as parquet"):
        read(tmp_path)


def test_a_weight_written_as_text(pair: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,weight\na,0.png,1.png,0.25\nb,0.png,1.png,\n")
    assert [example.weight for example in read(tmp_path / "p.csv")] == [0.25, 1.0]
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,weight\na,0.png,1.png,nan\n")
    with pytest.raises(UserError, match="weight is 'nan'; allowed: a number from 0 on"):
        list(read(tmp_path / "p.csv"))


@pytest.mark.parametrize(("name", "content"), [("a.json", b'{"caption": "caf\xe9"}'), ("a.txt", b"caf\xe9")])
def test_a_shard_in_another_encoding_names_the_member(tmp_path: Path, name: str, content: bytes) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as shard:
        for member, data in (("a.jpg_0", png(0)), ("a.jpg_1", png(1)), (name, content)):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            shard.addfile(info, BytesIO(data))
    with pytest.raises(UserError, match=rf"p.tar {name} line 1: not UTF-8 text"):
        list(read(tmp_path / "p.tar"))


# before a model is loaded


def test_missing_and_unreadable_files_are_told_before_a_model_is_loaded(
    pair: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [pair] * 40 + [{**pair, "rejected": name} for name in ("gone.png", "broken.png")]
    settings: dict[str, Any] = {"path": str(write_jsonl(tmp_path / "p.jsonl", rows)), "resolution": 16}
    told: list[str] = []
    check_files(read_preferences(DataConfig(**settings)), DataConfig(**settings), told.append)
    assert len(told) == 1
    assert "2 of 84 files missing or unreadable: gone.png (not there), broken.png (not an image" in told[0]
    assert "left out (data.unreadable skip)" in told[0]
    strict = DataConfig(**settings, unreadable="refuse")
    with pytest.raises(UserError, match=r"2 of 84 files missing.*data.unreadable is refuse, allowed: skip"):
        check_files(read_preferences(strict), strict)
    with pytest.raises(UserError, match=r"line 41: gone.png is unreadable.*data.unreadable is refuse"):
        encode_preferences(Model(), read_preferences(strict), strict, tmp_path / "cache", False)


def test_bytes_in_the_first_rows_are_looked_at(tmp_path: Path) -> None:
    config = DataConfig(
        path=str(write_parquet(tmp_path / "p.parquet", [row(0), {**row(1), "jpg_0": b"no image"}]))
    )
    told: list[str] = []
    check_files(read_preferences(config), config, told.append)
    assert "1 of 4 files missing or unreadable: p.parquet row 1 image 0 (not an image" in told[0]


def test_all_files_are_there(pair: dict[str, Any], tmp_path: Path) -> None:
    config = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", [pair])))
    told: list[str] = []
    check_files(read_preferences(config), config, told.append)
    assert not told


@pytest.mark.parametrize(
    ("column", "broken", "why"),
    [
        ("source_image", b"no image", "not an image"),
        ("mask", b"no image", "not an image"),
        ("mask", b"\x93NUMPY\x01\x00", "EOF"),
    ],
)
def test_source_images_and_weight_maps_are_looked_for_too(
    pair: dict[str, Any], tmp_path: Path, column: str, broken: bytes, why: str
) -> None:
    (tmp_path / "broken.bin").write_bytes(broken)
    np.save(tmp_path / "map.npy", np.ones((4, 4)))
    good = "map.npy" if column == "mask" else "2.png"
    rows = [{**pair, column: name} for name in (good, good, "gone.png", "broken.bin")]
    config = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", rows)))
    told: list[str] = []
    check_files(read_preferences(config), config, told.append)
    (line,) = told
    assert "2 of " in line and "gone.png (not there), broken.bin (" in line and why in line
    nowhere = write_jsonl(tmp_path / "q.jsonl", [{**pair, column: "x/1.png"}] * 3)
    what = "source images" if column == "source_image" else "weight maps"
    with pytest.raises(UserError, match=rf"none of the first \d {what} was found; looked for .*x/1\.png"):
        check_files(read_preferences(replace(config, path=str(nowhere))), config)


def test_images_are_no_set_of_videos(pair: dict[str, Any], tmp_path: Path) -> None:
    config = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", [pair])), frames=1)
    with pytest.raises(
        UserError, match=r"read as a set of videos, and 0\.png is an image; allowed: files of"
    ):
        check_files(read_preferences(config), config)
    Image.new("RGB", (8, 8)).save(
        tmp_path / "0.png", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )
    shutil.copy(tmp_path / "0.png", tmp_path / "1.png")  # these two move
    check_files(read_preferences(config), config)


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_images_in_base64_are_read(tmp_path: Path, head: str) -> None:
    chosen, rejected = (head + base64.b64encode(png(number)).decode() for number in (0, 1))
    entry = {"prompt": "a", "chosen": chosen, "rejected": rejected}
    (example,) = read(write_jsonl(tmp_path / "p.jsonl", [entry]))
    assert [image.read() for image in example.images] == [png(0), png(1)]
    with pytest.raises(UserError, match=r"'data:image/png;base64' with content that is no base64"):
        list(read(write_jsonl(tmp_path / "p.jsonl", [entry | {"chosen": "data:image/png;base64,a.png"}])))


def test_a_path_of_windows_is_found(pair: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    shutil.copy(tmp_path / "3.png", tmp_path / "a b" / "3.png")
    (example,) = read(write_jsonl(tmp_path / "p.jsonl", [pair | {"chosen": "a b\\3.png"}]))
    assert example.images[0].read() == png(3)


@pytest.mark.parametrize(
    "text",
    [
        "prompt;chosen;rejected\na, b;0.png;1.png\n",
        "prompt, chosen, rejected\na b, 0.png, 1.png\n",
        'prompt\tchosen\trejected\n"a"\t0.png\t1.png\n',
        ",prompt,chosen,rejected\n0,a,0.png,1.png\n",  # of pandas, with its index
    ],
)
def test_delimiters_of_spreadsheets(pair: dict[str, Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    preferences = read(tmp_path / "p.csv")
    (example,) = preferences
    assert example.images[1].read() == png(1) and example.prompt in ("a, b", "a b", "a")
    assert preferences.notes == ()


def test_a_list_under_a_name_of_json_lines(pair: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps([pair, pair], indent=1))
    assert len(list(read(tmp_path / "p.jsonl"))) == 2
