"""Every form of a label: numbers, texts, what is empty or not finite, and a choice of two."""

import itertools

import pytest

from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.data.reading.cells import choice, number, truth
from diffalign.errors import UserError
from tests.data.conftest import row, write_jsonl, write_parquet

NAN, INF = float("nan"), float("inf")

# label_0, label_1, has_label -> scores, or None where there is no label
FORMS = [
    ((1, 0, True), (1, 0)),
    ((0.0, 1.0, True), (0, 1)),
    ((0.5, 0.5, True), (0.5, 0.5)),
    ((1, 1, True), (0.5, 0.5)),
    ((0.7, 0.3, True), (0.7, 0.3)),
    (("1", "0", True), (1, 0)),
    (("0.5", "0.5", "True"), (0.5, 0.5)),
    ((True, False, True), (1, 0)),
    (("true", "false", "true"), (1, 0)),
    ((1, 0, None), (1, 0)),
    ((1, 0, ""), (1, 0)),
    ((1, 0, "False"), None),
    ((1, 0, "false"), None),
    ((1, 0, "0"), None),
    ((1, 0, 0), None),
    ((1, 0, 0.0), None),
    ((1, 0, False), None),
    ((0, 0, True), None),
    ((None, None, True), None),
    (("", "", True), None),
    (("nan", "0", True), None),
    ((NAN, 0, True), None),
    ((0, NAN, True), None),
    ((INF, 0, True), None),
    ((0, -INF, True), None),
    ((INF, -INF, True), None),
]


@pytest.mark.parametrize(("cells", "scores"), FORMS, ids=str)
def test_a_form_of_a_label(tmp_path, cells, scores):
    entry = {"caption": "cat", "jpg_0": "a.png", "jpg_1": "b.png"}
    entry |= dict(zip(("label_0", "label_1", "has_label"), cells, strict=True))
    preferences = read_preferences(DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", [entry]))))
    assert [example.scores for example in preferences] == ([] if scores is None else [scores])
    assert preferences.counts.unlabelled == (scores is None)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ((7, -1, True), "label_0 is 7; allowed: 1, 0"),
        ((1, -1, True), "label_1 is -1; allowed: 1, 0"),
        (("good", 0, True), "label_0 is 'good'; a label is a number"),
        ((1, 0, "maybe"), "has_label is 'maybe'; allowed: true, false"),
        (([1], 0, True), "a label is a number"),
    ],
)
def test_what_is_no_label_is_named(tmp_path, cells, words):
    entry = {"caption": "cat", "jpg_0": "a.png", "jpg_1": "b.png"}
    entry |= dict(zip(("label_0", "label_1", "has_label"), cells, strict=True))
    with pytest.raises(UserError, match=words):
        list(read_preferences(DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", [entry])))))


def test_what_a_row_means_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = [
        row(0, (1.0, 0.0)),
        row(1, (NAN, 0.0)),
        row(2, (0.5, 0.5)),
        row(3, (None, None)),
        row(4, (0.0, INF)),
    ]
    found = set()
    for at, some in enumerate(itertools.permutations(rows, 3)):
        path = write_parquet(tmp_path / f"{at}.parquet", list(some))
        found |= {
            (example.prompt, example.scores) for example in read_preferences(DataConfig(path=str(path)))
        }
    assert found == {("prompt 0", (1, 0)), ("prompt 2", (0.5, 0.5))}


@pytest.mark.parametrize("scores", [[1.0, NAN], [INF, 0.0], [1.0, None], [1.0, ""], ["nan", "1"]])
def test_a_list_with_a_score_that_is_not_finite_has_no_label(tmp_path, scores):
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "x", "images": ["0.png", "1.png"], "scores": scores}]
    )
    preferences = read_preferences(DataConfig(path=str(path)))
    assert list(preferences) == [] and preferences.counts.unlabelled == 1


@pytest.mark.parametrize(
    ("value", "scores"),
    [
        ("A", (1, 0)), ("b", (0, 1)), ("same", (0.5, 0.5)), ("Tie", (0.5, 0.5)), (0, (1, 0)), (1.0, (0, 1)),
        ("1", (0, 1)), ("left", (1, 0)), ("image2", (0, 1)), ("", None), (None, None), (NAN, None),
    ],
)  # fmt: skip
def test_a_choice_of_two(value, scores):
    verdict = choice(value, "label", "row 0")
    assert (verdict.scores if verdict else None) == scores


def test_a_choice_that_is_none_is_named():
    with pytest.raises(UserError, match="row 0: label is 'x'; allowed: A, B, same"):
        choice("x", "label", "row 0")


def test_numbers_and_truths():
    assert number("3.5", "n", "") == 3.5 and number(" ", "n", "") is None and number("1e400", "n", "") is None
    assert truth("Yes", "n", "") is True and truth("no", "n", "") is False
    assert truth("TRUE", "n", "") is True and truth("", "n", "") is None and truth(0.0, "n", "") is False


@pytest.mark.parametrize(
    ("columns", "value", "scores"),
    [
        (("image_0", "image_1"), "image_1", (0, 1)),  # counted from 0: the second one
        (("image_0", "image_1"), "Image_0", (1, 0)),
        (("image_1", "image_2"), "image_1", (1, 0)),
        (("image_1", "image_2"), "image 2", (0, 1)),
        (("ours", "theirs"), "theirs", (0, 1)),
    ],
)
def test_a_label_may_name_the_column_of_the_better_one(tmp_path, columns, value, scores):
    entry = {"prompt": "x", "label": value} | dict(zip(columns, ("0.png", "1.png"), strict=True))
    mapped = tuple(f"image_{at}={name}" for at, name in enumerate(columns))
    settings = DataConfig(path=str(write_jsonl(tmp_path / "p.jsonl", [entry])), columns=mapped)
    assert [example.scores for example in read_preferences(settings)] == [scores]


@pytest.mark.parametrize("value", ["image_2", "image2", "Image 1", "model1"])
def test_beside_columns_that_are_counted_from_0_a_number_from_1_is_refused(tmp_path, value):
    entry = {"prompt": "x", "image_0": "0.png", "image_1": "1.png", "label": value}
    path = write_jsonl(tmp_path / "p.jsonl", [entry])
    with pytest.raises(UserError, match=f"label is {value!r}; allowed: .*right, image_0, image_1, tie"):
        list(read_preferences(DataConfig(path=str(path))))
