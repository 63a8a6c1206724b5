"""``diffalign data``: its summary of files with known contents."""

import json
from collections import Counter

import pytest

from diffalign.cli import main
from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.data.reading.summary import Tokens, summarise
from tests.data.conftest import png, row, write_parquet


@pytest.fixture
def mixed(tmp_path):
    """Three pairs, a tie, a row without label, an unreadable one, one of identical images."""
    rows = [
        row(0, (1.0, 0.0), prompt="A red cat."),
        row(1, (0.0, 1.0), prompt="a  red cat", sizes=((40, 80), (80, 40))),
        row(2, (0.9, 0.1), prompt="a blue dog on a mat"),
        row(3, (0.5, 0.5), prompt="a green bird"),
        row(4, (None, None)),
        {**row(5), "jpg_1": b"no image"},
        {**row(6), "jpg_1": png(12)},
    ]
    rows[2]["jpg_0"] = rows[0]["jpg_0"]
    return write_parquet(tmp_path / "pairs.parquet", [{**one, "note": "x"} for one in rows])


def test_numbers_of_a_set(mixed, capsys):
    page = str(mixed.parent / "page.html")
    assert main(["data", str(mixed), "--json", "--page", page, "--rows", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "Pick-a-Pic"
    expected = {"usable": 3, "ties": 1, "unlabelled": 1, "unreadable": 1, "identical": 1}
    assert {name: found["counts"][name] for name in expected} == expected
    (unreadable,) = found["unreadable"]
    assert unreadable.startswith(
        "pairs.parquet row 5: image 1 is unreadable (not an image in one of the formats"
    )
    assert found["notes"] == ["columns that are not used: note"]
    assert found["aspects"] == {"landscape": 1, "square": 6, "portrait": 1}
    assert found["sizes"][0] == {"width": 40, "height": 40, "images": 6}
    assert found["first_better"] == {"pairs": 3, "first": 2}
    assert found["margin_quantiles"] == pytest.approx([0.8, 0.8, 1, 1, 1])
    assert found["prompts"] == {"all": 4, "different": 4} and found["words"] == {"median": 3, "longest": 6}
    assert found["repeated_images"] == 1 and found["votes"] is None
    assert found["repeated_pairs"] == 0 and found["contradictions"] == 0
    page = (mixed.parent / "page.html").read_text()
    assert page.count("<section>") == 2 and page.count("data:image/jpeg;base64,") == 4
    assert page.count('class="best"') == 2 and "A red cat." in page


def test_pairs_that_come_again_and_with_the_opposite_label(tmp_path, capsys):
    """One pair stands four times, once turned round and once with the opposite label; another twice."""
    one, other = row(0, (1.0, 0.0)), row(1, (0.0, 1.0))
    turned = {**one, "jpg_0": one["jpg_1"], "jpg_1": one["jpg_0"], "label_0": 0.0, "label_1": 1.0}
    opposite = {**one, "label_0": 0.0, "label_1": 1.0}
    tie = {**one, "label_0": 0.5, "label_1": 0.5}
    elsewhere = {**opposite, "caption": "another prompt"}
    rows = [one, one, turned, opposite, other, other, tie, elsewhere]
    path = write_parquet(tmp_path / "pairs.parquet", rows)
    assert main(["data", str(path)]) == 0
    said = capsys.readouterr().out
    assert "pairs that an earlier row has as well: 4; pairs with opposite labels: 1" in said


def test_empty_prompts_are_counted(tmp_path, capsys):
    rows = [row(0), row(1, prompt=""), row(2, prompt=" ")]
    assert main(["data", str(write_parquet(tmp_path / "pairs.parquet", rows))]) == 0
    assert "2 of 3 prompts are empty" in capsys.readouterr().out


def test_a_set_without_a_row_is_an_error_that_counts_why(tmp_path, capsys):
    path = write_parquet(tmp_path / "pairs.parquet", [{**row(0), "jpg_1": b"no image"}])
    assert main(["data", str(path)]) == 2
    told = capsys.readouterr()
    assert "pairs.parquet has no row that can be read; " in told.err and "1 unreadable" in told.err
    assert "unreadable: pairs.parquet row 0" in told.out


def test_tokens_and_prompts_that_an_evaluation_set_has(mixed):
    tokenizers = {"words": (lambda text: len(text.split()), 3)}
    evaluation = {"mine": ["a red cat", "A blue dog on a mat"], "other": ["x"]}
    found = summarise(read_preferences(DataConfig(path=str(mixed))), tokenizers, evaluation)
    assert found.tokens == (Tokens("words", 3, 6, 1),)
    assert found.shared == {"mine": 2, "other": 0}  # case, spaces and the full stop do not count


def test_a_schema_error_is_told_with_status_2(tmp_path, capsys):
    (tmp_path / "p.json").write_text('[{"prompt": "a", "better": "x.png"}]')
    assert main(["data", str(tmp_path / "p.json")]) == 2
    told = capsys.readouterr().err
    assert "no preference columns; found better, prompt" in told and "data.columns prompt=" in told


def test_the_list_of_layouts(capsys):
    assert main(["data", "--schemas"]) == 0
    told = capsys.readouterr().out
    names = Counter(line.split("  ")[0] for line in told.splitlines())
    for name in ("Pick-a-Pic", "HPDv3", "Rapidata (votes)", "VideoFeedback", "Flow-Factory (preferences)"):
        assert names[name]
