import json

import pytest

from diffalign.data import read_prompts
from diffalign.data.prompts.prompt_lists import ACTIVITIES, ANIMALS
from diffalign.errors import UserError
from tests.data.conftest import write_parquet
from tests.helpers import PUBLISHED_DATA


def test_text_lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeffa cat\n\n  a dog  \r\nan owl")
    assert read_prompts(str(path)) == ["a cat", "a dog", "an owl"]
    assert read_prompts(str(path), limit=2) == ["a cat", "a dog"]


@pytest.mark.parametrize("name", ["prompt", "caption", "text"])
def test_json(tmp_path, name):
    entries = [{name: "a cat", "tag": 1}, {name: "a\u2028dog"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))
    (tmp_path / "p.json").write_text(json.dumps(entries))
    for suffix in ("jsonl", "json"):
        assert read_prompts(str(tmp_path / f"p.{suffix}")) == ["a cat", "a\u2028dog"]


def test_tables(tmp_path):
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\na "cat\tx\na dog\ty\n')
    (tmp_path / "p.csv").write_text('id,Prompt\n1,"a ""cat"", sitting"\n2,\n3,a dog\n')
    write_parquet(tmp_path / "p.parquet", [{"caption": "a cat", "x": 1}, {"caption": None, "x": 2}])
    assert read_prompts(str(tmp_path / "p.tsv")) == ['a "cat', "a dog"]
    assert read_prompts(str(tmp_path / "p.csv")) == ['a "cat", sitting', "a dog"]
    assert read_prompts(str(tmp_path / "p.parquet")) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("partiprompts/PartiPrompts.tsv", 1632),
        ("geneval/evaluation_metadata.jsonl", 553),
        ("drawbench/drawbench.txt", 200),
    ],
)
def test_published_sets(name, count):
    assert len(read_prompts(str(PUBLISHED_DATA / name))) == count


def test_tiny():
    assert len(read_prompts("tiny:validation", limit=5)) == 5
    with pytest.raises(UserError, match="unknown embedded prompts 'tiny:tests'; did you mean tiny:test"):
        read_prompts("tiny:tests")


def test_animals():
    prompts = read_prompts("animals")
    assert len(prompts) == len(set(prompts)) == 45 and prompts == sorted(prompts, key=lambda p: p.split()[1])
    assert {"a cat", "an otter", "an owl", "a horse"} <= set(prompts)
    assert all((p.split()[0] == "an") == (p.split()[1][0] in "aeiou") for p in prompts)
    assert read_prompts("animals", limit=2) == ["an ant", "a badger"]


def test_activities_are_every_animal_at_everything_mixed_from_the_start():
    prompts = read_prompts("activities")
    assert len(prompts) == len(ANIMALS) * len(ACTIVITIES) == 360
    assert set(prompts) == {f"{animal} {does}" for animal in read_prompts("animals") for does in ACTIVITIES}
    for start in range(0, 360, 45):
        assert {p.split()[1] for p in prompts[start : start + 45]} == set(ANIMALS)
    assert {p.split(" ", 2)[2] for p in read_prompts("activities", limit=8)} == set(ACTIVITIES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt': no such file; allowed: .txt.*tiny:test, .*animals, activities"),
        ("p.txt", b"\n \n", "p.txt: no prompts in it"),
        ("p.txt", b"\xff\xfe\x00", "p.txt line 1: not UTF-8 text"),
        ("p.jsonl", b"\xff", "p.jsonl line 1: not UTF-8 text"),
        ("p.doc", b"x", r"cannot read \.doc; allowed: \.txt, \.jsonl"),
        (
            "p.jsonl",
            b'{"a": 1}',
            "p.jsonl line 1: no prompts; found a; needed one of prompt, prompts, caption, text",
        ),
        ("p.jsonl", b'{"prompt": 1}', "p.jsonl line 1: field 'prompt' is '1'; a prompt is text"),
        ("p.jsonl", b"{", "p.jsonl line 1: not JSON"),
        ("p.csv", b"id,name\n1,2\n", "p.csv: no prompts; found id, name; needed"),
        ("p.csv", b"", "p.csv: no prompts; found nothing"),
        (
            "p.csv",
            b"id,prompt\n1,a cat, sitting\n",
            "p.csv row 0: more cells than columns, ' sitting'; quote",
        ),
        (
            "p.tsv",
            b"id\tprompt\n1\ta\tb\n",
            "p.tsv row 0: more cells than columns, 'b'; quote cells with tabs",
        ),
        ("p.csv", b"prompt,prompt\na,b\n", "p.csv line 1: column 'prompt' twice"),
        ("p.parquet", b"PAR1", "p.parquet: not readable as parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(path))


@pytest.mark.parametrize(
    "text",
    [
        '["a red circle", "a blue square"]',
        '{"x1": {"category": "art", "prompt": "a red circle"}, "x2": {"prompt": "a blue square"}}',
        '{\n "x1": {"prompt": "a red circle"},\n "x2": {"prompt": "a blue square"}\n}',
        '{"prompts": ["a red circle", "a blue square"]}',
        '[{"prompt_en": "a red circle", "dimension": ["x"]}, {"prompt_en": "a blue square"}]',
        '{"prompt": "a red circle"}\n{"prompt": "a blue square"}',
    ],
    ids=["texts", "objects by key", "over several lines", "one list", "prompt_en", "lines in .json"],
)
def test_json_documents_of_prompts(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    assert read_prompts(str(tmp_path / "p.json")) == ["a red circle", "a blue square"]


def test_a_document_without_prompts_says_what_is_needed(tmp_path):
    (tmp_path / "p.json").write_text('{"x1": {"art": 1}}')
    with pytest.raises(UserError, match=r"entry 0: no prompts; found id, art; needed one of prompt"):
        read_prompts(str(tmp_path / "p.json"))
    (tmp_path / "p.json").write_text("[1, 2]")
    with pytest.raises(
        UserError, match=r'entry 0: \'1\'; needed an object such as {"prompt": ...}, or a text'
    ):
        read_prompts(str(tmp_path / "p.json"))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\na blue square\r\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["a red circle", "a blue square"]


def test_a_comma_in_a_file_of_one_column_is_text(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\na cat, sitting, 8k\n"a dog, ""big"""\na cow\n')
    assert read_prompts(str(tmp_path / "p.csv")) == ["a cat, sitting, 8k", 'a dog, "big"', "a cow"]


def test_empty_cells_at_the_end_of_a_row_are_none(tmp_path):
    (tmp_path / "p.csv").write_text("id,prompt\n1,a cat,,\n2\n")
    assert read_prompts(str(tmp_path / "p.csv")) == ["a cat"]
