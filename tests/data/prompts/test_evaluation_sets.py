"""Evaluation sets in the layouts of their publishers: one prompt each, in order, with its categories."""

import json

import pytest

from diffalign.data.prompts.prompt_sets import read_prompt_set
from diffalign.errors import UserError
from tests.data.conftest import write_parquet


def test_pick_a_pic_as_list_and_as_table(tmp_path):
    (tmp_path / "papv2.json").write_text(json.dumps(["a cat", "a dog", "a cat"]))
    assert read_prompt_set(f"pickapic:{tmp_path}/papv2.json").prompts == ("a cat", "a dog")
    rows = [{"caption": text, "label_0": 1.0} for text in ("a cat", "a cat", "a dog")]
    write_parquet(tmp_path / "test_unique-00000.parquet", rows)
    assert read_prompt_set(f"pickapic:{tmp_path}/test_unique-00000.parquet").prompts == ("a cat", "a dog")


def test_geneval2(tmp_path):
    file = tmp_path / "geneval2_data.jsonl"
    rows = [
        {
            "prompt": "two cats",
            "atom_count": 3,
            "vqa_list": [["q", "a"]],
            "skills": ["object", "count", "object"],
        },
        {"prompt": "a dog", "atom_count": 1},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_prompt_set(f"geneval2:{file}")
    assert read.prompts == ("two cats", "a dog") and read.categories == {
        "atoms": ("3", "1"),
        "skills": ("count + object", ""),
    }


def test_dpg_has_a_prompt_an_item(tmp_path):
    file = tmp_path / "dpg_bench.csv"
    file.write_text(
        "item_id,text,keywords,proposition_id,category_broad\n"
        'one,"A cat, on a mat.",,1,entity\none,"A cat, on a mat.",,2,relation\ntwo,A dog.,,1,entity\n'
    )
    assert read_prompt_set(f"dpg:{file}").prompts == ("A cat, on a mat.", "A dog.")
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "b.txt").write_text("A dog.\n")
    (folder / "a.txt").write_text("A cat,\n on a mat.")
    assert read_prompt_set(f"dpg:{folder}").prompts == ("A cat, on a mat.", "A dog.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*\.txt in it"):
        read_prompt_set(f"dpg:{tmp_path}/empty")


def test_compbench_takes_categories_from_names(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red car\na blue cat\n\n")
    (tmp_path / "3d_spatial_val.txt").write_text("a cat behind a car\n")
    (tmp_path / "color_train.txt").write_text("not of the test\n")
    read = read_prompt_set(f"t2i_compbench:{tmp_path}")
    assert read.prompts == ("a cat behind a car", "a red car", "a blue cat")
    assert read.categories == {"category": ("3d_spatial", "color", "color")}
    one = read_prompt_set(f"t2i_compbench:{tmp_path}/color_val.txt")
    assert one.categories == {"category": ("color", "color")}


def test_prompts_in_english_of_three_sets(tmp_path):
    vbench = [
        {"prompt_en": "a boat", "dimension": ["motion", "colour"]},
        {"prompt_en": "a tree", "dimension": ["colour"]},
    ]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(vbench))
    read = read_prompt_set(f"vbench:{tmp_path}/VBench_full_info.json")
    assert read.prompts == ("a boat", "a tree") and read.categories["dimension"] == (
        "motion + colour",
        "colour",
    )
    (tmp_path / "OneIG.json").write_text(
        json.dumps([{"category": "Anime", "id": "000", "prompt_en": "a girl"}])
    )
    assert read_prompt_set(f"oneig:{tmp_path}/OneIG.json").categories == {"category": ("Anime",)}
    (tmp_path / "test_prompts_en.csv").write_text("index,prompt,sub_dims\n0,a cat,x\n")
    assert read_prompt_set(f"unigenbench:{tmp_path}/test_prompts_en.csv").prompts == ("a cat",)


def test_mjhq_is_keyed_by_id(tmp_path):
    data = {
        "ab12": {"category": "people", "prompt": "a man"},
        "cd34": {"category": "food", "prompt": "a pie"},
    }
    (tmp_path / "meta_data.json").write_text(json.dumps(data))
    read = read_prompt_set(f"mjhq:{tmp_path}/meta_data.json", 5)
    assert read.prompts == ("a man", "a pie") and read.categories == {"category": ("people", "food")}


@pytest.mark.parametrize(
    ("text", "words"), [("[1, 2]", "entry 0: '1'"), ("3", "allowed: a list"), ("{", "not JSON")]
)
def test_other_layouts_are_refused(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_prompt_set(f"mjhq:{tmp_path}/x.json")
