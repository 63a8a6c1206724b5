"""A round for people: what is written, what is read back, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.rollout.labels import progress, read_labels, write_template

PROMPTS = ["a cat", "an\u2028owl", "a cat"]  # a line separator inside a prompt, and a prompt twice


@pytest.fixture
def folder(tmp_path):
    images = [[torch.full((3, 4, 4), (2 * n + k) / 10) for k in range(2)] for n in range(3)]
    write_template(tmp_path, PROMPTS, images)
    return tmp_path


def rows_of(folder):
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().split("\n") if line]


def fill(folder, scores, name="labels.jsonl", **changes):
    rows = [{**row, "scores": given, **changes} for row, given in zip(rows_of(folder), scores, strict=True)]
    (folder / name).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def put(folder, number, row):
    rows = rows_of(folder)
    rows[number] = row if isinstance(row, str) else {**rows[number], **row}
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "labels.jsonl").write_text("\n".join(lines))


def test_the_template_names_every_image_and_scores_none(folder):
    rows = rows_of(folder)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert rows[1] == {"prompt": PROMPTS[1], "images": ["0001-0.png", "0001-1.png"], "scores": [None, None]}
    pixels = np.asarray(Image.open(folder / "0002-1.png"))
    assert pixels.shape == (4, 4, 3) and (pixels == round(0.5 * 255)).all()
    assert len(list(folder.iterdir())) == 7  # nothing temporary is left
    assert read_labels(folder, PROMPTS, 2) is None
    assert progress(folder) == "0 of 3 prompts labelled in labels.jsonl"


def test_pictures_are_written_as_they_are(tmp_path):
    write_template(tmp_path, ["a cat"], [[Image.new("RGB", (5, 3), (1, 2, 3))]])
    assert np.asarray(Image.open(tmp_path / "0000-0.png")).tolist() == [[[1, 2, 3]] * 5] * 3


def test_scores_come_back_in_order(folder):
    fill(folder, [[3, 1.5], [1, 0], [0, 0]])
    scores = read_labels(folder, PROMPTS, 2)
    assert scores.dtype == torch.float32 and scores.tolist() == [[3, 1.5], [1, 0], [0, 0]]
    assert progress(folder) == "3 of 3 prompts labelled in labels.jsonl"


def test_a_line_with_a_gap_is_not_complete(folder):
    fill(folder, [[3, 1], [1, None], [0, 0]])
    assert read_labels(folder, PROMPTS, 2) is None
    assert progress(folder) == "2 of 3 prompts labelled in labels.jsonl"


def test_the_best_alone_is_liked(folder):
    fill(folder, [[None, None]] * 3, best=1)
    assert read_labels(folder, PROMPTS, 2).tolist() == [[0, 1]] * 3
    lines = [json.dumps({"prompt": p, "best": 0}) for p in PROMPTS]  # by their place
    (folder / "labels.jsonl").write_text("\n".join(lines))
    assert read_labels(folder, PROMPTS, 2).tolist() == [[1, 0]] * 3
    assert progress(folder) == "3 of 3 prompts labelled in labels.jsonl"


def test_several_people_are_averaged_over_those_who_scored_a_line(folder):
    fill(folder, [[1, 0], [0, 1], [None, None]], "labels-anna.jsonl")
    fill(folder, [[1, 1], [None, 1], [2, 5]], "labels-ben.jsonl")
    lines = (folder / "labels-ben.jsonl").read_text().split("\n")
    (folder / "labels-ben.jsonl").write_text("\n".join(lines[::-1]))  # images say which line is whose
    assert read_labels(folder, PROMPTS, 2).tolist() == [[1, 0.5], [0, 1], [2, 5]]
    told = "2 of 3 prompts labelled in labels-anna.jsonl, 2 of 3 in labels-ben.jsonl, 0 of 3 in labels.jsonl"
    assert progress(folder) == told


def test_labels_are_not_written_over(folder):
    images = [[torch.zeros(3, 4, 4)] * 2] * 3
    write_template(folder, PROMPTS, images)  # nobody has filled in anything
    fill(folder, [[None, None], [None, 2], [None, None]], "labels-anna.jsonl")
    before = (folder / "labels-anna.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"labels-anna.jsonl line 2 has been labelled already"):
        write_template(folder, PROMPTS, images)
    assert (folder / "labels-anna.jsonl").read_bytes() == before


def test_an_empty_folder_has_no_labels(tmp_path):
    assert read_labels(tmp_path, PROMPTS, 2) is None
    assert progress(tmp_path) == f"no labels*.jsonl in {tmp_path}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"labels.jsonl line 2: not JSON"),
        ("[1, 0]", r"labels.jsonl line 2: \[1, 0\]; needed: an object such as \{\"prompt\""),
        ({"prompt": "a dog"}, r"line 2: prompt='a dog'; allowed: 'an\\u2028owl'"),
        ({"scores": [1, 2, 3]}, r"line 2: 3 scores; allowed: 2, one for each image"),
        ({"scores": 1}, r"line 2: scores=1; allowed: a list of numbers"),
        ({"scores": [1, "good"]}, r"line 2: score 'good' is no number"),
        ({"scores": [1, True]}, r"line 2: score True is no number"),
        ({"scores": [1, float("nan")]}, r"line 2: score nan is no number"),
        ({"best": 2}, r"line 2: best=2; allowed: the number of an image, 0 to 1"),
        ({"best": "0001-0.png"}, r"line 2: best='0001-0.png'; allowed"),
        ({"best": 1, "scores": [1, 0]}, r"line 2 has both scores and best=1"),
        ({"images": ["x.png"]}, r"line 2: images=\['x.png'\]; allowed: the 2 images of one of the round's 3"),
        ({"images": ["0000-0.png", "0000-1.png"], "prompt": "a cat"}, r"line 2: prompt 0 has a line above"),
        (
            {"images": ["0009-0.png", "0009-1.png"]},
            r"line 2: images=.*such as \['0002-0.png', '0002-1.png'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(folder, row, message):
    fill(folder, [[1, 0], [1, 0], [1, 0]])
    row = {"scores": [None, None], **row} if isinstance(row, dict) else row
    put(folder, 1, row)
    with pytest.raises(UserError, match=message):
        read_labels(folder, PROMPTS, 2)


def test_lines_beyond_the_round_and_other_encodings_are_named(folder):
    with (folder / "labels.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a cat", "scores": [1, 0]}))
    with pytest.raises(UserError, match="line 4: one line too many; allowed: 3"):
        read_labels(folder, PROMPTS, 2)
    (folder / "labels.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"labels.jsonl line 1: not UTF-8 text"):
        read_labels(folder, PROMPTS, 2)
