"""The script pipelines/make_ranked_lists.py: two generators, two rewards, resumed, and read by training."""

import json
import runpy
import sys
from itertools import combinations
from pathlib import Path

import pytest

from diffalign.config.schema import DataConfig
from diffalign.data.reading.readers import read_preferences
from diffalign.errors import UserError
from diffalign.media.files import open_image
from diffalign.rewards import load

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a large red circle", "a small blue square"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, PROMPTS[0], "a large green circle"]))

    def call(*more):
        arguments = ["--prompts", str(prompts), "--count", "2", "--images", "2", "--sampling-steps", "2"]
        monkeypatch.setattr(
            sys, "argv", ["make_ranked_lists.py", *arguments, "--output", str(tmp_path / "out"), *more]
        )
        runpy.run_path(str(ROOT / "pipelines" / "make_ranked_lists.py"), run_name="__main__")
        return [json.loads(line) for line in (tmp_path / "out" / "lists.jsonl").read_text().splitlines()]

    return call


def test_lists_of_two_generators_and_two_rewards(run, tmp_path):
    rows = run("--generators", "tiny:sdxl,tiny:sd15")
    assert [row["prompt"] for row in rows] == PROMPTS
    files = [tmp_path / "out" / name for row in rows for name in row["images"]]
    assert len(set(files)) == 8 and all(file.is_file() for file in files)
    for row in rows:
        assert row["generators"] == ["tiny:sdxl"] * 2 + ["tiny:sd15"] * 2
        images = [open_image(tmp_path / "out" / name) for name in row["images"]]
        by_hand = [load(name)(images, [row["prompt"]] * 4).tolist() for name in ("judge", "taste")]
        assert row["rewards"] == [list(pair) for pair in zip(*by_hand, strict=True)]
        won = [0] * 4
        for column in by_hand:
            for i, j in combinations(range(4), 2):
                won[i] += column[i] > column[j]
                won[j] += column[j] > column[i]
        assert row["scores"] == pytest.approx([n / (2 * 3) for n in won])

    before = {file: file.stat().st_mtime_ns for file in files}
    assert run("--generators", "tiny:sdxl,tiny:sd15") == rows
    assert {file: file.stat().st_mtime_ns for file in files} == before, "nothing is drawn twice"

    read = [e for e in read_preferences(DataConfig(path=str(tmp_path / "out" / "lists.jsonl"))) if e]
    assert [list(example.scores) for example in read] == [pytest.approx(row["scores"]) for row in rows]
    assert [len(example.images) for example in read] == [4, 4]


def test_a_folder_of_images_is_a_generator(run, tmp_path):
    alone = run()
    folder = next((tmp_path / "out" / "images").iterdir())
    rows = run("--generators", f"{folder},tiny:sd15")
    assert all(row["images"][:2] == other["images"] for row, other in zip(rows, alone, strict=True))
    with pytest.raises(UserError, match=r"1 images.*at least 2"):
        run("--images", "1")
