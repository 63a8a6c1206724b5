"""Prompts with their categories: published layouts, a user's own tables, and sets that cannot be fetched."""

import json
from collections import Counter

import pytest

from diffalign.data import read_prompts
from diffalign.data.prompts import published_prompts
from diffalign.data.prompts.prompt_sets import PromptSet, read_prompt_set
from diffalign.data.prompts.published_prompts import PUBLISHED, STYLES
from diffalign.errors import UserError
from tests.data.conftest import write_parquet
from tests.helpers import PUBLISHED_DATA

PARTI = PUBLISHED_DATA / "partiprompts" / "PartiPrompts.tsv"
GENEVAL = PUBLISHED_DATA / "geneval" / "evaluation_metadata.jsonl"
DRAWBENCH = PUBLISHED_DATA / "drawbench" / "drawbench.txt"


def test_parti_prompts():
    read = read_prompt_set(f"parti:{PARTI}")
    assert len(read.prompts) == 1632 and read.prompts[0] == "bond"
    categories, challenges = (Counter(read.categories[axis]) for axis in ("category", "challenge"))
    assert (len(categories), categories["Animals"], categories["Produce & Plants"]) == (12, 314, 50)
    assert (len(challenges), challenges["Simple Detail"], challenges["Perspective"]) == (11, 232, 70)
    assert categories.total() == challenges.total() == 1632
    assert read_prompts(f"parti:{PARTI}", 3) == list(read.prompts[:3])


def test_geneval():
    read = read_prompt_set(f"geneval:{GENEVAL}")
    tags = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
            "color_attr": 100}  # fmt: skip
    assert len(read.prompts) == 553 and Counter(read.categories["tag"]) == tags


def test_drawbench_as_text_has_no_categories():
    read = read_prompt_set(f"drawbench:{DRAWBENCH}")
    assert len(read.prompts) == 200 and read.categories == {}


def test_drawbench_as_table(tmp_path):
    path = tmp_path / "DrawBench Prompts - Sheet1.csv"
    path.write_text('Prompts,Category\nA red car.,Colors\n"One cat, and one dog.",Counting\n,Text\n')
    prompts = ("A red car.", "One cat, and one dog.")
    assert read_prompt_set(f"drawbench:{path}") == PromptSet(prompts, {"category": ("Colors", "Counting")})


def test_hpdv2(tmp_path):
    for style in STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))
    read = read_prompt_set(f"hpdv2:{tmp_path}")
    assert read.prompts[:3] == ("anime one", "anime two", "concept-art one") and len(read.prompts) == 8
    assert read.categories == {"style": tuple(style for style in STYLES for _ in range(2))}
    assert read_prompt_set(f"hpdv2:{tmp_path}", 3).categories == {"style": ("anime", "anime", "concept-art")}
    one = read_prompt_set(f"hpdv2:{tmp_path}/photo.json")
    assert one == PromptSet(("photo one", "photo two"), {"style": ("photo", "photo")})


ROWS = [("a cat", "animals"), ("", "nothing"), ("a car", ""), ("an owl", "animals")]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("header", ["category", "Categories"])
def test_own_tables(tmp_path, suffix, header):
    path = tmp_path / f"mine.{suffix}"
    rows = [{"prompt": prompt, "other": 1, header: category} for prompt, category in ROWS]
    if suffix == "parquet":
        write_parquet(path, rows)
    elif suffix.startswith("json"):
        text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
        path.write_text(text)
    else:
        comma = "," if suffix == "csv" else "\t"
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("".join(comma.join(map(str, line)) + "\n" for line in lines))
    expected = PromptSet(("a cat", "a car", "an owl"), {"category": ("animals", "", "animals")})
    assert read_prompt_set(str(path)) == expected
    assert read_prompt_set(str(path), 1) == PromptSet(("a cat",), {"category": ("animals",)})


def test_several_categories_and_none(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "categories": ["x", "y"]}\n{"prompt": "b", "category": null}\n')
    assert read_prompt_set(str(path)).categories == {"category": ("x + y", "")}
    path.write_text('{"prompt": "a"}\n')
    assert read_prompt_set(str(path)) == PromptSet(("a",), {})


def test_what_is_built_in_has_no_categories():
    assert read_prompt_set("animals", 2) == PromptSet(("an ant", "a badger"))
    assert len(read_prompt_set("tiny:validation", 5).prompts) == 5


def test_a_name_is_fetched(tmp_path, monkeypatch):
    (tmp_path / "PartiPrompts.tsv").write_text(
        "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\n"
    )
    asked = []

    def download(repository, name, repo_type):
        asked.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    expected = PromptSet(("bond",), {"category": ("Abstract",), "challenge": ("Basic",)})
    assert read_prompt_set("parti") == expected and read_prompts("parti") == ["bond"]
    assert asked[0] == ("nateraw/parti-prompts", "PartiPrompts.tsv", "dataset")


def test_geneval_is_fetched_once_and_kept(tmp_path, monkeypatch):
    source = tmp_path / "source.jsonl"
    source.write_text('{"prompt": "a photo of a cow", "tag": "single_object", "include": []}\n')
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(published_prompts, "_GENEVAL", source.as_uri())
    expected = PromptSet(("a photo of a cow",), {"tag": ("single_object",)})
    assert read_prompt_set("geneval") == expected
    source.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_prompt_set("geneval") == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_unreachable_hub_is_said(name, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"'{name}': cannot fetch .*network.*HF_HUB_OFFLINE.*{name}:PATH"):
        read_prompt_set(name)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("parti:{}", None, "no such file; it should be a copy of PartiPrompts.tsv of nateraw/parti-prompts"),
        ("hpdv2:{}", '{"prompt": "x"}', "not a list of texts, as HPDv2's benchmark/anime.json"),
        ("hpdv2:{}", "[", "not JSON"),
        ("geneval:{}", '{"tag": "x"}', "no prompts; found tag"),
        ("partis", None, "no such file; allowed: .*parti, drawbench, geneval, hpdv2, .*or parti:FILE"),
        ("parti:", None, "'parti:': no such file"),
    ],
)
def test_bad_copies(tmp_path, path, content, message):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompt_set(path.format(file))
